#!/usr/bin/env bash
# Trains the full-size CIFAR-10 networks and evaluates them, on one GPU:
#
#   [STAGES="classifier denoiser"] [SECONDS_EACH=240] configs/cluster/cifar10_gpu.sh [FLAGS]
#
# Stages: a classifier (ResNet-32 of width 64, 7.4 M parameters), the same trained adversarially (PGD, 7 steps, Linf
# 8/255), a denoiser (configs/train/cifar10_denoiser_gpu.yaml) and the table of 512 test images, all under FOLDER
# (runs/cifar10_gpu). Without STAGES all four run. Each may take SECONDS_EACH (1500; 0 for no limit); after that, and
# after any other interruption, the same command resumes. TABLE=--dry_run only estimates the cost of the table.
# Run it in the root of the repository. FLAGS go to all commands, for example --data CIFAR10Folder --data.root my/images;
# use only flags that train.py and eval.py share.
# The levels of configs/eval/cifar10.yaml were chosen for the shipped network; choose yours with
# `python eval.py frontier --config configs/eval/cifar10_frontier.yaml`. The denoiser learns levels up to 500, which
# leaves room above them.
# From rates of one H200 (docs/speed.md): classifier 330 s (60 epochs, 109 s for 20), adversarial 345 s (30 epochs, 138 s
# for 12), denoiser 26 minutes (50,000 steps of 256 images, 31 ms each), table about 55 minutes. So 9 minutes are the
# classifier (STAGES=classifier) and 6,800 steps of the denoiser (STAGES=denoiser SECONDS_EACH=210). Not run as a whole.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${FOLDER:-runs/cifar10_gpu}
seconds=${SECONDS_EACH:-1500}
stages=${STAGES:-classifier adversarial denoiser table}
python=${PYTHON:-python}
for name in $stages; do
  [[ " classifier adversarial denoiser table " == *" $name "* ]] && continue
  echo "STAGES: there is no stage $name: name some of classifier, adversarial, denoiser, table, with spaces" >&2
  exit 2
done
if ! [[ $seconds =~ ^[0-9]+$ ]]; then
  echo "SECONDS_EACH = $seconds: give whole seconds, or 0 for no limit" >&2
  exit 2
fi

# NAME COMMAND: runs a stage if STAGES names it. SIGTERM lets it end its step and save.
stage() {
  local name=$1 status=0
  shift
  [[ " $stages " == *" $name "* ]] || return 0
  timeout --foreground --preserve-status --signal TERM "${seconds}s" "$python" "$@" --run "$folder/$name" || status=$?
  if [ "$status" = 75 ]; then
    echo "$name: interrupted or out of its $seconds seconds; repeat the command to resume" >&2
  fi
  return "$status"
}

# NAME CONFIGURATION FLAGS: a training, or what is left of it.
train() {
  local name=$1 config=$2
  shift 2
  stage "$name" train.py fit --config "configs/train/$config.yaml" --ckpt_path last --half true "$@"
}

wide=(--model.classifier.depth 32 --model.classifier.width 64 --trainer.precision bf16-mixed --data.num_workers 0)
train classifier cifar10_classifier "${wide[@]}" --trainer.max_epochs 60 "$@"
train adversarial cifar10_classifier_adversarial "${wide[@]}" --trainer.max_epochs 30 \
  --model.attack.steps 7 --model.attack.step_size 2/255 "$@"
train denoiser cifar10_denoiser_gpu --model.classifier "$folder/classifier/model.safetensors" --model.max_level 500 "$@"

attacks=()
for attack in pgd apgd pgd_l2 apgd_l2; do
  attacks+=(--attacks.$attack.steps 100)
done
stage table eval.py --config configs/eval/cifar10.yaml \
  --classifier "$folder/classifier/model.safetensors" --denoiser "$folder/denoiser/model.safetensors" \
  --defenses.adversarial "$folder/adversarial/model.safetensors" \
  --data.subset.n 512 --data.batch_size 256 --chunk 1024 "${attacks[@]}" ${TABLE:+"$TABLE"} "$@"
