#!/bin/bash
# SLURM: sbatch slurm.sh --config run.yaml. One launcher a node, which starts a process for each of its GPUs.
#SBATCH --job-name=orpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --output=%x-%j.log
set -euo pipefail

GPUS=8  # of a node
LAUNCH=${LAUNCH:-launch.yaml}  # orpo-train --print-config hsdp > launch.yaml
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${HOSTS%%$'\n'*}  # without `head`: scontrol would write into a closed pipe, which ends the job
export GPUS LAUNCH HEAD

# SLURM_NODEID is the node's own, so that the line is put together there.
srun bash -c 'exec accelerate launch --config_file "$LAUNCH" --num_machines "$SLURM_NNODES" \
  --num_processes $((SLURM_NNODES * GPUS)) --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$HEAD" --main_process_port 29500 -m orpo.train "$@"' orpo "$@"
