"""Diffusion: denoisers, the process, image data, and the distance that judges samples."""

from w2s.diffusion.denoisers import unet

__all__ = ["unet"]
