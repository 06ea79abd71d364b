"""Diffusion: denoisers, the process, image data, and the distance that judges samples."""

from w2s import require

require("diffusion", "accelerate", "diffusers", "timm", "torch_fidelity", "torchvision")

from w2s.diffusion.denoisers import unet  # noqa: E402 - what it needs is checked first

__all__ = ["unet"]
