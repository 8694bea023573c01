#!/usr/bin/env bash
# Train on this machine, on its GPUs or its processor.
#
# usage: bash launch/local.sh [--dry-run] --config=FILE [--config.section.field=value ...]
#
# The words are those of `ntkrl train`. PROCESSES=2 starts two processes that train one run together
# and meet on this machine; each has a GPU of its own, where there are GPUs, and its number before
# its lines. When one ends with an error the others are told to end; SIGTERM, Ctrl-C and the loss of
# the terminal are passed on as SIGTERM, so that the run saves. The status is the worst of all.
# RESTARTS=5 starts a run again that can go on (statuses 70 and 75, or killed). Settings:
# launch/env.sh.
set -euo pipefail
: "${RESTARTS:=0}"
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

# Print the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them, one a line.
gpus() {
    if [ "${JAX_PLATFORMS:-}" = cpu ]; then
        return
    elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed '/^ *$/d'
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=index --format=csv,noheader || true
    fi
}

# Put the command of one process into `command`.
compose() {
    local number="$1" port="$2"
    command=("${ntkrl[@]}" train "${words[@]}")
    [ "$PROCESSES" -gt 1 ] || return 0
    local place=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$PROCESSES")
    place+=("JAX_PROCESS_ID=$number")
    if [ ${#devices[@]} -gt 0 ]; then
        place+=("CUDA_VISIBLE_DEVICES=${devices[$number]}")
    else
        place+=(JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo)
    fi
    command=(env "${place[@]}" "${command[@]}")
}

# Send a signal to all processes that still run.
send() {
    local pid
    for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
}

# Start the processes, wait for all, return the worst status.
together() {
    local number port="$PORT" status worst=0 left told_at="" pipes
    [ -n "$port" ] || port="$("${PYTHON:-python3}" -c \
        'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
    pids=() printers=()
    pipes="$(mktemp -d)"
    # in process groups of their own: a signal to this script's whole group reaches them once, by
    # `send`, as a second SIGTERM would end a run before it has saved
    set -m
    for ((number = 0; number < PROCESSES; number++)); do
        compose "$number" "$port"
        if [ "$PROCESSES" -gt 1 ]; then
            mkfifo "$pipes/$number"
            sed -u "s/^/[$number] /" <"$pipes/$number" &
            printers+=("$!")
            "${command[@]}" >"$pipes/$number" 2>&1 &
        else
            "${command[@]}" &
        fi
        pids+=("$!")
    done
    set +m
    while true; do
        left=()
        for pid in "${pids[@]}"; do
            if kill -0 "$pid" 2>/dev/null; then
                left+=("$pid")
                continue
            fi
            status=0
            wait "$pid" || status=$?
            worst="$(worse "$worst" "$status")"
        done
        pids=(${left[@]+"${left[@]}"})
        [ ${#pids[@]} -gt 0 ] || break
        if [ -z "$told_at" ] && { [ -n "$told" ] || [ "$worst" != 0 ]; }; then
            [ -n "$told" ] || say "a process ended with status $worst; the others are told to end"
            told_at="$SECONDS"
            send TERM
        elif [ -n "$told_at" ] && [ $((SECONDS - told_at)) -ge "$GRACE_SECONDS" ]; then
            say "still running $GRACE_SECONDS s after being told to end: killed"
            send KILL
        fi
        nap 0.1
    done
    [ ${#printers[@]} -eq 0 ] || wait "${printers[@]}" || true
    rm -r "$pipes"
    return "$worst"
}

read_words "$@"
need_config
need_number PROCESSES RESTARTS WAIT_SECONDS GRACE_SECONDS
devices=()
while read -r device; do devices+=("$device"); done < <(gpus)
if [ ${#devices[@]} -gt 0 ] && [[ "$PROCESSES" =~ ^[0-9]+$ ]] &&
    [ "$PROCESSES" -gt ${#devices[@]} ]; then
    mistakes+=("PROCESSES=$PROCESSES is more than the ${#devices[@]} GPUs here")
fi
[ "$PROCESSES" != 0 ] || mistakes+=("PROCESSES=0 is less than one")
check
choose_program
if [ -n "$dry_run" ]; then
    for ((number = 0; number < PROCESSES; number++)); do
        compose "$number" "${PORT:-PORT}"
        run "${command[@]}"
    done
    exit 0
fi
trap 'told=1' TERM INT HUP
retry together
