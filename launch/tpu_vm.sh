#!/usr/bin/env bash
# Train on a Cloud TPU slice of TPU VMs, asked for as a queued resource.
#
# usage: bash launch/tpu_vm.sh COMMAND [--dry-run] [--config=FILE --config.section.field=value ...]
#
#   create    ask for the slice and wait until it is there
#   install   copy this checkout to every worker and install it there
#   run       train on every worker: the words are those of `ntkrl train`
#   loop      all three; where the slice is taken away or the run leaves with 75 or 70, delete it and
#             begin again, up to RESTARTS times; at the run's end give the slice back
#   state     of the request: WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED, ...
#   logs      the last lines that every worker printed
#   delete    give the slice back
#
# The run is in /bucket/RUN_NAME, which all workers share. Settings: launch/env.sh.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

place=("--project=$PROJECT" "--zone=$ZONE")

create() {
    run gcloud compute tpus queued-resources create "$RUN_NAME" "--node-id=$RUN_NAME" \
        "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME" ${SPOT:+--spot} \
        "${place[@]}" && await
}

# Print the state of the request; nothing where there is no request.
state() {
    run gcloud compute tpus queued-resources describe "$RUN_NAME" "${place[@]}" \
        "--format=value(state.state)"
}

# Wait until the slice is there; 75 where this request will not be filled any more.
await() {
    local now before=""
    while [ -z "$dry_run" ]; do
        now="$(state)" || return 75
        [ "$now" = "$before" ] || say "$RUN_NAME is $now"
        before="$now"
        case "$now" in
            ACTIVE) return 0 ;;
            FAILED | SUSPENDING | SUSPENDED | DELETING) return 75 ;;
        esac
        sleep "$POLL_SECONDS"
    done
    state
}

# Run a command on every worker; return the worst status that a worker told, 255 where the
# connection was lost. What gcloud returns for several workers does not say which status they had.
on_workers() {
    local heard status worst=0 lost=0
    local ssh=(gcloud compute tpus tpu-vm ssh "$RUN_NAME" "${place[@]}" --worker=all)
    ssh+=("--ssh-flag=-o ServerAliveInterval=30")
    ssh+=("--command=$1; echo \"a worker ended with status \$?\"")
    if [ -n "$dry_run" ]; then
        run "${ssh[@]}"
        return
    fi
    heard="$(mktemp)"
    "${ssh[@]}" 2>&1 | tee "$heard" || lost=255
    while read -r status; do
        worst="$(worse "$worst" "$status")"
    done < <(sed -n 's/.*a worker ended with status \([0-9][0-9]*\).*/\1/p' "$heard")
    rm "$heard"
    [ "$worst" != 0 ] || worst="$lost"
    return "$worst"
}

install() {
    local archive="${TMPDIR:-/tmp}/ntkrl.tar.gz"
    run tar --exclude=./.git --exclude=./.venv --exclude=./runs -czf "$archive" . &&
        run gcloud compute tpus tpu-vm scp "$archive" "$RUN_NAME:" "${place[@]}" --worker=all &&
        on_workers "mkdir -p ntkrl && tar -xzf ntkrl.tar.gz -C ntkrl &&
$(quoted bash ntkrl/launch/worker.sh install "$BUCKET")"
}

train() { on_workers "$(quoted bash ntkrl/launch/worker.sh train "$RUN_NAME" "${words[@]}")"; }

delete() {
    run gcloud compute tpus queued-resources delete "$RUN_NAME" "${place[@]}" --force --quiet
}

# Take the slice that is there, or ask for one.
ensure() {
    local now=""
    if [ -n "$dry_run" ]; then state; else now="$(state 2>/dev/null)" || now=""; fi
    case "$now" in
        ACTIVE) ;;
        "") create ;;
        ACCEPTED | CREATING | PROVISIONING | WAITING_FOR_RESOURCES) await ;;
        *) delete && create ;;
    esac
}

# One turn of the loop: a slice on which a run can not go on any more is given back.
attempt() {
    local status=0
    ensure && install && train || status=$?
    if [ "$status" = 0 ] || can_go_on "$status"; then delete || true; fi
    return "$status"
}

read_words "$@"
take_verb
case "$verb" in
    create) need ACCELERATOR RUNTIME && need_number POLL_SECONDS ;;
    install) need BUCKET ;;
    run) need_config ;;
    loop)
        need BUCKET ACCELERATOR RUNTIME
        need_number RESTARTS WAIT_SECONDS POLL_SECONDS
        need_config
        ;;
    state | logs | delete) ;;
    *) mistakes+=("the first word is create, install, run, loop, state, logs or delete") ;;
esac
need PROJECT ZONE RUN_NAME
need_program gcloud
check
case "$verb" in
    run) train ;;
    loop) retry attempt ;;
    logs) on_workers "tail -n 50 ntkrl.log" ;;
    *) "$verb" ;;
esac
