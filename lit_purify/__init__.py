"""Train and evaluate heterogeneous diffusion-based adversarial purification (Pei et al., CVPR 2025)."""

__version__ = "0.1.0"
