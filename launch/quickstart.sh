#!/usr/bin/env bash
# Make a small base model, train RL and classifier-first RL from it, and write the report.
# Run it again to go on where it stopped; finished parts are not repeated. --dry-run prints what it
# would run; SEEDS="0 1 2" trains more seeds.
set -euo pipefail
: "${SEEDS:=0 1}"
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
read_words "$@"
[ -n "$dry_run" ] || prepare ""

runs=runs/quickstart
# compiled programs are kept, so that the four runs compile once
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/$runs/compiled}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

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
