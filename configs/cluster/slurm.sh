#!/bin/bash
# An evaluation or a training over nodes of a SLURM cluster; the run's folder must be on storage that they share.
#
#   sbatch configs/cluster/slurm.sh eval.py --config configs/eval/cifar10.yaml --run runs/cifar10
#   sbatch --nodes 1 configs/cluster/slurm.sh train.py fit --config configs/train/cifar10_denoiser_gpu.yaml \
#     --ckpt_path last
#   sbatch --array 0-4 --nodes 1 configs/cluster/slurm.sh eval.py --config configs/eval/cifar10.yaml \
#     --run runs/seed%a --seed %a
#
# Preempted, or two minutes before its time is over, the job saves what it has and goes back into the queue; from there
# it goes on. In an array, %a stands for the number of the element.
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
# Made by a task that was stopped, or lost another one: exit status 75, the same command goes on. The status of srun
# may be that of a task which SLURM killed because another had failed.
export GOES_ON="$PWD/.slurm-$SLURM_JOB_ID"
rm -f "$GOES_ON"
# Signals come to these shells as well: they stay until python has ended.
trap : TERM
srun --kill-on-bad-exit=1 \
  bash -c 'trap : TERM USR1; "$@"; status=$?; [ $status -ne 75 ] || touch "$GOES_ON"; exit $status' - \
  python "${@//%a/${SLURM_ARRAY_TASK_ID:-}}" \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"
status=$?
if [ -e "$GOES_ON" ]; then
  rm "$GOES_ON"
  [ "${SLURM_RESTART_COUNT:-0}" -ge 50 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
