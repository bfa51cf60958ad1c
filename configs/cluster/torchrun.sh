#!/bin/bash
# An evaluation or a training on several hosts without a scheduler: run the same command on each host, with its number.
#
#   HOST=0 HOSTS=2 HEAD=host0 GPUS=8 configs/cluster/torchrun.sh eval.py --config configs/eval/cifar10.yaml --run runs/cifar10
#
# HEAD is the address of host 0 for the others. The run folder must be on shared storage. If a host is lost, the others
# end after 30 minutes (docs/clusters.md): repeat the command to resume (a training with --ckpt_path last).
set -eu
exec python -m torch.distributed.run --nnodes "$HOSTS" --node_rank "$HOST" --nproc_per_node "$GPUS" \
  --master_addr "$HEAD" --master_port "${PORT:-29400}" -- "$@"
