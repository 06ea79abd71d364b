"""Judges a denoiser by its samples: their Frechet distance from real images."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers import DDPMScheduler
from torch import Tensor, nn

from w2s.diffusion.data import PixelData, Reference, save_grid
from w2s.diffusion.frechet import (
    Statistics,
    cached_statistics,
    frechet_distance,
    kernel_distance,
    load_features,
    measure,
    metric_labels,
)
from w2s.diffusion.process import generate
from w2s.engine.errors import InputError
from w2s.engine.files import check_writable
from w2s.engine.plan import accumulation_dtype
from w2s.engine.randomness import mix_seed


class Judge:
    """Samples from a denoiser and measures their distance from real images, in the same way for every model.

    The statistics of the real images take long. `measure_references` makes them, once all input has been checked.

    Args:
        args: resolved options; this reads those of the group "samples and their distance".
        accelerator: gives the device and the processes.
        data: the real images.
        process: the diffusion process that sampling walks back.
        checkpoint: of the run to resume, which must have been judged on the same features; None for a new run.

    Raises:
        InputError: no features, a cache that cannot be written, or other features than those of the checkpoint.
    """

    def __init__(
        self, args, accelerator: Accelerator, data: PixelData, process: DDPMScheduler, checkpoint: Path | None
    ) -> None:
        self.accelerator, self.process, self.data = accelerator, process, data
        self.cache = None if args.dry_run else Path(args.fd_cache)
        if self.cache:
            check_writable(self.cache, "--fd-cache")
        self.count = min(args.fd_samples, 8) if args.dry_run else args.fd_samples
        self.num_classes = data.num_classes if args.class_cond else None
        self.shape = (args.in_chans, args.img_size, args.img_size)
        self.sampler, self.sample_steps, self.sample_seed = args.sampler, args.sample_steps, args.sample_seed
        self.batch_size = args.validation_batch_size
        self.features = load_features(args.fd_features, args.fid_weights, args.in_chans).to(accelerator.device)
        self.features_samples = args.fd_samples
        self.labels = metric_labels(self.features, args.fd_samples)
        self.references: dict[str, Statistics] = {}
        digest = features_of(checkpoint) if checkpoint else None
        if digest not in (None, self.features.digest):
            raise InputError(
                f"the run was judged on features {digest}, these are {self.features.digest}: keep to those"
            )

    def facts(self) -> dict:
        """What summary.json holds of the features."""
        return {"name": self.features.name, "digest": self.features.digest, "samples": self.features_samples}

    def measure_references(self, switch: bool) -> None:
        """Make the statistics of the images to compare with; of those for the switch-off only where asked for."""
        if "report" not in self.references:
            self.references["report"] = self._reference(self.data.report)
        if switch and "switch" not in self.references:
            same = self.data.switch.key == self.data.report.key
            self.references["switch"] = self.references["report"] if same else self._reference(self.data.switch)

    def _reference(self, images: Reference) -> Statistics:
        key = {**images.key, "features": self.features.digest}
        return cached_statistics(self.cache, key, lambda: self._statistics(images, len(images)), self.accelerator)

    def _statistics(self, images: Reference | Tensor, count: int) -> Statistics:
        return measure(self.features, images, count, self.accelerator, self.batch_size)

    def samples(self, model: nn.Module, stream: int) -> Tensor | None:
        """--fd-samples images (8 in a dry run); a stream's noise is the same at every evaluation and in all arms."""
        return generate(
            model,
            self.process,
            count=self.count,
            seed=mix_seed(self.sample_seed, stream),
            accelerator=self.accelerator,
            shape=self.shape,
            sampler=self.sampler,
            steps=self.sample_steps,
            batch_size=self.batch_size,
            num_classes=self.num_classes,
        )

    def validate(self, model: nn.Module, picture: Path | None = None) -> dict[str, float]:
        """The reported distances; a grid of samples is written to `picture`."""
        images = self.samples(model, stream=0)
        if picture and images is not None:
            save_grid(images, picture)
        values = self._distances(images, self.references["report"], [frechet_distance, kernel_distance])
        return dict(zip(self.labels, values, strict=True))

    def switch_distance(self, model: nn.Module) -> float:
        """The distance that decides on the switch-off; its samples start from other noise than the reported ones."""
        return self._distances(self.samples(model, stream=1), self.references["switch"], [frechet_distance])[0]

    def _distances(
        self, images: Tensor | None, reference: Statistics, distances: list[Callable[[Statistics, Statistics], float]]
    ) -> list[float]:
        """NaN where there are no images. The first process measures: what all decide on must be one number."""
        device = self.accelerator.device
        values = torch.full((len(distances),), math.nan, dtype=accumulation_dtype(device))
        if images is not None:
            statistics = self._statistics(images, len(images))
            if self.accelerator.is_main_process:
                values = values.new_tensor([distance(statistics, reference) for distance in distances])
        return broadcast(values.to(device)).tolist()


def features_of(checkpoint: Path) -> str | None:
    """The digest of the features that judged the run of a checkpoint, None where it is not known."""
    try:
        summary = json.loads((checkpoint.resolve().parent.parent / "summary.json").read_text())
        return summary["features"]["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
