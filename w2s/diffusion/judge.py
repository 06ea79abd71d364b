"""Judges a denoiser by the Frechet distance of its samples from real images."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers import DDPMScheduler
from torch import Tensor, nn

from w2s.diffusion.data import DiffusionData, Reference, save_grid
from w2s.diffusion.features import Classifier, Inception, load_features, metric_names
from w2s.diffusion.frechet import (
    Statistics,
    cached_statistics,
    feature_statistics,
    frechet_distance,
    kernel_distance,
)
from w2s.diffusion.process import SAMPLERS, generate
from w2s.engine.errors import InputError
from w2s.engine.files import check_writable
from w2s.engine.parsing import Parser, natural_int, positive_int
from w2s.engine.plan import accumulation_dtype
from w2s.engine.randomness import mix_seed
from w2s.engine.stopping import Stopping

DRY_RUN_SAMPLES = 8
FEATURE_BATCH = 256  # images in one forward of the features at most: Inception enlarges them to 299 px


def add_judge_options(parser: Parser) -> None:
    """How denoisers are sampled, and which distance of the samples is measured."""
    group = parser.add_argument_group("samples and their distance")
    group.add_argument("--fd-split", metavar="NAME", help="real images to compare with (default: the training images)")
    group.add_argument("--fd-samples", type=positive_int, default=10_000, metavar="N", help="samples of an evaluation")
    group.add_argument("--fd-features", metavar="RUN", help="a run of train_cls.py for features, not Inception")
    group.add_argument("--fid-weights", metavar="FILE", help="torch-fidelity's Inception weights (default: downloaded)")
    group.add_argument("--fd-cache", metavar="DIR", help="statistics of the real images (default: OUTPUT/fd-cache)")
    group.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="ddpm takes as many forwards as steps")
    group.add_argument(
        "--sample-steps",
        type=positive_int,
        metavar="N",
        help="of --diffusion-steps; default: ddim 50 or the next fewer that divide them, ddpm all (then slow)",
    )
    group.add_argument(
        "--sample-seed", type=natural_int, default=0, metavar="N", help="of the noise; the same in all arms"
    )
    group.add_argument("--validation-batch-size", type=positive_int, default=256, metavar="N", help="per process")


def resolve_sample_steps(sample_steps: int | None, sampler: str, diffusion_steps: int) -> int:
    """--sample-steps, or its default: all steps for "ddpm"; 50 for "ddim", or the next fewer that divide the process.

    Raises:
        InputError: there are more than the process has, or they cannot be spaced evenly: the first would be too early.
    """
    most = min(sample_steps or 50, diffusion_steps)
    divisor = max(n for n in range(1, most + 1) if diffusion_steps % n == 0)
    if sample_steps is None:
        return divisor if sampler == "ddim" else diffusion_steps
    if sample_steps > diffusion_steps:
        raise InputError(f"--sample-steps {sample_steps} exceeds --diffusion-steps {diffusion_steps}")
    if diffusion_steps % sample_steps:
        raise InputError(
            f"--sample-steps {sample_steps}: the steps of a sampler are spaced evenly, so they must divide "
            f"--diffusion-steps {diffusion_steps}; {divisor} do"
        )
    return sample_steps


class Comparison(NamedTuple):
    """What samples are compared with, and what noise they start from.

    Attributes:
        real: the real images.
        stream: number of the noise stream; samples of another stream have nothing in common with these.
    """

    real: Reference
    stream: int


class Judge:
    """Measures the distance of a denoiser's samples from real images, in the same way for every denoiser.

    `report` is the comparison that is reported, `switch` the one that the switch-off decides by. The samples of each
    start from noise of their own, which is the same for all denoisers. Measuring the real images takes long, so it is
    done once, at the first distance or in `measure_references`.

    Args:
        features: the feature extractor, on the device.
        generate_samples: takes a denoiser and `seed=`, gives uint8 samples (N, C, H, W), or None if they are not
            finite.
        report, switch: the real images of the two comparisons.
        num_samples: N for the names of the metrics.
        seed: of the noise.
        batch_size: images in one forward of the features.
        cache: folder for the statistics of real images, None for no cache.
        accelerator: gives the device and the processes.

    Attributes:
        metric_names: of the Frechet and the kernel distance.
        metric: the first of them, which targets and the switch-off refer to.
    """

    def __init__(
        self,
        *,
        features: Inception | Classifier,
        generate_samples: Callable[..., Tensor | None],
        report: Reference,
        switch: Reference,
        num_samples: int,
        seed: int,
        batch_size: int,
        cache: Path | None,
        accelerator: Accelerator,
    ) -> None:
        self.features, self.generate_samples, self.accelerator = features, generate_samples, accelerator
        self.report, self.switch = Comparison(report, stream=0), Comparison(switch, stream=1)
        self.num_samples, self.seed, self.batch_size, self.cache = num_samples, seed, batch_size, cache
        self.metric_names = metric_names(features, num_samples)
        self.metric = self.metric_names[0]
        self._references: dict[str, Statistics] = {}

    def facts(self) -> dict:
        """What summary.json holds of the features."""
        return {"name": self.features.name, "digest": self.features.digest, "samples": self.num_samples}

    def measure_references(self, switch: bool) -> None:
        """Measure the real images now: those of the report, and with `switch` also those of the switch-off."""
        self._reference(self.report)
        if switch:
            self._reference(self.switch)

    def distance(self, model: nn.Module, comparison: Comparison) -> float:
        """The Frechet distance of a comparison, the same number on all processes; NaN if samples are not finite."""
        reference = self._reference(comparison)
        return self._measure(self._samples(model, comparison), reference, [frechet_distance])[0]

    def reported_distances(self, model: nn.Module, picture: Path | None = None) -> dict[str, float]:
        """Both distances of the comparison `report` by name; a grid of samples is written to `picture`."""
        reference = self._reference(self.report)
        samples = self._samples(model, self.report)
        if picture and samples is not None:
            save_grid(samples, picture)
        values = self._measure(samples, reference, [frechet_distance, kernel_distance])
        return dict(zip(self.metric_names, values, strict=True))

    def _reference(self, comparison: Comparison) -> Statistics:
        """The statistics of the real images of a comparison."""
        real = comparison.real
        key = {**real.key, "features": self.features.digest}
        name = json.dumps(key, sort_keys=True)
        if name not in self._references:  # both comparisons may be with the same images
            self._references[name] = cached_statistics(
                self.cache, key, compute=lambda: self._statistics(real), accelerator=self.accelerator
            )
        return self._references[name]

    def _samples(self, model: nn.Module, comparison: Comparison) -> Tensor | None:
        return self.generate_samples(model, seed=mix_seed(self.seed, comparison.stream))

    def _statistics(self, images: Reference | Tensor) -> Statistics:
        return feature_statistics(
            self.features, images, self.accelerator, count=len(images), batch_size=self.batch_size
        )

    def _measure(
        self, samples: Tensor | None, reference: Statistics, distances: list[Callable[[Statistics, Statistics], float]]
    ) -> list[float]:
        """Distances of samples from real images, as the main process computes them: no decision may differ by rank."""
        device = self.accelerator.device
        values = torch.full((len(distances),), math.nan, dtype=accumulation_dtype(device))
        if samples is not None:
            statistics = self._statistics(samples)
            if self.accelerator.is_main_process:
                values = values.new_tensor([distance(statistics, reference) for distance in distances])
        return broadcast(values.to(device)).tolist()


def build_judge(
    args,
    accelerator: Accelerator,
    *,
    data: DiffusionData,
    process: DDPMScheduler,
    checkpoint: Path | None,
    stopping: Stopping | None = None,
) -> Judge:
    """The judge of a run.

    Args:
        args: resolved options; this reads those of `add_judge_options`, --in-chans, --img-size, --class-cond and
            --dry-run.
        accelerator: gives the device and the processes.
        data: has the real images of both comparisons.
        process: the diffusion process that sampling reverses.
        checkpoint: that the run continues from, None for a new run.
        stopping: of a run that a signal may stop.

    Raises:
        InputError: there are no such features, the cache cannot be written, or the run was judged on other features.
    """
    cache = None if args.dry_run else Path(args.fd_cache)
    if cache:
        check_writable(cache, "--fd-cache")
    features = load_features(args.fd_features, args.fid_weights, args.in_chans).to(accelerator.device)
    if checkpoint:
        _check_same_features(features, checkpoint)
    generate_samples = partial(
        generate,
        process=process,
        accelerator=accelerator,
        shape=(args.in_chans, args.img_size, args.img_size),
        count=min(args.fd_samples, DRY_RUN_SAMPLES) if args.dry_run else args.fd_samples,
        sampler=args.sampler,
        steps=args.sample_steps,
        batch_size=args.validation_batch_size,
        num_classes=data.num_classes if args.class_cond else None,
        stopping=stopping,
    )
    return Judge(
        features=features,
        generate_samples=generate_samples,
        report=data.report,
        switch=data.switch,
        num_samples=args.fd_samples,
        seed=args.sample_seed,
        batch_size=min(args.validation_batch_size, FEATURE_BATCH),
        cache=cache,
        accelerator=accelerator,
    )


def _check_same_features(features: Inception | Classifier, checkpoint: Path) -> None:
    """Refuse other features than those that summary.json of a checkpoint's run names, if it can be read."""
    try:
        summary = json.loads((checkpoint.resolve().parent.parent / "summary.json").read_text())
        digest = summary["features"]["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if digest not in (None, features.digest):
        raise InputError(f"the run was judged on features {digest}, these are {features.digest}: keep to those")
