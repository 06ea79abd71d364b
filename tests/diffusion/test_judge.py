"""The judge: what it measures and when, what the samples of a comparison start from, and the options of sampling."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusion.fakes import fake_accelerator
from helpers import refused
from PIL import Image

import train_diffusion
from w2s.diffusion import judge as judging
from w2s.diffusion.data import DiffusionData, Reference
from w2s.diffusion.frechet import feature_statistics, frechet_distance, kernel_distance
from w2s.diffusion.judge import Judge, build_judge, resolve_sample_steps
from w2s.diffusion.process import noise_schedule


class MeanFeatures(torch.nn.Module):
    """The mean brightness of the four quarters of an image, in the place of a network's features."""

    name, digest, is_inception = "means", "abc", False

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


class Images:
    """Random images, and a count of how often each was read."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pixels = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=generator)
        self.key, self.reads = {"seed": seed, "n": count}, 0

    def __len__(self) -> int:
        return len(self.pixels)

    def __call__(self, batches: list[range]) -> Iterator[torch.Tensor]:
        for rows in batches:
            self.reads += len(rows)
            yield self.pixels[rows.start : rows.stop]


def noise_samples(model, seed: int) -> torch.Tensor | None:
    """Samples of a "model" that is a brightness; None of one that is not finite."""
    if not math.isfinite(model):
        return None
    noise = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return ((model + noise) * 32 + 128).clamp(0, 255).to(torch.uint8)


@pytest.fixture
def make_judge(monkeypatch):
    """A judge of `noise_samples` without a cache, in one process."""
    monkeypatch.setattr(judging, "broadcast", lambda tensor: tensor)

    def make(report: Images, switch: Images, **changes) -> Judge:
        options = dict(
            features=MeanFeatures(),
            generate_samples=noise_samples,
            report=report,
            switch=switch,
            num_samples=6,
            seed=0,
            batch_size=4,
            cache=None,
            accelerator=fake_accelerator(),
        )
        return Judge(**{**options, **changes})

    return make


def statistics(images: torch.Tensor):
    return feature_statistics(MeanFeatures(), images, fake_accelerator(), count=len(images))


# ---- distances ----


def test_distances_are_those_of_samples_and_real_images(make_judge):
    samples = {}

    def remembered_samples(model, seed: int) -> torch.Tensor:
        samples[seed] = noise_samples(model, seed)
        return samples[seed]

    report, switch = Images(9, seed=1), Images(7, seed=2)
    judge = make_judge(report, switch, generate_samples=remembered_samples)
    assert (judge.metric_names, judge.metric) == (("fd6_means", "mmd6_means"), "fd6_means")
    reported = judge.reported_distances(0.5)
    (first,) = samples.values()
    assert reported == {
        "fd6_means": pytest.approx(frechet_distance(statistics(first), statistics(report.pixels))),
        "mmd6_means": pytest.approx(kernel_distance(statistics(first), statistics(report.pixels))),
    }
    assert judge.distance(0.5, judge.report) == pytest.approx(reported["fd6_means"])
    assert len(samples) == 1  # of the same noise
    deciding = judge.distance(0.5, judge.switch)
    assert len(samples) == 2  # of other noise
    assert deciding == pytest.approx(frechet_distance(statistics(list(samples.values())[1]), statistics(switch.pixels)))
    judge.distance(0.5, judge.switch)
    assert len(samples) == 2


def test_seed_changes_the_noise(make_judge):
    images = Images(9, seed=1)
    one, other = make_judge(images, images, seed=0), make_judge(images, images, seed=1)
    assert one.distance(0.5, one.report) != other.distance(0.5, other.report)


def test_samples_that_are_not_finite_are_at_no_distance(make_judge, tmp_path):
    judge = make_judge(Images(9, seed=1), Images(7, seed=2))
    assert math.isnan(judge.distance(math.nan, judge.switch))
    assert all(math.isnan(value) for value in judge.reported_distances(math.nan, tmp_path / "samples.png").values())
    assert not list(tmp_path.iterdir())


def test_picture_shows_the_reported_samples(make_judge, tmp_path):
    judge = make_judge(Images(9, seed=1), Images(7, seed=2))
    judge.reported_distances(0.5, tmp_path / "samples.png")
    grid = np.asarray(Image.open(tmp_path / "samples.png"))
    assert grid.ndim == 3 and len(np.unique(grid)) > 10


# ---- real images ----


def test_real_images_are_measured_once_and_not_before_they_are_needed(make_judge):
    report, switch = Images(9, seed=1), Images(7, seed=2)
    judge = make_judge(report, switch)
    assert (report.reads, switch.reads) == (0, 0)
    judge.measure_references(switch=False)
    judge.reported_distances(0.5)
    assert (report.reads, switch.reads) == (9, 0)
    judge.measure_references(switch=True)
    judge.distance(0.5, judge.switch)
    judge.distance(0.5, judge.report)
    assert (report.reads, switch.reads) == (9, 7)


def test_same_images_are_measured_once_for_both_comparisons(make_judge):
    report, switch = Images(9, seed=1), Images(9, seed=1)
    make_judge(report, switch).measure_references(switch=True)
    assert (report.reads, switch.reads) == (9, 0)


def test_real_images_are_cached_by_what_they_are_and_by_the_features(make_judge, tmp_path):
    reads = []
    for digest in ("abc", "abc", "other"):
        images, features = Images(9, seed=1), MeanFeatures()
        features.digest = digest
        make_judge(images, images, features=features, cache=tmp_path).measure_references(switch=True)
        reads.append(images.reads)
    assert reads == [9, 0, 9]


# ---- options ----


@pytest.fixture
def options(tiny_teacher, tmp_path):
    """Resolved options of a judge on a classifier's features."""
    argv = ["--dataset", "digits", "--fd-features", str(tiny_teacher), "--fd-samples", "5000"]
    argv += ["--output", str(tmp_path), "--sample-steps", "2"]
    args = train_diffusion.build_parser().parse_recipe(argv)
    train_diffusion.resolve(args)
    return args


