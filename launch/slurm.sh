#!/usr/bin/env bash
# Train on a SLURM cluster, on NODES machines with GPUS_PER_NODE GPUs each.
#
# usage: bash launch/slurm.sh [--dry-run] --config=FILE [--config.section.field=value ...]
#
# The words are those of `ntkrl train`. Outside a job it submits itself with sbatch; within one it
# starts the processes with srun, one per GPU (or one per machine, with TASKS_PER_NODE=1). A run
# that is told to end, GRACE_SECONDS before its time is over, saves and is queued again, up to
# RESTARTS times; so is one that lost a process. One that leaves with 2 is not, and neither is a
# job that was cancelled. Install first, on a machine that shares this directory with the others:
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
    # the signal goes to the processes, not to this script: it sees them leave with 75
    options+=("--signal=TERM@$GRACE_SECONDS" --requeue --open-mode=append "--chdir=$PWD")
    run sbatch "${options[@]}" "--wrap=exec bash launch/slurm.sh $(quoted "${words[@]}")"
}

start() {
    local status=0 devices
    local step=(srun "--ntasks-per-node=$TASKS_PER_NODE" "--cpus-per-task=$CPUS_PER_TASK" --label)
    # when one process has ended the others find out by themselves: they leave with 70
    step+=(--kill-on-bad-exit=0 --wait=600)
    # every process sees all GPUs of its machine, and JAX takes the one of its number there
    if [ "$GPUS_PER_NODE" = 0 ]; then
        export JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
    elif [ "$TASKS_PER_NODE" != "$GPUS_PER_NODE" ]; then
        devices="$(seq -s , 0 $((GPUS_PER_NODE - 1)))"
        export JAX_LOCAL_DEVICE_IDS="$devices"
    fi
    run "${step[@]}" "${ntkrl[@]}" train "${words[@]}" || status=$?
    if [ -n "$told" ]; then
        say "status $status: the job was told to end and is not queued again from here"
    elif can_go_on "$status"; then
        again "$status"
    fi
    return "$status"
}

# Put this job back into the queue.
again() {
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$RESTARTS" ]; then
        say "status $1, and the job was started again $RESTARTS times: it ends here"
    else
        say "status $1: queued again"
        run scontrol requeue "$SLURM_JOB_ID"
    fi
}

read_words "$@"
need RUN_NAME TIME_LIMIT
[ -n "$TASKS_PER_NODE" ] || TASKS_PER_NODE="$GPUS_PER_NODE"
[ "$TASKS_PER_NODE" != 0 ] || TASKS_PER_NODE=1
need_number NODES GPUS_PER_NODE TASKS_PER_NODE CPUS_PER_TASK RESTARTS GRACE_SECONDS
if [ "$GPUS_PER_NODE" != 0 ] && [ "$TASKS_PER_NODE" != 1 ] &&
    [ "$TASKS_PER_NODE" != "$GPUS_PER_NODE" ]; then
    mistakes+=("TASKS_PER_NODE=$TASKS_PER_NODE is neither 1 nor GPUS_PER_NODE=$GPUS_PER_NODE")
fi
need_config
if [ -n "${SLURM_JOB_ID:-}" ]; then need_program srun; else need_program sbatch; fi
if [ -z "$NTKRL" ] && [ -z "$dry_run" ] && ! [ -x .venv/bin/python ]; then
    mistakes+=("there is no .venv here: install first")
fi
check
if [ -n "${SLURM_JOB_ID:-}" ]; then
    ntkrl=(.venv/bin/python -m ntkrl)
    [ -z "$NTKRL" ] || read -r -a ntkrl <<<"$NTKRL"
    # Slurm itself ends the job: cancelled, or taken away and queued again by it
    trap 'told=1' TERM
    start
else
    submit
fi
