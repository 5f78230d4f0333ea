#!/usr/bin/env bash
# Train on two machines of eight GPUs under Slurm. The job is requeued before its time limit and resumes.
#SBATCH --job-name=xcit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=6
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}

# B: sends the signal to this shell. It stops the training, which saves, and asks Slurm to run the job again.
requeue() {
    scancel --signal=TERM "$SLURM_JOB_ID.0"
    wait "$training"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue USR1 TERM

srun --kill-on-bad-exit=0 spec-mmdet train xcit_maskrcnn --data data/coco --launcher slurm --resume &
training=$!
wait "$training"
