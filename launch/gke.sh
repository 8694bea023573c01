#!/usr/bin/env bash
# Train on a TPU slice of a GKE cluster, as a JobSet.
#
# usage: bash launch/gke.sh COMMAND [--dry-run] [--config=FILE --config.section.field=value ...]
#
#   image     build and push the image IMAGE of this checkout
#   run       start the run by launch/jobset.yaml and kubectl: the words are those of `ntkrl train`
#   xpk       start it by xpk instead, on the slice ACCELERATOR of the cluster CLUSTER
#   state     of the run: restarts so far, Completed or Failed
#   logs      what the pods print
#   delete    end the run
#
# The run is in /bucket/RUN_NAME, which all pods share. A run that leaves with 75 or 70, or is
# killed, is started again by the cluster, up to RESTARTS times; one that leaves with 2 is not.
# Settings: launch/env.sh.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

# Print words as a list in JSON, without its brackets.
listed() {
    local word line=""
    for word in "$@"; do
        word="${word//\\/\\\\}"
        line+=", \"${word//\"/\\\"}\""
    done
    printf '%s\n' "${line:2}"
}

# Note as a mistake a topology that is none, or that whole hosts do not make up.
need_hosts() {
    if ! [[ "$TOPOLOGY" =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ && "$CHIPS_PER_HOST" =~ ^[1-9]$ ]]; then
        mistakes+=("TOPOLOGY=$TOPOLOGY CHIPS_PER_HOST=$CHIPS_PER_HOST is not like 4x4 and 4")
    elif [ $((${TOPOLOGY//x/*} % CHIPS_PER_HOST)) != 0 ]; then
        mistakes+=("the chips of TOPOLOGY=$TOPOLOGY are no multiple of CHIPS_PER_HOST=$CHIPS_PER_HOST")
    fi
}

# Print the manifest of the run.
# shellcheck disable=SC2034
manifest() {
    local text name HOSTS="$((${TOPOLOGY//x/*} / CHIPS_PER_HOST))" COMMAND
    COMMAND="$(listed python -m ntkrl train "${words[@]}")"
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

# xpk restarts at statuses 42 and 127 to 255 by itself.
by_xpk() {
    run xpk workload create "--workload=$RUN_NAME" "--cluster=$CLUSTER" \
        "--project=$PROJECT" "--zone=$ZONE" "--tpu-type=$ACCELERATOR" "--docker-image=$IMAGE" \
        "--max-restarts=$RESTARTS" --restart-on-exit-codes=70,75 \
        "--termination-grace-period-seconds=$GRACE_SECONDS" "--storage=$STORAGE" \
        "--command=exec $(quoted python -m ntkrl train "${words[@]}")"
}

read_words "$@"
take_verb
need RUN_NAME
case "$verb" in
    image)
        need IMAGE
        need_program docker
        ;;
    run)
        need IMAGE BUCKET NODES_OF SERVICE_ACCOUNT
        need_number RESTARTS GRACE_SECONDS
        need_hosts
        need_program kubectl
        need_config
        ;;
    xpk)
        need IMAGE CLUSTER PROJECT ZONE ACCELERATOR STORAGE
        need_number RESTARTS GRACE_SECONDS
        need_program xpk
        need_config
        ;;
    state | logs | delete) need_program kubectl ;;
    *) mistakes+=("the first word is image, run, xpk, state, logs or delete") ;;
esac
check
words=("--config.run_dir=/bucket/$RUN_NAME" ${words[@]+"${words[@]}"})
case "$verb" in
    image)
        run docker build --file launch/Dockerfile --tag "$IMAGE" .
        run docker push "$IMAGE"
        ;;
    run) apply ;;
    xpk) by_xpk ;;
    state) run kubectl get jobset "$RUN_NAME" ;;
    logs)
        run kubectl logs --follow --prefix --container=ntkrl --max-log-requests=256 \
            "--selector=jobset.sigs.k8s.io/jobset-name=$RUN_NAME"
        ;;
    delete) run kubectl delete jobset "$RUN_NAME" ;;
esac
