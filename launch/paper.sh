#!/usr/bin/env bash
# The paper's runs, on this machine: supervised training, statistics of the reward, RLOO, GRPO and
# classifier-first RL from the same start, the evaluation of start and methods on 500 test prompts
# with ten completions each, and the report.
#
# usage: MODEL=DIR DATA=DIR REWARD=DIR bash launch/paper.sh [--dry-run] [--config.section.field=value ...]
#
#   MODEL     the base model: a Hugging Face directory, or its name on the hub
#   DATA      sft.jsonl (prompt, completion), prompts.jsonl and test.jsonl (prompt)
#   REWARD    the reward model
#
# Words of the form --config... go to all three methods' training and to every evaluation on test
# prompts. Runs are in
# RUNS/sft, RUNS/METHOD-SEED and RUNS/report; SEEDS="0 1 2" trains more seeds. Run it again to go on
# where it stopped: finished parts are not repeated. Settings: launch/env.sh, and those of local.sh.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

train() { pass_on env "RESTARTS=$RESTARTS" bash launch/local.sh "$@"; }

# Evaluate a model into the evaluations of a directory, where that has not been done.
evaluate() {
    local directory="$1" name="$2"
    shift 2
    if [ -z "$dry_run" ] && [ -e "$directory/evaluations/$name.json" ]; then
        say "$directory/evaluations/$name.json is there"
        return
    fi
    pass_on "${ntkrl[@]}" evaluate "--config.run_dir=$directory" "$@"
}

read_words "$@"
need MODEL DATA REWARD RUNS SEEDS
for file in sft prompts test; do
    [ -z "$DATA" ] || [ -n "$dry_run" ] || [ -f "$DATA/$file.jsonl" ] ||
        mistakes+=("there is no $DATA/$file.jsonl")
done
for word in ${words[@]+"${words[@]}"}; do
    [[ "$word" == --config.* ]] || mistakes+=("$word does not begin with --config.")
done
need_number RESTARTS
check
choose_program

start="$RUNS/sft/export"
statistics="$RUNS/statistics/evaluations/sft.rewards.json"
prompts=("--config.data.path=$DATA/prompts.jsonl" "--config.reward.function=$REWARD")
final=(--config.eval.prompts=500 --config.eval.samples_per_prompt=10 --config.eval.repeats=1)
test=("--config.data.eval_path=$DATA/test.jsonl" "--config.reward.normalisation=$statistics")

train --config=configs/paper/sft.py "--config.run_dir=$RUNS/sft" "--config.model.path=$MODEL" \
    "--config.data.path=$DATA/sft.jsonl"
# mean and deviation of the reward, of ten completions of 500 training prompts each
evaluate "$RUNS/statistics" sft --config=configs/paper/rl.py "--config.model.path=$start" \
    "${prompts[@]}" "--config.data.eval_path=$DATA/prompts.jsonl" "${final[@]}"
# what the methods start from, on the prompts they are evaluated on
evaluate "$RUNS/sft" sft --config=configs/paper/rl.py "${prompts[@]}" "${test[@]}" "${final[@]}" \
    ${words[@]+"${words[@]}"} "--config.model.path=$start"

runs=()
for seed in $SEEDS; do
    for method in rl grpo cfrl; do
        run_dir="$RUNS/$method-$seed"
        settings=("--config=configs/paper/$method.py" "${prompts[@]}" "${test[@]}")
        settings+=("--config.seed=$seed")
        train "${settings[@]}" ${words[@]+"${words[@]}"} "--config.run_dir=$run_dir" \
            "--config.model.path=$start"
        evaluate "$run_dir" "$method-$seed" "${settings[@]}" "${final[@]}" \
            "--config.eval.base=$RUNS/sft/evaluations/sft.jsonl" ${words[@]+"${words[@]}"} \
            "--config.model.path=$run_dir/export"
        runs+=("$run_dir")
    done
done
run "${ntkrl[@]}" report "${runs[@]}" "--out=$RUNS/report"
