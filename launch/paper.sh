#!/usr/bin/env bash
# The paper's runs, on this machine: data, supervised training, statistics of the reward, RLOO, GRPO
# and classifier-first RL from the same start, evaluation of start and methods on 500 training and
# 500 test prompts with ten completions each, and the report.
#
# usage: MODEL=DIR DATA=DIR REWARD=DIR bash launch/paper.sh [--dry-run] [--config.section.field=value ...]
#        bash launch/paper.sh --config.miniature=true
#
#   MODEL     the base model: a Hugging Face directory, or its name on the hub
#   DATA      alpaca_farm and ultrafeedback_binarized, as they are published or saved by `datasets`
#   REWARD    the reward model
#   VARIANT   pythia-2.8b, pythia-1b or llama-3.2-1b
#
# Words of the form --config... go to all three methods' training and to the evaluations but that of
# the statistics. Runs are in RUNS/data, RUNS/sft, RUNS/METHOD-SEED and RUNS/report; SEEDS="0 1 2"
# trains more seeds. RUNS is runs/paper unless set, runs/paper-VARIANT for the 1B models. Run it again
# to go on where it stopped: finished parts are not repeated. --config.miniature=true (or
# MINIATURE=1) runs all of it on tiny models and made-up data in minutes, in runs/miniature unless
# RUNS is set. Settings: launch/env.sh, and those of local.sh.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

# published data is read by the extra `data`
export EXTRA="data${EXTRA:+,$EXTRA}"

config() { echo "--config=configs/paper/$1.py:$VARIANT"; }

train() {
    pass_on env "RESTARTS=$RESTARTS" bash launch/local.sh "$@" ${small[@]+"${small[@]}"}
}

# Run a command of the program that ends by writing a file, where there is no such file.
make_file() {
    local file="$1"
    shift
    if [ -z "$dry_run" ] && [ -e "$file" ]; then
        say "$file is there"
        return
    fi
    pass_on "${ntkrl[@]}" "$@" ${small[@]+"${small[@]}"}
}

# Evaluate a model on prompts, into the evaluations of a directory.
evaluate() {
    local directory="$1" name="$2" model="$3" file="$4"
    shift 4
    make_file "$directory/evaluations/$name.json" evaluate "$(config evaluation)" \
        "--config.reward.function=$REWARD" "--config.data.path=$data/rl.jsonl" "$@" \
        "--config.data.eval_path=$data/$file" "--config.eval.name=$name" \
        "--config.model.path=$model" "--config.run_dir=$directory"
}

read_words "$@"
others=()
for word in ${words[@]+"${words[@]}"}; do
    case "$word" in
        --config.miniature | --config.miniature=true) MINIATURE=1 ;;
        --config.*) others+=("$word") ;;
        *) mistakes+=("$word does not begin with --config.") ;;
    esac
done
words=(${others[@]+"${others[@]}"})
small=()
if [ -n "$MINIATURE" ]; then
    small=(--config.miniature=true)
    [ -n "$RUNS" ] || RUNS=runs/miniature
    DATA="$RUNS/inputs" REWARD="$RUNS/inputs/reward" MODEL="$RUNS/inputs/pythia"
    [[ "$VARIANT" != llama* ]] || MODEL="$RUNS/inputs/llama"
    # compiled programs are kept, as they take most of the time
    cache="$RUNS/compiled"
    [[ "$cache" == /* ]] || cache="$PWD/$cache"
    export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$cache}"
    export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
fi
if [ -z "$RUNS" ]; then
    RUNS="runs/paper-$VARIANT"
    RUNS="${RUNS%-pythia-2.8b}"
fi
need MODEL DATA REWARD VARIANT SEEDS
for part in alpaca_farm ultrafeedback_binarized; do
    [ -z "$DATA" ] || [ -n "$dry_run$MINIATURE" ] || [ -d "$DATA/$part" ] ||
        mistakes+=("there is no directory $DATA/$part")
done
[[ "$VARIANT" =~ ^(pythia-2.8b|pythia-1b|llama-3.2-1b)$ ]] ||
    mistakes+=("VARIANT=$VARIANT is neither pythia-2.8b, pythia-1b nor llama-3.2-1b")
need_number RESTARTS
check
choose_program

data="$RUNS/data" start="$RUNS/sft/export" before="$RUNS/sft/evaluations"
normalised="--config.reward.normalisation=$before/statistics.rewards.json"
sources=("--config.prepare.preferences=$DATA/ultrafeedback_binarized/train_prefs")
sources+=("--config.prepare.test=$DATA/ultrafeedback_binarized/test_prefs")
[ "$VARIANT" != pythia-2.8b ] || sources+=("--config.prepare.supervised=$DATA/alpaca_farm/sft")
[ -z "$MINIATURE" ] || sources+=("--config.prepare.made_up=$RUNS/inputs")

make_file "$data/summary.json" prepare "$(config data)" "--config.run_dir=$data" \
    "--config.model.path=$MODEL" "--config.reward.function=$REWARD" "${sources[@]}"
train "$(config sft)" "--config.run_dir=$RUNS/sft" "--config.model.path=$MODEL" \
    "--config.data.path=$data/sft.jsonl"
# mean and deviation of the reward of what the methods start from, on training prompts
evaluate "$RUNS/sft" statistics "$start" rl_selected.jsonl --config.reward.normalisation=None
evaluate "$RUNS/sft" test "$start" test_selected.jsonl "$normalised" ${words[@]+"${words[@]}"}

runs=()
for seed in $SEEDS; do
    for method in rl grpo cfrl; do
        run_dir="$RUNS/$method-$seed"
        runs+=("$run_dir")
        train "$(config "$method")" "--config.seed=$seed" "--config.reward.function=$REWARD" \
            "--config.data.path=$data/rl.jsonl" "--config.data.eval_path=$data/test.jsonl" \
            "$normalised" ${words[@]+"${words[@]}"} "--config.run_dir=$run_dir" \
            "--config.model.path=$start"
        evaluate "$run_dir" train "$run_dir/export" rl_selected.jsonl "$normalised" \
            "--config.seed=$seed" "--config.eval.base=$before/statistics.jsonl" \
            ${words[@]+"${words[@]}"}
        evaluate "$run_dir" test "$run_dir/export" test_selected.jsonl "$normalised" \
            "--config.seed=$seed" "--config.eval.base=$before/test.jsonl" \
            ${words[@]+"${words[@]}"}
    done
done
run "${ntkrl[@]}" report "${runs[@]}" "--out=$RUNS/report"
