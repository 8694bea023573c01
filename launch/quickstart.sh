#!/usr/bin/env bash
# Train a small base model, then RL and classifier-first RL from it, and write the report.
# Run it again to resume; finished parts are skipped. --dry-run prints the commands; SEEDS="0 1 2"
# trains more seeds.
set -euo pipefail
: "${SEEDS:=0 1}"
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
read_arguments "$@"
refuse_arguments
require_seeds
check_mistakes
[ -n "$dry_run" ] || prepare ""

runs=runs/quickstart

ntkrl() { run .venv/bin/python -m ntkrl "$@"; }

parts=2 number=0
for seed in $SEEDS; do parts=$((parts + 2)); done
# Print the number and the name of the part that begins.
part() {
    number=$((number + 1))
    [ -n "$dry_run" ] || echo "[$number/$parts] $1"
}

part "a base model, by supervised training"
ntkrl train --config=quickstart/base
directories=()
for seed in $SEEDS; do
    for method in rl cfrl; do
        directories+=("$runs/$method-$seed")
        part "$method, seed $seed"
        ntkrl train "--config=quickstart/$method" "--seed=$seed" "--run_dir=$runs/$method-$seed"
    done
done
part "the report"
ntkrl report "${directories[@]}" "--out=$runs/report"
