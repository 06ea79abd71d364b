"""What the tests of the adapters share: a little data, a teacher that counts its calls, and a run that is watched."""

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from w2s.adapters.taught import TaughtRun
from w2s.schedule import EarlyPhase

CLASSES = 4


class CountingTeacher(nn.Module):
    """A classifier by four weights, which is weak, and counts the batches that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, CLASSES)
        nn.init.zeros_(self.head.bias)
        nn.init.eye_(self.head.weight)
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.head(images.flatten(1))


def data(count: int = 64, seed: int = 0) -> TensorDataset:
    """Images (1, 4, 4) whose label is the row that is brightest: no teacher that sees four pixels knows it."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % CLASSES
    images = torch.randn(count, 1, 4, 4, generator=generator) / 2
    images[torch.arange(count), 0, targets] += 1
    return TensorDataset(images, targets)


def early_phase(**changes: object) -> EarlyPhase:
    """lambda at once, for three epochs, then down to 0 within one."""
    return EarlyPhase(**{"weight": 2.0, "hold": 3.0, "decay": 1.0, "temperature": (4, 1), "patience": 2, **changes})


class WatchedRun(TaughtRun):
    """A run that notes lambda and T of each update."""

    def __init__(self, folder: Path, teacher: nn.Module | None = None, metric: str = "accuracy", **phase: object):
        taught = {"phase": early_phase(**phase), "teacher": teacher} if teacher else {}
        super().__init__(folder, metric=metric, targets=(50,), **taught)
        self.seen = {}

    def advance(self, update: int) -> None:
        super().advance(update)
        self.seen[update] = (self.distillation.weight, self.distillation.temperature)


class Killed(Exception):
    """Ends a training loop from within, as a kill does."""
