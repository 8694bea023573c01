# Sourced by the other scripts: settings, --dry-run and --help, error reporting, restarts, and the
# virtual environment with this package.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=launch/env.sh
source launch/env.sh

dry_run=""   # 1: print commands instead of running them
stopping=""  # 1: this script received a signal to end and starts nothing more
arguments=() # the command line without --dry-run
mistakes=()

# Print the comment at the top of the script.
usage() { sed -n '1d; /^#/!q; s/^# \{0,1\}//p' "$0"; }

# Parse --dry-run and --help; the other arguments go to `arguments`.
read_arguments() {
    local argument
    for argument in "$@"; do
        case "$argument" in
            --dry-run) dry_run=1 ;;
            -h | --help) usage && exit 0 ;;
            *) arguments+=("$argument") ;;
        esac
    done
}

# Move the first argument to `action`.
# shellcheck disable=SC2034
take_action() {
    action="${arguments[0]-}"
    arguments=(${arguments[@]+"${arguments[@]:1}"})
}

log() { echo "$(basename "$0"): $*" >&2; }

# Add to `mistakes` every listed setting that is empty, with its comment in env.sh.
require() {
    local name
    for name in "$@"; do
        [ -n "${!name}" ] || mistakes+=("$name is not set ($(sed -n "s/^$name=[^#]*# //p" launch/env.sh))")
    done
}

# Add to `mistakes` every listed setting that is not a whole number.
require_number() {
    local name
    for name in "$@"; do
        [[ "${!name}" =~ ^[0-9]+$ ]] || mistakes+=("$name=${!name} is not a whole number")
    done
}

# Add to `mistakes` an argument, of a script that takes none.
refuse_arguments() {
    [ ${#arguments[@]} -eq 0 ] || mistakes+=("${arguments[*]} is not an argument of this script")
}

# Add to `mistakes` seeds that are not whole numbers.
require_seeds() {
    local seed
    for seed in $SEEDS; do
        [[ "$seed" =~ ^[0-9]+$ ]] || mistakes+=("SEEDS=$SEEDS has $seed, which is not a whole number")
    done
}

# Add to `mistakes` every listed program that is not installed.
require_program() {
    local name
    for name in "$@"; do
        [ -n "$dry_run" ] || command -v "$name" >/dev/null || mistakes+=("$name is not installed")
    done
}

# Prepend --config=CONFIG if the arguments have no --config; without CONFIG that is a mistake.
require_config() {
    [[ " ${arguments[*]-} " == *" --config="* ]] && return
    if [ -n "$CONFIG" ]; then
        arguments=("--config=$CONFIG" ${arguments[@]+"${arguments[@]}"})
    else
        mistakes+=("no --config=FILE in the arguments, and CONFIG is not set")
    fi
}

# Exit with status 2 and one message if there are mistakes.
check_mistakes() {
    [ ${#mistakes[@]} -gt 0 ] || return 0
    local all
    all="$(printf '; %s' "${mistakes[@]}")"
    log "${all:2}. Settings are in launch/env.sh or the environment; see also --help."
    exit 2
}

# Print arguments quoted for a shell.
quoted() {
    local argument line=""
    for argument in "$@"; do
        [[ "$argument" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || argument="'${argument//\'/\'\\\'\'}'"
        line+=" $argument"
    done
    printf '%s\n' "${line:1}"
}

# Run a command, or print it.
run() {
    if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}

# Sleep; a signal to the process group ends it early.
brief_sleep() { { sleep "$1" || true; } 2>/dev/null; }

# Run a command, or print it; signals to end this script are forwarded to the command as SIGTERM.
forward_signals() {
    local pid
    if [ -n "$dry_run" ]; then
        quoted "$@"
        return
    fi
    "$@" &
    pid="$!"
    # shellcheck disable=SC2064
    trap "stopping=1; kill -TERM $pid 2>/dev/null || true" TERM INT HUP
    while kill -0 "$pid" 2>/dev/null; do brief_sleep 0.1; done
    wait "$pid"
}

# Return whether a run with this exit status can resume: preempted and saved (75), another process
# lost (70), killed by a signal or disconnected (128 and more), but not interrupted by Ctrl-C (130).
resumable() { [ "$1" = 70 ] || [ "$1" = 75 ] || { [ "$1" -ge 128 ] && [ "$1" != 130 ]; }; }

# Print the worse of two exit statuses: causes rank above their consequences.
worse() {
    local rank_1 rank_2
    rank_1="$(rank "$1")" rank_2="$(rank "$2")"
    if [ "$rank_2" -gt "$rank_1" ]; then echo "$2"; else echo "$1"; fi
}

rank() {
    case "$1" in
        0) echo 0 ;;
        143) echo 1 ;; # ended by a SIGTERM that was sent to it
        75) echo 2 ;;
        70) echo 3 ;;
        *) echo 4 ;;
    esac
}

# Run a command; restart it up to RESTARTS times while it can resume.
retry() {
    local status until tries=0 pause="$WAIT_SECONDS"
    while true; do
        status=0
        "$@" || status=$?
        if [ -n "$stopping" ] || [ "$tries" -ge "$RESTARTS" ] || ! resumable "$status"; then
            return "$status"
        fi
        tries=$((tries + 1))
        log "status $status: starting again in $pause s ($tries of $RESTARTS)"
        until=$((SECONDS + pause))
        while [ -z "$stopping" ] && [ "$SECONDS" -lt "$until" ]; do brief_sleep 0.2; done
        [ -z "$stopping" ] || return "$status"
        pause=$((pause * 2 < 600 ? pause * 2 : 600))
    done
}

# Set `ntkrl`, the program, to NTKRL or this checkout in .venv, and `python` to its Python.
# shellcheck disable=SC2034
choose_program() {
    if [ -n "$NTKRL" ]; then
        read -r -a ntkrl <<<"$NTKRL"
        python="${PYTHON:-python3}"
    else
        [ -n "$dry_run" ] || prepare "$EXTRA"
        ntkrl=(.venv/bin/python -m ntkrl)
        python=.venv/bin/python
    fi
}

# Create or reuse .venv; install the package with an extra if setup.py has changed.
prepare() {
    local extra="$1" python="${PYTHON:-python3}" stamp
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "Python 3.11 or newer is required, this is $("$python" --version 2>&1)." >&2
        echo "Set PYTHON to a newer one, for example PYTHON=python3.12 bash $0" >&2
        exit 2
    fi
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    stamp=".venv/.installed-${extra:-plain}-$(cksum <setup.py | cut -d' ' -f1)"
    if [ ! -e "$stamp" ]; then
        echo "installing into .venv (a few minutes the first time) ..."
        .venv/bin/python -m pip install --quiet --editable ".${extra:+[$extra]}"
        touch "$stamp"
    fi
}
