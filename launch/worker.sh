#!/usr/bin/env bash
# Run on every worker of a TPU VM slice; called by tpu_vm.sh.
#
# usage: bash launch/worker.sh install BUCKET [--dry-run]
#        bash launch/worker.sh train RUN_NAME [--dry-run] --config=FILE ...
#
# install mounts the bucket as /bucket and installs this checkout into .venv with its own Python,
# since that of TPU VMs may be too old. train starts this worker's process of the run and copies its
# output to ~/ntkrl.log.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

install() {
    local line packages=https://packages.cloud.google.com/apt
    local list=/etc/apt/sources.list.d/gcsfuse.list
    local key=/usr/share/keyrings/cloud.google.asc
    if ! command -v gcsfuse >/dev/null; then
        run sudo curl -fsS -o "$key" "$packages/doc/apt-key.gpg"
        line="deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main"
        run sudo bash -c "echo '$line' >$list"
        run sudo apt-get update --quiet
        run sudo apt-get install --quiet --yes gcsfuse
    fi
    if ! mountpoint -q /bucket; then
        run sudo mkdir -p /bucket
        run sudo chown "$(id -u)" /bucket
        # no metadata cache: files of other workers are visible at once
        run gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "$1" /bucket
    fi
    run python3 -m pip install --quiet --user uv
    [ -x .venv/bin/python ] || run python3 -m uv venv --quiet --python 3.12 .venv
    run python3 -m uv pip install --quiet --python .venv/bin/python --editable ".[tpu]"
}

# Print a metadata attribute of this worker.
metadata() {
    curl -fsS -H "Metadata-Flavor: Google" \
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

train() {
    local endpoints=HOST number=NUMBER all
    if [ -z "$dry_run" ]; then
        endpoints="$(metadata worker-network-endpoints)" # host,host or name:id:address,...
        number="$(metadata agent-worker-number)"
    fi
    IFS=, read -r -a all <<<"$endpoints"
    # status 75 releases the slice if a process of an earlier, lost connection still uses the TPU
    run flock --nonblock --conflict-exit-code=75 ~/ntkrl.lock \
        env "JAX_COORDINATOR_ADDRESS=${all[0]##*:}:8476" "JAX_NUM_PROCESSES=${#all[@]}" \
        "JAX_PROCESS_ID=$number" .venv/bin/python -m ntkrl train "$@"
}

read_arguments "$@"
take_action
name="${arguments[0]-}"
arguments=(${arguments[@]+"${arguments[@]:1}"})
case "$action" in
    install) [ -n "$name" ] || mistakes+=("install requires the name of a bucket") ;;
    train)
        [ -n "$name" ] || mistakes+=("train requires the name of the run")
        require_config
        ;;
    *) mistakes+=("the first argument must be install or train") ;;
esac
check_mistakes
if [ "$action" = install ]; then
    install "$name"
elif [ -n "$dry_run" ]; then
    train "--config.run_dir=/bucket/$name" "${arguments[@]}"
else
    train "--config.run_dir=/bucket/$name" "${arguments[@]}" 2>&1 | tee ~/ntkrl.log
fi
