#!/usr/bin/env bash
# Train a small base model, then RL and classifier-first RL from it, and write the report.
# Run it again to resume; finished parts are skipped. --dry-run prints the commands; SEEDS="0 1 2"
# trains more seeds.
set -euo pipefail
: "${SEEDS:=0 1}"
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
read_arguments "$@"
[ -n "$dry_run" ] || prepare ""

runs=runs/quickstart

ntkrl() { run .venv/bin/python -m ntkrl "$@"; }

ntkrl train --config=configs/quickstart/base.py
directories=()
for seed in $SEEDS; do
    for method in rl cfrl; do
        directories+=("$runs/$method-$seed")
        ntkrl train "--config=configs/quickstart/$method.py" \
            "--config.seed=$seed" "--config.run_dir=$runs/$method-$seed"
    done
done
ntkrl report "${directories[@]}" "--out=$runs/report"
