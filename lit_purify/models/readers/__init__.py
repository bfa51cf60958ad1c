"""Readers of public diffusion checkpoints: each gives a ``UNet`` that computes what the original computes."""

from lit_purify.models.readers.ddpm import load_ddpm
from lit_purify.models.readers.diffusers import diffusers_unet, load_diffusers
from lit_purify.models.readers.guided_diffusion import load_guided_diffusion
from lit_purify.models.readers.score_sde import load_score_sde

__all__ = [
    "diffusers_unet",
    "load_ddpm",
    "load_diffusers",
    "load_guided_diffusion",
    "load_score_sde",
]
