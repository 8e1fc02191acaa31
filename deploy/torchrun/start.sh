#!/bin/sh
# Start this node's part of a training; the same command on each node, in any order.
#
#   NNODES=1:2 RDZV_ENDPOINT=node-a:29400 deploy/torchrun/start.sh examples/train_gpt.py \
#     --parallel fsdp --checkpoint-dir /shared/runs/17 --auto-resume --checkpoint-on-signal
#
# What it takes from the environment is listed in training.env.example, which the systemd unit beside
# it reads.
set -eu

: "${RDZV_ENDPOINT:?host:port of one of the nodes, the same on all}"
[ $# -gt 0 ] || {
  echo "usage: $0 PROGRAM [ARGUMENT ...]" >&2
  exit 2
}

# Without it torch hands restarted workers the addresses of those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# After SIGTERM: seconds for the last save of the workers.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}"

exec "${TORCHRUN:-torchrun}" \
  --nnodes="${NNODES:-1}" \
  --nproc-per-node="${NPROC_PER_NODE:-1}" \
  --max-restarts="${MAX_RESTARTS:-20}" \
  --rdzv-id="${RDZV_ID:-training}" \
  --rdzv-backend=c10d \
  --rdzv-endpoint="$RDZV_ENDPOINT" \
  "$@"
