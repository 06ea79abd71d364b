"""Frechet distance and KID between sets of uint8 images, on Inception features or those of a classifier trained here.

FID (Heusel et al. 2017, arXiv 1706.08500) and KID are the distances on torch-fidelity's Inception features and nothing
else; on a classifier's features they are called fd and mmd, with the features and the number of samples in the name.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from w2s.engine.errors import InputError
from w2s.images.models import find_model, load_folder
from w2s.record import replacing

KID_SUBSET, KID_SUBSETS = 1000, 10  # features a subset, as torch-fidelity has it, and subsets (there 100)
KID_IMAGES = 10_000  # images whose features are kept for KID, drawn where there are more


class Inception(nn.Module):
    """torch-fidelity's Inception, 2048 features of the last pooling.

    Args:
        weights: its .pth file; downloaded where None.

    Raises:
        InputError: no such file, not that network's weights, or no download.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        try:
            if weights is not None:  # the library would unpickle anything: only tensors get there
                torch.load(weights, map_location="cpu", weights_only=True)
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=weights, verbose=False
            )
        except Exception as error:  # urllib, pickle and torch raise many kinds
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            what = f"--fid-weights {weights}" if weights else f"cannot download {URL_INCEPTION_V3}"
            raise InputError(
                f"{what}: {type(error).__name__}: {reason}; give --fid-weights FILE or --fd-features RUN"
            ) from None
        self.name, self.inception, self.digest = "inception", True, digest_of(self.network)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of uint8 images (B, 1 or 3, H, W)."""
        return self.network(images.expand(-1, 3, -1, -1))[0]


class Classifier(nn.Module):
    """The penultimate features of a classifier: what timm's `forward_head(pre_logits=True)` gives.

    Args:
        run: a run folder of train_cls.py, or an exported model folder.

    Raises:
        InputError: no model there, or one that cannot be loaded.
    """

    def __init__(self, run: str) -> None:
        super().__init__()
        folder = find_model(run)
        self.network = load_folder(folder).eval().requires_grad_(False)
        config = self.network.pretrained_cfg
        self.size, self.mode = tuple(config["input_size"][-2:]), config.get("interpolation", "bicubic")
        self.channels = config["input_size"][0]
        for part in ("mean", "std"):
            self.register_buffer(part, torch.tensor(config[part]).view(1, -1, 1, 1))
        model_args = json.loads((folder / "config.json").read_text()).get("model_args") or {}
        architecture = str(model_args.get("base") or config.get("architecture"))
        try:
            dataset = yaml.safe_load((folder.parent / "args.yaml").read_text())["dataset"]
        except (OSError, yaml.YAMLError, KeyError, TypeError):  # no run folder: the name says less
            dataset = ""
        self.name = re.sub(r"[^\w.-]+", "_", "-".join(filter(None, [dataset.rpartition("/")[-1], architecture])))
        self.inception, self.digest = False, digest_of(self.network)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, d) of uint8 images (B, C, H, W): scaled, resized and normalised as the classifier wants them."""
        x = images.float() / 255
        if x.shape[1] != self.channels:
            x = x.expand(-1, self.channels, -1, -1)
        if tuple(x.shape[-2:]) != self.size:
            mode = self.mode if self.mode in ("bilinear", "bicubic") else "bicubic"
            x = F.interpolate(x, self.size, mode=mode, antialias=True).clamp(0, 1)
        features = self.network.forward_features((x - self.mean) / self.std)
        return self.network.forward_head(features, pre_logits=True).flatten(1)


def load_features(run: str | None, weights: str | None, channels: int) -> Inception | Classifier:
    """The feature extractor that --fd-features and --fid-weights mean, fitted to images of so many channels.

    Raises:
        InputError: both given, cannot be loaded, or a classifier of grey images for images in colour.
    """
    if run and weights:
        raise InputError("--fd-features and --fid-weights are two kinds of features; give one")
    features = Classifier(run) if run else Inception(weights)
    if run and channels != features.channels and channels != 1:
        raise InputError(f"--fd-features {run} takes {features.channels} channel(s), the images have {channels}")
    return features


def digest_of(model: nn.Module) -> str:
    """A short hash of a model's weights."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:12]


def metric_labels(features: Inception | Classifier, count: int) -> tuple[str, str]:
    """What the two distances of `count` samples are called: fid10k and kid10k, or fd512_NAME and mmd512_NAME."""
    number = f"{count // 1000}k" if count % 1000 == 0 else str(count)
    if features.inception:
        return f"fid{number}", f"kid{number}"
    return f"fd{number}_{features.name}", f"mmd{number}_{features.name}"


@dataclass
class Statistics:
    """Mean (d,) and covariance (d, d) of features in float64, and features (m, d) for KID."""

    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray

    @cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root of the covariance; eigenvalues within rounding of 0, or below, are 0."""
        values, vectors = np.linalg.eigh(self.covariance)
        values[values < values.max() * len(values) * np.finfo(float).eps] = 0
        return (vectors * np.sqrt(values)) @ vectors.T


