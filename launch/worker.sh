#!/usr/bin/env bash
# Run on every worker of a TPU VM slice; tpu_vm.sh calls it there.
#
# usage: bash launch/worker.sh install BUCKET [--dry-run]
#        bash launch/worker.sh train RUN_NAME [--dry-run] --config=FILE ...
#
# install mounts the bucket as /bucket and installs this checkout into .venv, with a Python of its
# own, as that of TPU VMs may be too old. train starts this worker's process of the run; what it
# prints is kept in ~/ntkrl.log.
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
        # what another worker wrote is seen at once
        run gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "$1" /bucket
    fi
    run python3 -m pip install --quiet --user uv
    [ -x .venv/bin/python ] || run python3 -m uv venv --quiet --python 3.12 .venv
    run python3 -m uv pip install --quiet --python .venv/bin/python --editable ".[tpu]"
}

# Print a fact about this worker.
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
    # a process that an earlier, lost connection left here holds the TPU: 75, give the slice back
    run flock --nonblock --conflict-exit-code=75 ~/ntkrl.lock \
        env "JAX_COORDINATOR_ADDRESS=${all[0]##*:}:8476" "JAX_NUM_PROCESSES=${#all[@]}" \
        "JAX_PROCESS_ID=$number" .venv/bin/python -m ntkrl train "$@"
}

read_words "$@"
take_verb
name="${words[0]-}"
words=(${words[@]+"${words[@]:1}"})
case "$verb" in
    install) [ -n "$name" ] || mistakes+=("install needs the name of a bucket") ;;
    train)
        [ -n "$name" ] || mistakes+=("train needs the name of the run")
        need_config
        ;;
    *) mistakes+=("the first word is install or train") ;;
esac
check
if [ "$verb" = install ]; then
    install "$name"
elif [ -n "$dry_run" ]; then
    train "--config.run_dir=/bucket/$name" "${words[@]}"
else
    train "--config.run_dir=/bucket/$name" "${words[@]}" 2>&1 | tee ~/ntkrl.log
fi
