# Settings of the launch scripts and their defaults. Environment variables take precedence:
# PROJECT=mine ZONE=us-west4-a bash launch/tpu_vm.sh create
# shellcheck shell=bash disable=SC2034

# every run
RUN_NAME="${RUN_NAME:-ntkrl}"             # name of the slice, workload or job: lower case, digits, hyphens
CONFIG="${CONFIG:-}"                      # config file if the arguments have no --config=FILE
RESTARTS="${RESTARTS:-20}"                # number of times a run that can resume is restarted
WAIT_SECONDS="${WAIT_SECONDS:-10}"        # before the first restart; doubles each time, up to 600
GRACE_SECONDS="${GRACE_SECONDS:-120}"     # time for a run to save and exit after a signal to end

# this machine (local.sh, paper.sh)
NTKRL="${NTKRL:-}"                        # the program; empty: this checkout, installed into .venv
EXTRA="${EXTRA:-}"                        # of setup.py, installed with it: cuda, tpu, wandb ...
PROCESSES="${PROCESSES:-1}"               # processes of one run, over loopback
PORT="${PORT:-}"                          # of their coordinator; empty: a free one

# the paper's runs (paper.sh)
MODEL="${MODEL:-}"                        # directory of the base model, its name on the hub, or a GGUF file
DATA="${DATA:-}"                          # directory of alpaca_farm and ultrafeedback_binarized
REWARD="${REWARD:-}"                      # directory of the reward model
VARIANT="${VARIANT:-pythia-2.8b}"         # recipe of pythia-2.8b, pythia-1b or llama-3.2-1b
RUNS="${RUNS:-}"                          # directory of the runs; empty: runs/NAME of the script
MINIATURE="${MINIATURE:-}"                # 1: tiny models and made-up data
SEEDS="${SEEDS:-0}"                       # one run of each method per seed: "0 1 2"

# Google Cloud (tpu_vm.sh, gke.sh)
PROJECT="${PROJECT:-}"                    # Google Cloud project
ZONE="${ZONE:-}"                          # zone of slice or cluster: us-west4-a
BUCKET="${BUCKET:-}"                      # Cloud Storage bucket without gs://, mounted as /bucket
ACCELERATOR="${ACCELERATOR:-v5litepod-16}" # type of the slice, for tpu_vm.sh and xpk
RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}" # software version of the TPU VMs, matching the slice
SPOT="${SPOT:-}"                          # 1: cheaper, may be preempted at any time
POLL_SECONDS="${POLL_SECONDS:-30}"        # between two polls of a requested slice

# GKE (gke.sh)
CLUSTER="${CLUSTER:-}"                    # name of the cluster, for xpk
IMAGE="${IMAGE:-}"                        # container image: us-docker.pkg.dev/PROJECT/REPO/ntkrl
NODES_OF="${NODES_OF:-tpu-v5-lite-podslice}" # label gke-tpu-accelerator of the node pool
TOPOLOGY="${TOPOLOGY:-4x4}"               # label gke-tpu-topology of the node pool
CHIPS_PER_HOST="${CHIPS_PER_HOST:-4}"     # chips of one node
SERVICE_ACCOUNT="${SERVICE_ACCOUNT:-default}" # Kubernetes account with read and write access to the bucket
STORAGE="${STORAGE:-}"                    # name of the xpk storage that is attached as /bucket

# SLURM (slurm.sh)
PARTITION="${PARTITION:-}"                # empty: the cluster's default
ACCOUNT="${ACCOUNT:-}"                    # empty: yours
NODES="${NODES:-1}"                       # machines
GPUS_PER_NODE="${GPUS_PER_NODE:-8}"       # per machine; 0: none
TASKS_PER_NODE="${TASKS_PER_NODE:-}"      # processes per machine; empty: one per GPU
CPUS_PER_TASK="${CPUS_PER_TASK:-8}"       # cores per process
TIME_LIMIT="${TIME_LIMIT:-24:00:00}"      # of one job; a longer run is requeued
