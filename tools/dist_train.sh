#!/usr/bin/env bash
# Train on several GPUs: tools/dist_train.sh CONFIG GPUS [flags of tools/train.py]
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each, as for MMDetection's own script.
set -euo pipefail
config=${1:?config} gpus=${2:?number of GPUs}
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" --nproc_per_node="$gpus" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "${@:3}"
