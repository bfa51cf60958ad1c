#!/bin/bash
# An evaluation or a training over hosts without a scheduler: the same command on each of them, with its number.
#
#   HOST=0 HOSTS=2 HEAD=host0 GPUS=8 configs/cluster/torchrun.sh eval.py --config configs/eval/cifar10.yaml --run runs/cifar10
#
# HEAD is host 0 as the others find it; the run's folder must be on storage that all share. When a host is lost, the
# others end after 30 minutes (docs/clusters.md): the same command goes on (a training with --ckpt_path last).
set -eu
exec python -m torch.distributed.run --nnodes "$HOSTS" --node_rank "$HOST" --nproc_per_node "$GPUS" \
  --master_addr "$HEAD" --master_port "${PORT:-29400}" -- "$@"
