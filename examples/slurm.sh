#!/bin/bash
# Trains on several machines under Slurm; what follows the script's name are flags of `hf-poolformer train`:
#   sbatch --nodes 8 examples/slurm.sh --dataset_name ethz/food101 --output_dir /shared/outputs/food101
# The environment that has this package is active when sbatch is called. docs/machines.md explains the choices.
#SBATCH --job-name=poolformer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=128
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# One launcher on each machine. A machine that fails ends the step, Slurm queues the job again, and it goes on.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${PROCESSES_PER_NODE:-8}" --max_restarts 3 \
    --rdzv_backend c10d --rdzv_endpoint "$first:${PORT:-29500}" --rdzv_id "$SLURM_JOB_ID" \
    -m hf_poolformer train --checkpointing_steps 500 --resume_from_checkpoint latest "$@"
