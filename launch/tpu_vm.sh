#!/usr/bin/env bash
# Train on a Cloud TPU slice of TPU VMs, requested as a queued resource.
#
# usage: bash launch/tpu_vm.sh COMMAND [--dry-run] [--config=FILE --config.section.field=value ...]
#
#   create    request the slice and wait until it is active
#   install   copy this checkout to every worker and install it there
#   run       train on every worker; arguments are those of `ntkrl train`
#   loop      all three; if the slice is preempted or the run exits with 75 or 70, delete the slice
#             and start over, up to RESTARTS times; release the slice when the run ends
#   state     print the state of the request: WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED, ...
#   logs      print the last output lines of every worker
#   delete    release the slice
#
# The run directory is /bucket/RUN_NAME, shared by all workers. Settings: launch/env.sh.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

location=("--project=$PROJECT" "--zone=$ZONE")

create() {
    run gcloud compute tpus queued-resources create "$RUN_NAME" "--node-id=$RUN_NAME" \
        "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME" ${SPOT:+--spot} \
        "${location[@]}" && await
}

# Print the state of the request; nothing if there is no request.
state() {
    run gcloud compute tpus queued-resources describe "$RUN_NAME" "${location[@]}" \
        "--format=value(state.state)"
}

# Wait until the slice is active; return 75 if this request has failed.
await() {
    local now before=""
    while [ -z "$dry_run" ]; do
        now="$(state)" || return 75
        [ "$now" = "$before" ] || log "$RUN_NAME is $now"
        before="$now"
        case "$now" in
            ACTIVE) return 0 ;;
            FAILED | SUSPENDING | SUSPENDED | DELETING) return 75 ;;
        esac
        sleep "$POLL_SECONDS"
    done
    state
}

# Run a command on every worker; return the worst status that a worker reported, 255 if a connection
# was lost. The exit status of gcloud does not give those of several workers.
on_workers() {
    local output status worst=0 lost=0
    local ssh=(gcloud compute tpus tpu-vm ssh "$RUN_NAME" "${location[@]}" --worker=all)
    ssh+=("--ssh-flag=-o ServerAliveInterval=30")
    ssh+=("--command=$1; echo \"a worker ended with status \$?\"")
    if [ -n "$dry_run" ]; then
        run "${ssh[@]}"
        return
    fi
    output="$(mktemp)"
    "${ssh[@]}" 2>&1 | tee "$output" || lost=255
    while read -r status; do
        worst="$(worse "$worst" "$status")"
    done < <(sed -n 's/.*a worker ended with status \([0-9][0-9]*\).*/\1/p' "$output")
    rm "$output"
    [ "$worst" != 0 ] || worst="$lost"
    return "$worst"
}

install() {
    local archive="${TMPDIR:-/tmp}/ntkrl.tar.gz"
    run tar --exclude=./.git --exclude=./.venv --exclude=./runs -czf "$archive" . &&
        run gcloud compute tpus tpu-vm scp "$archive" "$RUN_NAME:" "${location[@]}" --worker=all &&
        on_workers "mkdir -p ntkrl && tar -xzf ntkrl.tar.gz -C ntkrl &&
$(quoted bash ntkrl/launch/worker.sh install "$BUCKET")"
}

train() { on_workers "$(quoted bash ntkrl/launch/worker.sh train "$RUN_NAME" "${arguments[@]}")"; }

delete() {
    run gcloud compute tpus queued-resources delete "$RUN_NAME" "${location[@]}" --force --quiet
}

# Use the active slice, or request one.
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

# One iteration of the loop; it releases the slice when the run is finished or must be restarted.
attempt() {
    local status=0
    ensure && install && train || status=$?
    if [ "$status" = 0 ] || resumable "$status"; then delete || true; fi
    return "$status"
}

read_arguments "$@"
take_action
case "$action" in
    create) require ACCELERATOR RUNTIME && require_number POLL_SECONDS ;;
    install) require BUCKET ;;
    run) require_config ;;
    loop)
        require BUCKET ACCELERATOR RUNTIME
        require_number RESTARTS WAIT_SECONDS POLL_SECONDS
        require_config
        ;;
    state | logs | delete) ;;
    *) mistakes+=("the first argument must be create, install, run, loop, state, logs or delete") ;;
esac
require PROJECT ZONE RUN_NAME
require_program gcloud
check_mistakes
case "$action" in
    run) train ;;
    loop) retry attempt ;;
    logs) on_workers "tail -n 50 ntkrl.log" ;;
    *) "$action" ;;
esac
