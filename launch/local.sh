#!/usr/bin/env bash
# Train on this machine, on its GPUs or its CPU.
#
# usage: bash launch/local.sh [--dry-run] --config=FILE [--config.section.field=value ...]
#
# Arguments are those of `ntkrl train`. PROCESSES=2 trains one run in two processes; each uses one GPU,
# if there are GPUs, and its output lines are prefixed with its number. If one fails, the others get
# SIGTERM; SIGTERM, Ctrl-C and a lost terminal are forwarded as SIGTERM, so that the run saves.
# The exit status is the worst of all. RESTARTS=5 restarts a run that can resume (status 70, 75, or
# killed). Settings: launch/env.sh.
set -euo pipefail
: "${RESTARTS:=0}"
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

# Print the visible GPUs, as in CUDA_VISIBLE_DEVICES, one per line.
gpus() {
    if [ "${JAX_PLATFORMS:-}" = cpu ]; then
        return
    elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed '/^ *$/d'
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=index --format=csv,noheader || true
    fi
}

# Set `command` to the command of one process.
compose() {
    local number="$1" port="$2"
    command=("${ntkrl[@]}" train "${arguments[@]}")
    [ "$PROCESSES" -gt 1 ] || return 0
    local coordinator=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$PROCESSES")
    coordinator+=("JAX_PROCESS_ID=$number")
    if [ ${#devices[@]} -gt 0 ]; then
        coordinator+=("CUDA_VISIBLE_DEVICES=${devices[$number]}")
    else
        coordinator+=(JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo)
    fi
    command=(env "${coordinator[@]}" "${command[@]}")
}

# Send a signal to all running processes.
send() {
    local pid
    for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
}

# Start the processes, wait for all, return the worst exit status.
run_processes() {
    local number port="$PORT" status worst=0 left stopped_at="" pipes
    [ -n "$port" ] || port="$("${PYTHON:-python3}" -c \
        'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
    pids=() printers=()
    pipes="$(mktemp -d)"
    # separate process groups: a signal to this script's group reaches them only once, by `send`,
    # since a second SIGTERM would end a run before it has saved
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
        if [ -z "$stopped_at" ] && { [ -n "$stopping" ] || [ "$worst" != 0 ]; }; then
            [ -n "$stopping" ] || log "a process ended with status $worst; the others get SIGTERM"
            stopped_at="$SECONDS"
            send TERM
        elif [ -n "$stopped_at" ] && [ $((SECONDS - stopped_at)) -ge "$GRACE_SECONDS" ]; then
            log "still running $GRACE_SECONDS s after SIGTERM: killed"
            send KILL
        fi
        brief_sleep 0.1
    done
    [ ${#printers[@]} -eq 0 ] || wait "${printers[@]}" || true
    rm -r "$pipes"
    return "$worst"
}

read_arguments "$@"
require_config
require_number PROCESSES RESTARTS WAIT_SECONDS GRACE_SECONDS
devices=()
while read -r device; do devices+=("$device"); done < <(gpus)
if [ ${#devices[@]} -gt 0 ] && [[ "$PROCESSES" =~ ^[0-9]+$ ]] &&
    [ "$PROCESSES" -gt ${#devices[@]} ]; then
    mistakes+=("PROCESSES=$PROCESSES is more than the ${#devices[@]} GPUs here")
fi
[ "$PROCESSES" != 0 ] || mistakes+=("PROCESSES=0 is less than one")
check_mistakes
choose_program
if [ -n "$dry_run" ]; then
    for ((number = 0; number < PROCESSES; number++)); do
        compose "$number" "${PORT:-PORT}"
        run "${command[@]}"
    done
    exit 0
fi
trap 'stopping=1' TERM INT HUP
retry run_processes
