"""Weights that configurations here name: where each file comes from, and what reads it."""

from __future__ import annotations

from pathlib import Path

_DIFFPURE = "linked in the README of NVlabs/DiffPure"
_LEE_KIM = (
    "of the authors of ml-postech/robust-evaluation-of-diffusion-based-purification (no public address; ask them)"
)
_TORCHVISION = "ResNet-50 of torchvision, weights {}, at download.pytorch.org/models under this name"

_ORIGINS = {
    "checkpoint_8.pth": "vp/cifar10_ddpmpp_deep_continuous of yang-song/score_sde_pytorch, linked in its README",
    "256x256_diffusion_uncond.pt": "this file of openai/guided-diffusion, linked in its README",
    "cifar10_uncond_50M_500K.pt": "linked in the README of openai/improved-diffusion under this name",
    "svhn_ddpm.pt": f"the DDPM for SVHN {_LEE_KIM}",
    "svhn_wrn28_10.pt": f"a WRN-28-10 for SVHN in the layout of szagoruyko/wide-residual-networks, {_LEE_KIM}",
    "Standard.pt": "Standard (WRN-28-10) of RobustBench's model zoo for CIFAR-10",
    "wresnet-70-16.pt": f"WRN-70-16 {_DIFFPURE} (wideresnet-70-16, there wresnet-76-10/weights-best.pt)",
    "wrn-70-16-dropout.pt": f"WRN-70-16 {_DIFFPURE} (wrn-70-16-dropout, there weights.pt)",
    "resnet50-0676ba61.pth": _TORCHVISION.format("IMAGENET1K_V1"),
    "resnet50-11ad3fa6.pth": _TORCHVISION.format("IMAGENET1K_V2"),
    "deit_small_patch16_224-cd65a155.pth": "DeiT-S, linked in the README of facebookresearch/deit",
}


def remedy(path: Path) -> str:
    """What to do about a file of weights that is not there, in words."""
    if path.name == "model.safetensors":
        return "train it first, by one of configs/train, or check the path"
    if path.name not in _ORIGINS:
        return "check the path"
    return f"it is {_ORIGINS[path.name]}; fetch it and put it there: it is read as it is"