def build(args, checkpoint: Path | None = None) -> Judge:
    reference = Reference(images=torch.zeros(3), key={})
    data = DiffusionData(
        train=None, report=reference, switch=reference, num_classes=10, samples=3, cache="none", sizes={}
    )
    return build_judge(args, fake_accelerator(), data=data, process=noise_schedule(), checkpoint=checkpoint)


def test_number_of_samples_is_that_of_the_names_but_in_a_dry_run(options):
    def zeros(x, t, labels):
        return torch.zeros_like(x)

    options.fd_samples = 12
    judge = build(options)
    assert judge.metric == "fd12_digits-resnet10t" and judge.facts()["samples"] == 12
    assert judge.generate_samples(zeros, seed=0).shape == (12, 1, 8, 8)
    options.dry_run = True
    dry = build(options)
    assert dry.metric == judge.metric and dry.cache is None
    assert dry.generate_samples(zeros, seed=0).shape == (8, 1, 8, 8)


def test_classes_are_sampled_only_where_the_denoiser_has_them(options):
    options.fd_samples, seen = 12, []

    def zeros(x, t, labels):
        seen.append(labels)
        return torch.zeros_like(x)

    build(options).generate_samples(zeros, seed=0)
    assert seen == [None, None]
    options.class_cond = True
    build(options).generate_samples(zeros, seed=0)
    assert seen[-1].tolist() == [*range(10), 0, 1]


def test_features_see_few_images_at_a_time_however_many_are_sampled(options):
    """Inception enlarges them to 299 px."""
    options.validation_batch_size = 1000
    judge = build(options)
    assert judge.batch_size == 256 and judge.generate_samples.keywords["batch_size"] == 1000


def test_cache_that_cannot_be_written_is_named(options, tmp_path):
    (tmp_path / "file").touch()
    options.fd_cache = str(tmp_path / "file" / "cache")
    with refused("choose another --fd-cache"):
        build(options)


def test_other_features_than_those_of_the_checkpoint_are_refused(options, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "update-00000001"
    checkpoint.mkdir(parents=True)
    summary = tmp_path / "run" / "summary.json"
    digest = build(options, checkpoint).facts()["digest"]  # nothing is known of that run
    for known in ("no json", "[]", "{}", json.dumps({"features": {"digest": digest}})):
        summary.write_text(known)
        build(options, checkpoint)
    summary.write_text(json.dumps({"features": {"digest": "abc"}}))
    with refused("judged on features abc", f"these are {digest}"):
        build(options, checkpoint)


def test_sample_steps_by_default_and_as_given():
    assert resolve_sample_steps(None, "ddim", 1000) == 50
    assert resolve_sample_steps(None, "ddim", 120) == 40
    assert resolve_sample_steps(None, "ddpm", 120) == 120
    assert resolve_sample_steps(25, "ddim", 1000) == 25
    assert resolve_sample_steps(250, "ddpm", 1000) == 250
    for sampler in ("ddim", "ddpm"):
        with refused("--sample-steps 600", "must divide --diffusion-steps 1000; 500 do"):
            resolve_sample_steps(600, sampler, 1000)
    with refused("--sample-steps 2000 exceeds --diffusion-steps 1000"):
        resolve_sample_steps(2000, "ddpm", 1000)
