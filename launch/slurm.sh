#!/usr/bin/env bash
# Train on a SLURM cluster, on NODES machines with GPUS_PER_NODE GPUs each.
#
# usage: bash launch/slurm.sh [--dry-run] --config=FILE [--config.section.field=value ...]
#
# Arguments are those of `ntkrl train`. Outside a job the script submits itself with sbatch; inside
# one it starts the processes with srun, one per GPU (or one per machine, with TASKS_PER_NODE=1). A
# run is signalled GRACE_SECONDS before its time limit, saves and is requeued, up to RESTARTS times; so
# is one that lost a process. A run that exits with 2 is not requeued, nor is a cancelled job.
# Install first, on a machine that shares this directory with the others:
# python3 -m venv .venv && .venv/bin/pip install --editable ".[cuda]". Settings: launch/env.sh.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

submit() {
    local options=("--job-name=$RUN_NAME" "--nodes=$NODES" "--ntasks-per-node=$TASKS_PER_NODE")
    options+=("--cpus-per-task=$CPUS_PER_TASK" "--time=$TIME_LIMIT")
    [ "$GPUS_PER_NODE" = 0 ] || options+=("--gpus-per-node=$GPUS_PER_NODE")
    [ -z "$PARTITION" ] || options+=("--partition=$PARTITION")
    [ -z "$ACCOUNT" ] || options+=("--account=$ACCOUNT")
    # the signal goes to the processes, not to this script, which sees them exit with 75
    options+=("--signal=TERM@$GRACE_SECONDS" --requeue --open-mode=append "--chdir=$PWD")
    run sbatch "${options[@]}" "--wrap=exec bash launch/slurm.sh $(quoted "${arguments[@]}")"
}

start() {
    local status=0 devices
    local step=(srun "--ntasks-per-node=$TASKS_PER_NODE" "--cpus-per-task=$CPUS_PER_TASK" --label)
    # when a process ends the others detect it and exit with 70
    step+=(--kill-on-bad-exit=0 --wait=600)
    # every process sees all GPUs of its machine; JAX picks one by the local process index
    if [ "$GPUS_PER_NODE" = 0 ]; then
        export JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
    elif [ "$TASKS_PER_NODE" != "$GPUS_PER_NODE" ]; then
        devices="$(seq -s , 0 $((GPUS_PER_NODE - 1)))"
        export JAX_LOCAL_DEVICE_IDS="$devices"
    fi
    run "${step[@]}" "${ntkrl[@]}" train "${arguments[@]}" || status=$?
    if [ -n "$stopping" ]; then
        log "status $status: the job was signalled to end and is not requeued by this script"
    elif resumable "$status"; then
        requeue "$status"
    fi
    return "$status"
}

# Requeue this job.
requeue() {
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$RESTARTS" ]; then
        log "status $1, and the job was restarted $RESTARTS times: not requeued"
    else
        log "status $1: requeued"
        run scontrol requeue "$SLURM_JOB_ID"
    fi
}

read_arguments "$@"
require RUN_NAME TIME_LIMIT
[ -n "$TASKS_PER_NODE" ] || TASKS_PER_NODE="$GPUS_PER_NODE"
[ "$TASKS_PER_NODE" != 0 ] || TASKS_PER_NODE=1
require_number NODES GPUS_PER_NODE TASKS_PER_NODE CPUS_PER_TASK RESTARTS GRACE_SECONDS
if [ "$GPUS_PER_NODE" != 0 ] && [ "$TASKS_PER_NODE" != 1 ] &&
    [ "$TASKS_PER_NODE" != "$GPUS_PER_NODE" ]; then
    mistakes+=("TASKS_PER_NODE=$TASKS_PER_NODE is neither 1 nor GPUS_PER_NODE=$GPUS_PER_NODE")
fi
require_config
if [ -n "${SLURM_JOB_ID:-}" ]; then require_program srun; else require_program sbatch; fi
if [ -z "$NTKRL" ] && [ -z "$dry_run" ] && ! [ -x .venv/bin/python ]; then
    mistakes+=("there is no .venv in this directory: install first")
fi
check_mistakes
if [ -n "${SLURM_JOB_ID:-}" ]; then
    ntkrl=(.venv/bin/python -m ntkrl)
    [ -z "$NTKRL" ] || read -r -a ntkrl <<<"$NTKRL"
    # Slurm ends the job: cancelled, or preempted and requeued by Slurm
    trap 'stopping=1' TERM
    start
else
    submit
fi
