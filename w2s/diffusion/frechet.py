"""Frechet and kernel distance between two sets of images, and the feature statistics that they are computed from.

On torch-fidelity's Inception features these are the FID (Heusel et al. 2017, arXiv 1706.08500) and the KID (Binkowski
et al. 2018, arXiv 1801.01401).
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from w2s.engine.errors import InputError
from w2s.record import replacing

KID_SUBSET_SIZE, KID_SUBSETS = 1000, 10  # torch-fidelity's defaults are 1000 and 100
KID_IMAGES = 10_000  # the kernel distance is computed on at most so many images of a set


@dataclass
class Statistics:
    """What the distances need to know of the features of a set of images.

    Attributes:
        mean: (d,), float64.
        covariance: (d, d), float64.
        features: (m, d), float32; those of at most KID_IMAGES images, for the kernel distance.
    """

    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray

    @cached_property
    def covariance_root(self) -> np.ndarray:
        """The symmetric square root of the covariance. Eigenvalues that are 0 up to rounding, or below, count as 0."""
        values, vectors = np.linalg.eigh(self.covariance)
        values[values < values.max() * len(values) * np.finfo(float).eps] = 0
        return (vectors * np.sqrt(values)) @ vectors.T


class RunningStatistics:
    """The statistics of features that arrive batch by batch.

    Mean and scatter matrix are updated in float64 by the formulas of Chan et al. (1979), which lose no digits where the
    mean is far from 0.

    Args:
        count: number of images that will arrive.
        width: number of features of an image.
        device: of the features.

    Raises:
        InputError: fewer than two images.
    """

    def __init__(self, count: int, width: int, device: torch.device) -> None:
        if count < 2:
            raise InputError(f"a Frechet distance needs at least two images, got {count}")
        device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self.count = 0  # images so far
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)
        kept = torch.arange(count)
        if count > KID_IMAGES:  # at random: every k-th sample might well be of the same few classes
            kept = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:KID_IMAGES]
        self._kept_features = torch.zeros(len(kept), width)
        self._kept_row = torch.full((count,), -1)  # for each image its row in _kept_features, -1 if it is not kept
        self._kept_row[kept] = torch.arange(len(kept))

    def add(self, features: Tensor) -> None:
        """Add the features (n, d) of the next images."""
        before, self.count = self.count, self.count + len(features)
        rows = self._kept_row[before : self.count]
        self._kept_features[rows[rows >= 0]] = features.cpu()[rows >= 0]
        features = features.to(self.mean)
        batch_mean = features.mean(0)
        shift, centred = batch_mean - self.mean, features - batch_mean
        self.mean += shift * (len(features) / self.count)
        self.scatter += centred.T @ centred + torch.outer(shift, shift) * (before * len(features) / self.count)

    def result(self) -> Statistics:
        """The statistics of all images so far."""
        covariance = self.scatter / (self.count - 1)
        return Statistics(self.mean.cpu().numpy(), covariance.cpu().numpy(), self._kept_features.numpy())


@torch.no_grad()
def feature_statistics(
    features: Callable[[Tensor], Tensor],
    images: Callable[[Sequence[range]], Iterator[Tensor]] | Tensor,
    accelerator: Accelerator,
    *,
    count: int,
    batch_size: int = 256,
) -> Statistics:
    """The statistics of the first `count` images, the same on every process.

    The processes share out whole batches, and each of them adds up all batches in their order, so that their number
    does not change the result. One batch per process is in memory at a time.

    Args:
        features: turns uint8 images (B, C, H, W) on the device into features (B, d).
        images: all images, or a function from the rows of some batches to an iterator over these batches.
        accelerator: gives the device and the processes.
        count: number of images.
        batch_size: images in one batch.

    Raises:
        InputError: fewer than two images.
    """
    rank, world, statistics = accelerator.process_index, accelerator.num_processes, None
    starts = range(rank * batch_size, rank * batch_size + count, world * batch_size)
    # a process for which no image is left takes one that it will not count, to learn the number of features
    batches = [range(start, min(start + batch_size, count)) or range(1) for start in starts]
    served = images(batches) if callable(images) else (images[rows.start : rows.stop] for rows in batches)
    for start, batch in zip(starts, served, strict=True):
        first = start - rank * batch_size
        batch_features = features(batch.to(accelerator.device)).float()
        width = batch_features.shape[1]
        gathered = batch_features.new_zeros(world * batch_size, width)
        if start < count:
            gathered[rank * batch_size :][: len(batch)] = batch_features
        gathered = accelerator.reduce(gathered, "sum")  # rows of other processes were 0 here
        statistics = statistics or RunningStatistics(count, width, gathered.device)
        for part in gathered[: count - first].split(batch_size):
            statistics.add(part)
    return statistics.result()


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """`|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`; NaN if a feature was not finite or no root is found.

    The trace of the root is the nuclear norm of `C1^(1/2) C2^(1/2)`, which is real, and exact for singular covariances.
    """
    if not all(np.isfinite(part).all() for part in (one.mean, one.covariance, other.mean, other.covariance)):
        return float("nan")
    try:
        trace_of_root = np.linalg.norm(one.covariance_root @ other.covariance_root, "nuc")
    except np.linalg.LinAlgError:  # no convergence; it must not end one process while the others wait for its number
        return float("nan")
    shift = one.mean - other.mean
    return float(shift @ shift + np.trace(one.covariance) + np.trace(other.covariance) - 2 * trace_of_root)


def kernel_distance(one: Statistics, other: Statistics) -> float:
    """torch-fidelity's KID: the mean over 10 random subsets of 1,000 images.

    Sets with fewer images are compared as one subset of the size of the smaller; that value is noisy.
    """
    size = min(KID_SUBSET_SIZE, len(one.features), len(other.features))
    values = kid_features_to_metric(
        torch.from_numpy(one.features).double(),
        torch.from_numpy(other.features).double(),
        kid_subset_size=size,
        kid_subsets=KID_SUBSETS if size == KID_SUBSET_SIZE else 1,
        verbose=False,
    )
    return values[KEY_METRIC_KID_MEAN]


def cached_statistics(
    folder: Path | None, key: dict, *, compute: Callable[[], Statistics], accelerator: Accelerator
) -> Statistics:
    """The statistics of a reference set, read from the cache or else computed and written there.

    Args:
        folder: the cache; None to use none.
        key: all that the statistics depend on (dataset, split, rows, size, features), in JSON types.
        compute: computes them; all processes call it together.
        accelerator: gives the processes.
    """
    text = json.dumps({**key, "kid_images": f"{KID_IMAGES} drawn"}, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz" if folder else None
    found = _read_statistics(path, text) if path else None
    # all or none must compute: a process that alone did not see the file would wait for the others for ever
    share_found = accelerator.reduce(torch.tensor(float(found is not None), device=accelerator.device), "mean")
    if share_found.item() == 1:
        return found
    statistics = compute()
    if path and accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"mean": statistics.mean, "covariance": statistics.covariance, "features": statistics.features}
        with replacing(path, "wb", f".{os.getpid()}.partial") as file:  # several runs may write here at a time
            np.savez(file, key=text, **arrays)
    return statistics


def _read_statistics(path: Path, key: str) -> Statistics | None:
    """The statistics in a cache file; None if it is missing, damaged or of another key."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) == key:
                return Statistics(file["mean"], file["covariance"], file["features"])
    except Exception:  # numpy and zipfile raise many kinds
        pass
    return None
