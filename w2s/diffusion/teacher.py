"""The frozen teacher of a denoiser."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from w2s.diffusion.convert import ConvertedDenoiser
from w2s.diffusion.denoisers import UNet, ViT, rebuild
from w2s.diffusion.process import as_epsilon
from w2s.teacher import Teacher


class DenoiserTeacher(Teacher):
    """A frozen denoiser that gives epsilon at the student's x_t and t.

    Args:
        model: a denoiser that predicts what the student does, as `load_teacher_denoiser` gives it.
        process: the diffusion process of both.
        source, device, autocast, channels_last: see `Teacher`.
    """

    def __init__(
        self,
        model: UNet | ViT | ConvertedDenoiser,
        *,
        process: DDPMScheduler,
        source: Path,
        device: torch.device | str,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        channels_last: bool = False,
    ) -> None:
        super().__init__(
            model,
            name=model.name,
            source=str(source),
            device=device,
            autocast=autocast,
            channels_last=channels_last,
            rebuild=model.rebuilt if isinstance(model, ConvertedDenoiser) else partial(rebuild, model),
        )
        self.process = process
        self.note = model.describe() if isinstance(model, ConvertedDenoiser) else None

    @property
    def evaluated(self) -> nn.Module:
        """See `Teacher.evaluated`: samples are drawn from what the denoiser itself predicts."""
        return self.model

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Epsilon (B, C, H, W) at x_t (B, C, H, W) and t (B,)."""
        return as_epsilon(self.process, self.model(x_t, t, labels), x_t=x_t, t=t)
