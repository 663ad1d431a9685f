#!/bin/bash
# torchrun on several nodes: HEAD=10.0.0.1 NODES=2 GPUS=8 bash torchrun.sh --config run.yaml, the same line on each.
# DDP; with --fsdp true --fsdp_config '{"version": 2}' FSDP2.
set -euo pipefail

exec torchrun --nnodes "${NODES:-2}" --nproc_per_node "${GPUS:-8}" \
  --rdzv_backend c10d --rdzv_endpoint "$HEAD:${PORT:-29500}" --rdzv_id orpo -m orpo.train "$@"
