# Sourced by the scripts beside it: settings, --dry-run and --help, mistakes told together, running
# again, a virtual environment with this package in it.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=launch/env.sh
source launch/env.sh

dry_run=""  # 1: commands are printed, none is run
told=""     # 1: this script was told to end, so nothing is started again
words=()    # the command line without --dry-run
mistakes=()

# Print the comment at the top of the script.
usage() { sed -n '1d; /^#/!q; s/^# \{0,1\}//p' "$0"; }

# Take --dry-run and --help out of the command line, leave the rest in `words`.
read_words() {
    local word
    for word in "$@"; do
        case "$word" in
            --dry-run) dry_run=1 ;;
            -h | --help) usage && exit 0 ;;
            *) words+=("$word") ;;
        esac
    done
}

# Move the first of the words into `verb`.
# shellcheck disable=SC2034
take_verb() {
    verb="${words[0]-}"
    words=(${words[@]+"${words[@]:1}"})
}

say() { echo "$(basename "$0"): $*" >&2; }

# Note as a mistake every setting of the list that is empty, with its comment in env.sh.
need() {
    local name
    for name in "$@"; do
        [ -n "${!name}" ] || mistakes+=("$name is not set ($(sed -n "s/^$name=[^#]*# //p" launch/env.sh))")
    done
}

# Note as a mistake every setting of the list that is no whole number.
need_number() {
    local name
    for name in "$@"; do
        [[ "${!name}" =~ ^[0-9]+$ ]] || mistakes+=("$name=${!name} is no whole number")
    done
}

# Note as a mistake every program of the list that is not installed.
need_program() {
    local name
    for name in "$@"; do
        [ -n "$dry_run" ] || command -v "$name" >/dev/null || mistakes+=("$name is not installed")
    done
}

# Put --config=CONFIG before words that name none; note it as a mistake where there is no CONFIG.
need_config() {
    [[ " ${words[*]-} " == *" --config="* ]] && return
    if [ -n "$CONFIG" ]; then
        words=("--config=$CONFIG" ${words[@]+"${words[@]}"})
    else
        mistakes+=("there is no --config=FILE among the words, and CONFIG is not set")
    fi
}

# End with status 2 and one sentence if there are mistakes.
check() {
    [ ${#mistakes[@]} -gt 0 ] || return 0
    local all
    all="$(printf '; %s' "${mistakes[@]}")"
    say "${all:2}. Settings are in launch/env.sh or the environment; --help says more."
    exit 2
}

# Print words such that a shell reads the same words.
quoted() {
    local word line=""
    for word in "$@"; do
        [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
        line+=" $word"
    done
    printf '%s\n' "${line:1}"
}

# Run a command, or print it.
run() {
    if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}

# Sleep; where this script's group is told something it ends early.
nap() { { sleep "$1" || true; } 2>/dev/null; }

# Run a command, or print it; what tells this script to end is passed on to the command.
pass_on() {
    local pid
    if [ -n "$dry_run" ]; then
        quoted "$@"
        return
    fi
    "$@" &
    pid="$!"
    # shellcheck disable=SC2064
    trap "told=1; kill -TERM $pid 2>/dev/null || true" TERM INT HUP
    while kill -0 "$pid" 2>/dev/null; do nap 0.1; done
    wait "$pid"
}

# Whether a run that ended so can go on: saved and left (75), lost another process (70), killed by a
# signal or cut off (128 and more), but not interrupted from the keyboard (130).
can_go_on() { [ "$1" = 70 ] || [ "$1" = 75 ] || { [ "$1" -ge 128 ] && [ "$1" != 130 ]; }; }

# Print the worse of two statuses: the cause before what followed from it.
worse() {
    local rank_1 rank_2
    rank_1="$(rank "$1")" rank_2="$(rank "$2")"
    if [ "$rank_2" -gt "$rank_1" ]; then echo "$2"; else echo "$1"; fi
}

rank() {
    case "$1" in
        0) echo 0 ;;
        143) echo 1 ;; # ended by SIGTERM, as it was told
        75) echo 2 ;;
        70) echo 3 ;;
        *) echo 4 ;;
    esac
}

# Run a command, and again while it can go on, up to RESTARTS times.
retry() {
    local status until tries=0 pause="$WAIT_SECONDS"
    while true; do
        status=0
        "$@" || status=$?
        if [ -n "$told" ] || [ "$tries" -ge "$RESTARTS" ] || ! can_go_on "$status"; then
            return "$status"
        fi
        tries=$((tries + 1))
        say "status $status: starting again in $pause s ($tries of $RESTARTS)"
        until=$((SECONDS + pause))
        while [ -z "$told" ] && [ "$SECONDS" -lt "$until" ]; do nap 0.2; done
        [ -z "$told" ] || return "$status"
        pause=$((pause * 2 < 600 ? pause * 2 : 600))
    done
}

# Put the program into `ntkrl`: NTKRL, or this checkout in .venv.
# shellcheck disable=SC2034
choose_program() {
    if [ -n "$NTKRL" ]; then
        read -r -a ntkrl <<<"$NTKRL"
    else
        [ -n "$dry_run" ] || prepare "$EXTRA"
        ntkrl=(.venv/bin/python -m ntkrl)
    fi
}

# Create or reuse .venv and install the package with the given extra, when setup.py has changed.
prepare() {
    local extra="$1" python="${PYTHON:-python3}" stamp
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "Python 3.11 or newer is needed, found $("$python" --version 2>&1)." >&2
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
