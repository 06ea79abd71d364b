"""How images are served: splits under a transform, and the loaders of training and evaluation."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count, repeat

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from w2s.engine.loading import EpochBatches, EvalBatches, loader_options, to_device
from w2s.engine.randomness import own_randomness, seed_augmentation
from w2s.images.cache import CachedSplit
from w2s.images.datasets import read_image
from w2s.images.pixels import DeviceTransform
from w2s.images.streams import stream_batches, with_known_labels


class ImageSplit(Dataset):
    """Some images of a dataset under one transform.

    Args:
        dataset: `Digits`, or a timm or torchvision dataset with random access.
        rows: which of its images, in this order.
        mode: PIL mode, "RGB" or "L".
        transform: from a PIL image to pixels (H, W, C), uint8.
        on_device: what happens to the pixels of a batch on the device that trains.
        seed: of the augmentation; None for a transform without randomness.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        *,
        mode: str,
        transform: Callable,
        on_device: DeviceTransform,
        seed: int | None = None,
    ) -> None:
        self.dataset, self.rows, self.mode, self.seed = dataset, rows, mode, seed
        self.transform, self.on_device = transform, on_device

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        """The pixels and targets of a batch. Keys are (epoch, position)."""
        if self.seed is None:
            return [self._item(position) for _, position in keys]
        with own_randomness():
            items = []
            for epoch, position in keys:
                seed_augmentation(self.seed, epoch, int(self.rows[position]))
                items.append(self._item(position))
            return items

    def _item(self, position: int) -> tuple[Tensor, int]:
        image, target = read_image(self.dataset, int(self.rows[position]), self.mode)
        return self.transform(image), target


def train_batches(
    dataset: Dataset,
    accelerator: Accelerator,
    *,
    batch_size: int,
    batches_per_epoch: int,
    start: int,
    seed: int,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (images, targets) of this process, on its device.

    Args:
        dataset: a `CachedSplit`, an `ImageSplit` or a stream.
        accelerator: gives the device and the processes.
        batch_size: images of one micro-batch of one process.
        batches_per_epoch: micro-batches of one process in an epoch.
        start: the micro-batch of the run to begin with.
        seed: of the order and the augmentation.
        workers: processes that load images, for each process that trains.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    run = {"batch_size": batch_size, "batches_per_epoch": batches_per_epoch, "seed": seed, "start": start}
    if isinstance(dataset, IterableDataset):
        batches = stream_batches(dataset, accelerator, workers=workers, **run)
        places = ((number * world + rank) * batch_size for number in count(start))  # of each batch in the run
        keys = ([(place + k,) for k in range(batch_size)] for place in places)
        return _finish(batches, dataset.on_device, accelerator.device, keys)
    sampler = EpochBatches(
        len(dataset), batch_size=batch_size, batches=batches_per_epoch, seed=seed, rank=rank, world=world
    )
    sampler.start = start
    if isinstance(dataset, CachedSplit):
        batches = dataset.train_batches(rank=rank, world=world, **run)
    else:
        generator = torch.Generator().manual_seed(seed)  # a loader without one draws from the global generator
        options = loader_options(workers=workers, device=accelerator.device)
        batches = DataLoader(dataset, batch_sampler=sampler, generator=generator, **options)
    return _finish(batches, dataset.on_device, accelerator.device, keys=sampler)


def eval_loader(
    dataset: Dataset, accelerator: Accelerator, *, batch_size: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, targets) of a whole split on this process's device, every image exactly once over all processes."""
    rank, world = accelerator.process_index, accelerator.num_processes
    options = loader_options(workers=workers, device=accelerator.device) | {"persistent_workers": False}
    generator = torch.Generator().manual_seed(0)
    if isinstance(dataset, CachedSplit):
        batches = dataset.eval_batches(batch_size=batch_size, rank=rank, world=world)
    elif isinstance(dataset, IterableDataset):
        dataset.set_loader_cfg(num_workers=workers)
        batches = DataLoader(dataset, batch_size=batch_size, generator=generator, **options)
        batches = with_known_labels(batches, dataset)
    else:
        sampler = EvalBatches(len(dataset), batch_size, rank=rank, world=world)
        batches = DataLoader(dataset, batch_sampler=sampler, generator=generator, **options)
    return _finish(batches, dataset.on_device, accelerator.device)


def _finish(
    batches: Iterable, on_device: DeviceTransform, device: torch.device, keys: Iterable | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels become images as soon as they are on the device. `keys`: of each batch, for random erasing."""
    if keys is None or on_device.erasing is None:
        keys = repeat(None)
    for (pixels, targets), batch_keys in zip(to_device(batches, device), keys):  # noqa: B905 - keys may be endless
        yield on_device(pixels, batch_keys), targets
