#!/usr/bin/env bash
# Run the paper's recipe on this machine: data, SFT, reward statistics, RLOO, GRPO and classifier-first
# RL from the SFT model, evaluation of all models on 500 training and 500 test prompts with ten
# completions each, and the report.
#
# usage: MODEL=DIR DATA=DIR REWARD=DIR bash launch/paper.sh [--dry-run] [--config.section.field=value ...]
#        MINIATURE=1 bash launch/paper.sh
#
#   MODEL     the base model: a Hugging Face directory, or a name on the hub
#   DATA      directory of alpaca_farm and ultrafeedback_binarized, as published or saved by `datasets`
#   REWARD    the reward model
#   VARIANT   pythia-2.8b, pythia-1b, llama-3.2-1b or pythia-2.8b-bfloat16
#
# --config... arguments go to the training of all three methods and to all evaluations except the
# statistics. Runs are in RUNS/data, RUNS/sft, RUNS/METHOD-SEED and RUNS/report; SEEDS="0 1 2" trains
# more seeds. RUNS defaults to runs/paper, or runs/paper-VARIANT for the others. Run the command
# again to resume: finished parts are skipped. MINIATURE=1 runs all parts on tiny models and made-up
# data in minutes, by default in runs/miniature. Settings: launch/env.sh, and those of local.sh.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

# the extra `data` reads the published formats
export EXTRA="data${EXTRA:+,$EXTRA}"

config() {
    if [ -n "$MINIATURE" ]; then
        echo "--config=configs/paper/miniature.py:$1:$VARIANT"
    else
        echo "--config=configs/paper/$1.py:$VARIANT"
    fi
}

train() { forward_signals env "RESTARTS=$RESTARTS" bash launch/local.sh "$@"; }

# Run a command unless the file that it writes exists.
make_file() {
    local file="$1"
    shift
    if [ -z "$dry_run" ] && [ -e "$file" ]; then
        log "$file exists"
    else
        forward_signals "$@"
    fi
}

# Evaluate a model on prompts; the results go to the evaluations of a directory.
evaluate() {
    local directory="$1" name="$2" model="$3" file="$4"
    shift 4
    make_file "$directory/evaluations/$name.json" "${ntkrl[@]}" evaluate "$(config evaluation)" \
        "--config.reward.function=$REWARD" "--config.data.path=$data/rl.jsonl" "$@" \
        "--config.data.eval_path=$data/$file" "--config.eval.name=$name" \
        "--config.model.path=$model" "--config.run_dir=$directory"
}

read_arguments "$@"
for argument in ${arguments[@]+"${arguments[@]}"}; do
    [[ "$argument" == --config.* ]] || mistakes+=("$argument does not begin with --config.")
done
if [ -n "$MINIATURE" ]; then
    [ -n "$RUNS" ] || RUNS=runs/miniature
    DATA="$RUNS/inputs" REWARD="$RUNS/inputs/reward" MODEL="$RUNS/inputs/pythia"
    [[ "$VARIANT" != llama* ]] || MODEL="$RUNS/inputs/llama"
fi
if [ -z "$RUNS" ]; then
    RUNS="runs/paper-$VARIANT"
    RUNS="${RUNS%-pythia-2.8b}"
fi
require MODEL DATA REWARD VARIANT SEEDS
require_seeds
for part in alpaca_farm ultrafeedback_binarized; do
    [ -z "$DATA" ] || [ -n "$dry_run$MINIATURE" ] || [ -d "$DATA/$part" ] ||
        mistakes+=("$DATA/$part is not a directory")
done
[[ "$VARIANT" =~ ^(pythia-2.8b|pythia-2.8b-bfloat16|pythia-1b|llama-3.2-1b)$ ]] ||
    mistakes+=("VARIANT=$VARIANT is neither pythia-2.8b, pythia-1b, llama-3.2-1b nor pythia-2.8b-bfloat16")
require_number RESTARTS
check_mistakes
choose_program

data="$RUNS/data" start="$RUNS/sft/export" before="$RUNS/sft/evaluations"
normalised="--config.reward.normalisation=$before/statistics.rewards.json"
sources=("--config.prepare.preferences=$DATA/ultrafeedback_binarized/train_prefs")
sources+=("--config.prepare.test=$DATA/ultrafeedback_binarized/test_prefs")
[[ "$VARIANT" != pythia-2.8b* ]] || sources+=("--config.prepare.supervised=$DATA/alpaca_farm/sft")

if [ -n "$MINIATURE" ]; then
    make_file "$RUNS/inputs" "$python" -m ntkrl.configs.paper.made_up "$RUNS/inputs"
fi
make_file "$data/summary.json" "${ntkrl[@]}" prepare "$(config data)" "--config.run_dir=$data" \
    "--config.model.path=$MODEL" "--config.reward.function=$REWARD" "${sources[@]}"
train "$(config sft)" "--config.run_dir=$RUNS/sft" "--config.model.path=$MODEL" \
    "--config.data.path=$data/sft.jsonl"
# mean and standard deviation of the reward of the SFT model, on training prompts
evaluate "$RUNS/sft" statistics "$start" rl_selected.jsonl --config.reward.normalisation=None
evaluate "$RUNS/sft" test "$start" test_selected.jsonl "$normalised" ${arguments[@]+"${arguments[@]}"}

runs=()
for seed in $SEEDS; do
    for method in rl grpo cfrl; do
        run_dir="$RUNS/$method-$seed"
        runs+=("$run_dir")
        train "$(config "$method")" "--config.seed=$seed" "--config.reward.function=$REWARD" \
            "--config.data.path=$data/rl.jsonl" "--config.data.eval_path=$data/test.jsonl" \
            "$normalised" ${arguments[@]+"${arguments[@]}"} "--config.run_dir=$run_dir" \
            "--config.model.path=$start"
        evaluate "$run_dir" train "$run_dir/export" rl_selected.jsonl "$normalised" \
            "--config.seed=$seed" "--config.eval.base=$before/statistics.jsonl" \
            ${arguments[@]+"${arguments[@]}"}
        evaluate "$run_dir" test "$run_dir/export" test_selected.jsonl "$normalised" \
            "--config.seed=$seed" "--config.eval.base=$before/test.jsonl" \
            ${arguments[@]+"${arguments[@]}"}
    done
done
run "${ntkrl[@]}" report "${runs[@]}" "--out=$RUNS/report"
