"""Configurations and weights that ship with the package."""

from __future__ import annotations

from pathlib import Path

_FOLDERS = ("configs", "checkpoints")
# Inside an installed package, or next to it in a clone.
_HOMES = (Path(__file__).parent, Path(__file__).parent.parent)


def shipped(path: Path) -> Path:
    """The path if it exists, or else the shipped file of that name.

    Args:
        path: A path such as ``configs/eval/digits.yaml`` or ``checkpoints/digits_denoiser.safetensors``.
    """
    if path.parts[:1] and path.parts[0] in _FOLDERS and not path.exists():
        return next((home / path for home in _HOMES if (home / path).is_file()), path)
    return path
