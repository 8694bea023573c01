# The launch scripts' settings, and the only place where they have values. All of it may be given in
# the environment instead: PROJECT=mine ZONE=us-west4-a bash launch/tpu_vm.sh create
# shellcheck shell=bash disable=SC2034

# every run
RUN_NAME="${RUN_NAME:-ntkrl}"             # of the slice, workload or job: lower case, digits, hyphens
CONFIG="${CONFIG:-}"                      # where the command line has no --config=FILE
RESTARTS="${RESTARTS:-20}"                # how often a run that can go on is started again
WAIT_SECONDS="${WAIT_SECONDS:-10}"        # before the first such start; twice as long each time, to 600
GRACE_SECONDS="${GRACE_SECONDS:-120}"     # that a run gets to save and leave when told to end

# this machine (local.sh, paper.sh)
NTKRL="${NTKRL:-}"                        # the program; empty: this checkout, installed into .venv
EXTRA="${EXTRA:-}"                        # of setup.py, installed with it: cuda, tpu, wandb ...
PROCESSES="${PROCESSES:-1}"               # processes of one run, over loopback
PORT="${PORT:-}"                          # where they meet; empty: a free one

# the paper's runs (paper.sh)
MODEL="${MODEL:-}"                        # directory of the base model, or its name on the hub
DATA="${DATA:-}"                          # directory of alpaca_farm and ultrafeedback_binarized
REWARD="${REWARD:-}"                      # directory of the reward model
VARIANT="${VARIANT:-pythia-2.8b}"         # or pythia-1b, llama-3.2-1b: the settings of that model
RUNS="${RUNS:-}"                          # directory of the runs; empty: runs/paper, or as --help says
MINIATURE="${MINIATURE:-}"                # 1: tiny models and made-up data
SEEDS="${SEEDS:-0}"                       # one run of each method per seed: "0 1 2"

# Google Cloud (tpu_vm.sh, gke.sh)
PROJECT="${PROJECT:-}"                    # Google Cloud project
ZONE="${ZONE:-}"                          # zone of slice or cluster: us-west4-a
BUCKET="${BUCKET:-}"                      # Cloud Storage bucket without gs://, mounted as /bucket
ACCELERATOR="${ACCELERATOR:-v5litepod-16}" # slice, as tpu_vm.sh and xpk name it
RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}" # software of a TPU VM, fitting the slice
SPOT="${SPOT:-}"                          # 1: cheaper, and may be taken away at any time
POLL_SECONDS="${POLL_SECONDS:-30}"        # between two looks at a slice that is asked for

# GKE (gke.sh)
CLUSTER="${CLUSTER:-}"                    # cluster that xpk knows by name
IMAGE="${IMAGE:-}"                        # container image: us-docker.pkg.dev/PROJECT/REPO/ntkrl
NODES_OF="${NODES_OF:-tpu-v5-lite-podslice}" # label gke-tpu-accelerator of the node pool
TOPOLOGY="${TOPOLOGY:-4x4}"               # label gke-tpu-topology of the node pool
CHIPS_PER_HOST="${CHIPS_PER_HOST:-4}"     # chips of one node
SERVICE_ACCOUNT="${SERVICE_ACCOUNT:-default}" # Kubernetes account that may read and write the bucket
STORAGE="${STORAGE:-}"                    # storage that xpk attached as /bucket, by its name there

# SLURM (slurm.sh)
PARTITION="${PARTITION:-}"                # empty: the cluster's default
ACCOUNT="${ACCOUNT:-}"                    # empty: yours
NODES="${NODES:-1}"                       # machines
GPUS_PER_NODE="${GPUS_PER_NODE:-8}"       # of each; 0: none
TASKS_PER_NODE="${TASKS_PER_NODE:-}"      # processes of each; empty: one per GPU
CPUS_PER_TASK="${CPUS_PER_TASK:-8}"       # cores of a process
TIME_LIMIT="${TIME_LIMIT:-24:00:00}"      # of one job; a run that is longer is queued again
