#!/usr/bin/env bash
# The models of CIFAR-10 at full size and their table, on one GPU:
#
#   configs/cluster/cifar10_gpu.sh [FLAGS]
#
# A classifier (ResNet-32 of width 64, 7.4 M parameters), the same trained adversarially (PGD, 7 steps, Linf 8/255), a
# denoiser (configs/train/cifar10_denoiser_gpu.yaml) and the evaluation of 512 test images, all under FOLDER
# (runs/cifar10_gpu). Each training may take MINUTES (25; 0 for no limit); after that, and after any other interruption,
# the same command goes on where it was. TABLE=--dry_run estimates the evaluation in place of making it. Paths are seen from the root of the repository. FLAGS go to all four commands:
# --data CIFAR10Folder, --data.root my/images ...; those that only one of train.py and eval.py knows are
# none of them.
# The levels are those of configs/eval/cifar10.yaml, chosen for the network that ships; choose anew with
# `python eval.py frontier --config configs/eval/cifar10_frontier.yaml`.
# Rehearsed on a CPU with a few steps; not run on a GPU yet, so that nobody knows how long it takes: 100,000 steps of the
# denoiser will want the command several times, and the table, which has no limit of time, is 4.1 million gradients of a
# purification, 17 million differentiated calls of the denoiser: look at TABLE=--dry_run first.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${FOLDER:-runs/cifar10_gpu}
minutes=${MINUTES:-25}
python=${PYTHON:-python}

# NAME CONFIGURATION FLAGS: trains, or goes on with the training. SIGTERM lets it end its step and save.
train() {
  local name=$1 config=$2 status=0
  shift 2
  timeout --foreground --preserve-status --signal TERM "${minutes}m" "$python" train.py fit --config "configs/train/$config.yaml" \
    --run "$folder/$name" --ckpt_path last "$@" || status=$?
  if [ "$status" = 75 ]; then
    echo "$name: interrupted or out of its $minutes minutes; give the same command again and it goes on" >&2
  fi
  return "$status"
}

wide=(--model.classifier.depth 32 --model.classifier.width 64 --trainer.precision bf16-mixed --data.num_workers 8)
train classifier cifar10_classifier "${wide[@]}" --trainer.max_epochs 60 "$@"
train adversarial cifar10_classifier_adversarial "${wide[@]}" --trainer.max_epochs 30 \
  --model.attack.steps 7 --model.attack.step_size 2/255 "$@"
train denoiser cifar10_denoiser_gpu --model.classifier "$folder/classifier/model.safetensors" "$@"

attacks=()
for attack in pgd apgd pgd_l2 apgd_l2; do
  attacks+=(--attacks.$attack.steps 100)
done
"$python" eval.py --config configs/eval/cifar10.yaml --run "$folder/table" \
  --classifier "$folder/classifier/model.safetensors" --denoiser "$folder/denoiser/model.safetensors" \
  --defenses.adversarial "$folder/adversarial/model.safetensors" \
  --data.subset.n 512 --data.batch_size 128 --chunk 128 "${attacks[@]}" ${TABLE:+"$TABLE"} "$@"