class Sums:
    """What there is to keep of `count` features that come batch by batch, for their `Statistics`.

    Mean and scatter are brought forward in float64 (Chan et al. 1979), so that a mean far from 0 costs no digits.

    Raises:
        InputError: fewer than two.
    """

    def __init__(self, count: int, width: int, device: torch.device) -> None:
        if count < 2:
            raise InputError(f"a Frechet distance needs at least two images, got {count}")
        wide = {"dtype": torch.float64, "device": "cpu" if device.type == "mps" else device}
        self.count, self.mean, self.scatter = 0, torch.zeros(width, **wide), torch.zeros(width, width, **wide)
        drawn = torch.arange(count)
        if count > KID_IMAGES:  # drawn, as every k-th sample may well be of the same few classes
            drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:KID_IMAGES]
        self.place = torch.full((count,), -1)
        self.place[drawn] = torch.arange(len(drawn))
        self.kept = torch.zeros(len(drawn), width)

    def add(self, features: Tensor) -> None:
        """The next features (n, d), in the order of the images."""
        before, self.count = self.count, self.count + len(features)
        place = self.place[before : self.count]
        self.kept[place[place >= 0]] = features.cpu()[place >= 0]
        wide = features.to(self.mean)
        mean = wide.mean(0)
        step, wide = mean - self.mean, wide - mean
        self.mean += step * (len(features) / self.count)
        self.scatter += wide.T @ wide + torch.outer(step, step) * (before * len(features) / self.count)

    def statistics(self) -> Statistics:
        """Of all that came."""
        covariance = self.scatter / (self.count - 1)
        return Statistics(self.mean.cpu().numpy(), covariance.cpu().numpy(), self.kept.numpy())


@torch.no_grad()
def measure(
    features: Callable[[Tensor], Tensor],
    images: Callable[[Sequence[int]], Tensor] | Tensor,
    count: int,
    accelerator: "accelerate.Accelerator",  # noqa: F821
    batch_size: int = 256,
) -> Statistics:
    """The statistics of the features of images 0 to count - 1, the same on every process, a batch in memory at a time.

    Batches are shared out whole and summed up in their order everywhere: another number of processes gives the same
    bits.

    Args:
        features: uint8 images (B, C, H, W) on the device -> (B, d).
        images: all of them, or a function from row numbers to those images.

    Raises:
        InputError: fewer than two images.
    """
    rank, world, sums = accelerator.process_index, accelerator.num_processes, None
    for first in range(0, count, world * batch_size):
        start = first + rank * batch_size
        rows = range(start, min(start + batch_size, count)) or range(1)  # one image where none is left: for the width
        batch = images(rows) if callable(images) else images[rows.start : rows.stop]
        own = features(batch.to(accelerator.device)).float()
        together = own.new_zeros(world * batch_size, own.shape[1])
        if start < count:
            together[rank * batch_size :][: len(own)] = own
        together = accelerator.reduce(together, "sum")  # the rows of others are 0 here
        sums = sums or Sums(count, own.shape[1], together.device)
        for part in together[: count - first].split(batch_size):
            sums.add(part)
    return sums.statistics()


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """`|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`; NaN where a feature was not finite or no root is found.

    The trace of the root is the nuclear norm of `C1^(1/2) C2^(1/2)`: real, and exact for singular covariances too.
    """
    if not all(np.isfinite(part).all() for part in (one.mean, one.covariance, other.mean, other.covariance)):
        return float("nan")
    try:
        shared = np.linalg.norm(one.root @ other.root, "nuc")
    except np.linalg.LinAlgError:  # does not converge; the other processes wait for a number
        return float("nan")
    difference = one.mean - other.mean
    return float(difference @ difference + np.trace(one.covariance) + np.trace(other.covariance) - 2 * shared)


def kernel_distance(one: Statistics, other: Statistics) -> float:
    """KID (Binkowski et al. 2018, arXiv 1801.01401) by torch-fidelity: its mean over 10 subsets of 1,000 features.

    Smaller sets are compared whole, once; they are noisy.
    """
    size = min(KID_SUBSET, len(one.features), len(other.features))
    values = kid_features_to_metric(
        torch.from_numpy(one.features).double(),
        torch.from_numpy(other.features).double(),
        kid_subset_size=size,
        kid_subsets=KID_SUBSETS if size == KID_SUBSET else 1,
        verbose=False,
    )
    return values[KEY_METRIC_KID_MEAN]


def cached_statistics(
    folder: Path | None,
    key: dict,
    make: Callable[[], Statistics],
    accelerator: "accelerate.Accelerator",  # noqa: F821
) -> Statistics:
    """The statistics of a reference set from disk, or made by all processes and written there, complete or not at all.

    Args:
        folder: the cache; None: neither read nor written.
        key: all that the statistics depend on (dataset, split, rows, size, n, features), JSON types.
        make: computes them, the same on every process.
    """
    text = json.dumps({**key, "kid_images": f"{KID_IMAGES} drawn"}, sort_keys=True)
    path = folder and folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"
    found = _read(path, text) if path else None
    # one answer for all: a process that did not see the file would wait for the others in `make`
    all_found = accelerator.reduce(torch.tensor(float(found is not None), device=accelerator.device), "mean").item()
    if all_found == 1:
        return found
    made = make()
    if path and accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path, "wb", f".{os.getpid()}.partial") as file:  # runs side by side share the folder
            np.savez(file, key=text, mean=made.mean, covariance=made.covariance, features=made.features)
    return made


def _read(path: Path, key: str) -> Statistics | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) == key:
                return Statistics(file["mean"], file["covariance"], file["features"])
    except Exception:  # not there, truncated, something else: made anew
        return None
