"""Readers of public diffusion checkpoints: each builds a ``UNet`` that computes the same as the original network."""

from lit_purify.models.readers.ddpm import load_ddpm
from lit_purify.models.readers.diffusers import diffusers_unet, load_diffusers
from lit_purify.models.readers.guided_diffusion import load_guided_diffusion
from lit_purify.models.readers.score_sde import load_score_sde

__all__ = ["diffusers_unet", "load_ddpm", "load_diffusers", "load_guided_diffusion", "load_score_sde"]
