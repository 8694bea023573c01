#!/usr/bin/env bash
# Train on a TPU slice of a GKE cluster, as a JobSet.
#
# usage: bash launch/gke.sh COMMAND [--dry-run] [--config=FILE --config.section.field=value ...]
#
#   image     build and push the image IMAGE of this checkout
#   run       start the run with launch/jobset.yaml and kubectl; arguments are those of `ntkrl train`
#   xpk       start it with xpk, on the slice ACCELERATOR of the cluster CLUSTER
#   state     print the state of the run: restarts so far, Completed or Failed
#   logs      follow the output of the pods
#   delete    end the run
#
# The run directory is /bucket/RUN_NAME, shared by all pods. The cluster restarts a run that exits
# with 75 or 70 or is killed, up to RESTARTS times, but not one that exits with 2.
# Settings: launch/env.sh.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

# Print arguments as the elements of a JSON list.
json_list() {
    local argument line=""
    for argument in "$@"; do
        argument="${argument//\\/\\\\}"
        line+=", \"${argument//\"/\\\"}\""
    done
    printf '%s\n' "${line:2}"
}

# Add to `mistakes` an invalid topology, or one that is not a multiple of whole hosts.
require_hosts() {
    if ! [[ "$TOPOLOGY" =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ && "$CHIPS_PER_HOST" =~ ^[1-9]$ ]]; then
        mistakes+=("TOPOLOGY=$TOPOLOGY CHIPS_PER_HOST=$CHIPS_PER_HOST is not of the form 4x4 and 4")
    elif [ $((${TOPOLOGY//x/*} % CHIPS_PER_HOST)) != 0 ]; then
        mistakes+=("the chips of TOPOLOGY=$TOPOLOGY are not a multiple of CHIPS_PER_HOST=$CHIPS_PER_HOST")
    fi
}

# Print the manifest of the run.
# shellcheck disable=SC2034
manifest() {
    local text name HOSTS="$((${TOPOLOGY//x/*} / CHIPS_PER_HOST))" COMMAND
    COMMAND="$(json_list python -m ntkrl train "${arguments[@]}")"
    text="$(<launch/jobset.yaml)"
    for name in RUN_NAME RESTARTS HOSTS SERVICE_ACCOUNT GRACE_SECONDS NODES_OF TOPOLOGY IMAGE \
        COMMAND CHIPS_PER_HOST BUCKET; do
        text="${text//"\${$name}"/"${!name}"}"
    done
    printf '%s\n' "$text"
}

apply() {
    if [ -n "$dry_run" ]; then
        quoted kubectl apply -f -
        manifest
    else
        manifest | kubectl apply -f -
    fi
}

# xpk itself restarts on statuses 42 and 127 to 255.
submit_xpk() {
    run xpk workload create "--workload=$RUN_NAME" "--cluster=$CLUSTER" \
        "--project=$PROJECT" "--zone=$ZONE" "--tpu-type=$ACCELERATOR" "--docker-image=$IMAGE" \
        "--max-restarts=$RESTARTS" --restart-on-exit-codes=70,75 \
        "--termination-grace-period-seconds=$GRACE_SECONDS" "--storage=$STORAGE" \
        "--command=exec $(quoted python -m ntkrl train "${arguments[@]}")"
}

read_arguments "$@"
take_action
require RUN_NAME
case "$action" in
    image)
        require IMAGE
        require_program docker
        ;;
    run)
        require IMAGE BUCKET NODES_OF SERVICE_ACCOUNT
        require_number RESTARTS GRACE_SECONDS
        require_hosts
        require_program kubectl
        require_config
        ;;
    xpk)
        require IMAGE CLUSTER PROJECT ZONE ACCELERATOR STORAGE
        require_number RESTARTS GRACE_SECONDS
        require_program xpk
        require_config
        ;;
    state | logs | delete) require_program kubectl ;;
    *) mistakes+=("the first argument must be image, run, xpk, state, logs or delete") ;;
esac
check_mistakes
arguments=("--config.run_dir=/bucket/$RUN_NAME" ${arguments[@]+"${arguments[@]}"})
case "$action" in
    image)
        run docker build --file launch/Dockerfile --tag "$IMAGE" .
        run docker push "$IMAGE"
        ;;
    run) apply ;;
    xpk) submit_xpk ;;
    state) run kubectl get jobset "$RUN_NAME" ;;
    logs)
        run kubectl logs --follow --prefix --container=ntkrl --max-log-requests=256 \
            "--selector=jobset.sigs.k8s.io/jobset-name=$RUN_NAME"
        ;;
    delete) run kubectl delete jobset "$RUN_NAME" ;;
esac
