"""A stand-in for the accelerator, and a small denoiser."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch

from w2s.diffusion.denoisers import ViT

TINY_VIT = {"patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}


def tiny_vit(size: int = 8, in_chans: int = 1, **kwargs) -> ViT:
    """A vision transformer of two layers as a denoiser."""
    return ViT("vit_tiny_patch16_224", size, in_chans, **{**TINY_VIT, **kwargs})


def fake_accelerator(rank: int = 0, world: int = 1) -> SimpleNamespace:
    """The accelerator of one process of several. Its `reduce` returns the part of this process alone."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        process_index=rank,
        num_processes=world,
        is_main_process=rank == 0,
        autocast=nullcontext,
        reduce=lambda tensor, how: tensor.clone(),
    )
