"""Readers of public diffusion checkpoints: each gives a ``UNet`` that computes what the original computes.

``load_*`` read files; their counterparts ``*_unet`` take a state_dict.
"""

from lit_purify.models.readers.ddpm import ddpm_unet, load_ddpm
from lit_purify.models.readers.diffusers import diffusers_unet, load_diffusers
from lit_purify.models.readers.guided_diffusion import (
    guided_diffusion_unet,
    improved_diffusion_unet,
    load_guided_diffusion,
    load_improved_diffusion,
)
from lit_purify.models.readers.score_sde import load_score_sde, score_sde_unet

__all__ = [
    "ddpm_unet",
    "diffusers_unet",
    "guided_diffusion_unet",
    "improved_diffusion_unet",
    "load_ddpm",
    "load_diffusers",
    "load_guided_diffusion",
    "load_improved_diffusion",
    "load_score_sde",
    "score_sde_unet",
]
