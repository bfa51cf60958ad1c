"""Trains a denoiser or a classifier: ``python train.py fit --config configs/train/digits_denoiser.yaml``."""

from lit_purify.cli import train

if __name__ == "__main__":
    train()
