#!/usr/bin/env bash
# Install and run the test suite; arguments go to pytest (for example -m slow).
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
case "${1:-}" in -h | --help) usage && exit 0 ;; esac
prepare test
# the tests of a file share fixtures, traces and compiled programs: one worker runs them, in order
exec .venv/bin/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder "$@"
