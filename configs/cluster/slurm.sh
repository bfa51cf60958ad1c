#!/bin/bash
# An evaluation or a training over nodes of a SLURM cluster; the run's folder must be on storage that they share.
#
#   sbatch configs/cluster/slurm.sh eval.py --config configs/eval/cifar10.yaml --run runs/cifar10
#   sbatch --nodes 1 configs/cluster/slurm.sh train.py fit --config configs/train/cifar10_denoiser_gpu.yaml \
#     --ckpt_path last
#   sbatch --array 0-4 --nodes 1 configs/cluster/slurm.sh eval.py --config configs/eval/cifar10.yaml \
#     --run runs/seed%a --seed %a
#
# If it is preempted, or two minutes before its time limit, the job saves its state and requeues; then it resumes. In an
# array, %a is replaced by the index of the element.
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
# A task creates this file if it can resume (exit status 75). The status of srun may be that of a task that SLURM killed
# because another one failed.
export RESUMES="$PWD/.slurm-$SLURM_JOB_ID"
rm -f "$RESUMES"
# These shells also receive the signals; they wait until python has ended.
trap : TERM
srun --kill-on-bad-exit=1 \
  bash -c 'trap : TERM USR1; "$@"; status=$?; [ $status -ne 75 ] || touch "$RESUMES"; exit $status' - \
  python "${@//%a/${SLURM_ARRAY_TASK_ID:-}}" \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"
status=$?
if [ -e "$RESUMES" ]; then
  rm "$RESUMES"
  [ "${SLURM_RESTART_COUNT:-0}" -ge 50 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
