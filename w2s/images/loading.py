"""How images are served: splits under a transform, and the loaders of training and evaluation."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from w2s.engine.loading import EpochBatches, EvalBatches, loader_options, to_device
from w2s.engine.randomness import own_randomness, seed_augmentation
from w2s.images.cache import CachedSplit
from w2s.images.datasets import read_image
from w2s.images.streams import stream_batches


class ImageSplit(Dataset):
    """Some images of a dataset under one transform.

    Args:
        dataset: `Digits`, or a timm or torchvision dataset with random access.
        rows: which of its images, in this order.
        mode: PIL mode, "RGB" or "L".
        transform: from a PIL image to a tensor.
        seed: of the augmentation; None for a transform without randomness.
        decoded: pixels and targets that need not be read again, by row.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        *,
        mode: str,
        transform: Callable,
        seed: int | None = None,
        decoded: dict[int, tuple[np.ndarray, int]] | None = None,
    ) -> None:
        self.dataset, self.rows, self.mode, self.transform, self.seed = dataset, rows, mode, transform, seed
        self.decoded = decoded or {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        """The images and targets of a batch. Keys are (epoch, position)."""
        if self.seed is None:
            return [self._item(position) for _, position in keys]
        with own_randomness():
            items = []
            for epoch, position in keys:
                seed_augmentation(self.seed, epoch, int(self.rows[position]))
                items.append(self._item(position))
            return items

    def _item(self, position: int) -> tuple[Tensor, int]:
        row = int(self.rows[position])
        if row in self.decoded:
            pixels, target = self.decoded[row]
            image = Image.fromarray(pixels)
        else:
            image, target = read_image(self.dataset, row, self.mode)
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
    if isinstance(dataset, CachedSplit):
        batches = dataset.train_batches(
            batch_size=batch_size,
            batches_per_epoch=batches_per_epoch,
            seed=seed,
            start=start,
            rank=rank,
            world=world,
        )
    elif isinstance(dataset, IterableDataset):
        batches = stream_batches(
            dataset,
            accelerator,
            batch_size=batch_size,
            batches_per_epoch=batches_per_epoch,
            start=start,
            seed=seed,
            workers=workers,
        )
    else:
        sampler = EpochBatches(
            len(dataset), batch_size=batch_size, batches=batches_per_epoch, seed=seed, rank=rank, world=world
        )
        sampler.start = start
        generator = torch.Generator().manual_seed(seed)  # a loader without one draws from the global generator
        options = loader_options(workers=workers, device=accelerator.device)
        batches = DataLoader(dataset, batch_sampler=sampler, generator=generator, **options)
    return to_device(batches, accelerator.device)


def eval_loader(dataset: Dataset, accelerator: Accelerator, *, batch_size: int, workers: int) -> Iterable:
    """Batches (images, targets) of a whole split, every image exactly once over all processes."""
    rank, world = accelerator.process_index, accelerator.num_processes
    if isinstance(dataset, CachedSplit):
        return dataset.eval_batches(batch_size=batch_size, rank=rank, world=world)
    options = loader_options(workers=workers, device=accelerator.device) | {"persistent_workers": False}
    generator = torch.Generator().manual_seed(0)
    if isinstance(dataset, IterableDataset):
        dataset.set_loader_cfg(num_workers=workers)
        return DataLoader(dataset, batch_size=batch_size, generator=generator, **options)
    sampler = EvalBatches(len(dataset), batch_size, rank=rank, world=world)
    return DataLoader(dataset, batch_sampler=sampler, generator=generator, **options)
