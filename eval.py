"""Evaluates defenses under attack: ``python eval.py``, or ``python eval.py --config configs/eval/cifar10.yaml``."""

from lit_purify.cli import evaluate

if __name__ == "__main__":
    evaluate()
