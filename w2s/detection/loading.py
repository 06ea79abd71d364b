"""How images with boxes are served: torchvision's transforms, batches of one aspect ratio, loaders.

Randomness has no state, as in `w2s.engine.randomness`: the order of an epoch is a function of (seed, epoch), and the
augmentation of an image is a function of (seed, epoch, image).
"""

from collections.abc import Callable, Iterator
from itertools import groupby

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from w2s.detection.annotations import AnnotatedImages
from w2s.engine.errors import InputError, on_one_line
from w2s.engine.loading import EpochBatches, loader_options, to_device
from w2s.engine.randomness import own_randomness, seed_augmentation

ASPECT_BINS = 2.0 ** np.linspace(-1, 1, 7)  # borders of width over height, as in torchvision's reference


class DetectionSplit(Dataset):
    """Some annotated images under one transform.

    Args:
        source: the annotated images.
        rows: which of them, in this order.
        first_label: the number that the detector gives the first class.
        transform: (image, target) -> (image, target); None to convert the image to floats and nothing else.
        seed: of the augmentation; None for a transform without randomness.

    Attributes:
        sizes: (width, height) of each image in pixels.
        ids: of the images in the data.
    """

    def __init__(
        self,
        source: AnnotatedImages,
        rows: list[int],
        first_label: int,
        transform: Callable | None = None,
        seed: int | None = None,
    ) -> None:
        self.source, self.rows, self.first_label = source, rows, first_label
        self.transform, self.seed = transform or v2.ToDtype(torch.float32, scale=True), seed
        self.sizes = [(source.images[row]["width"], source.images[row]["height"]) for row in rows]
        self.ids = [source.images[row]["id"] for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[torch.Tensor, dict]]:
        """A batch: keys are (epoch, position)."""
        with own_randomness():
            items = []
            for epoch, position in keys:
                if self.seed is not None:
                    seed_augmentation(self.seed, epoch, self.rows[position])
                items.append(self.item(position))
            return items

    def item(self, position: int) -> tuple[torch.Tensor, dict]:
        """Image (3, H, W) in 0..1, and a target: boxes (n, 4) in pixels of the image, labels (n,), position.

        Raises:
            InputError: see `read_checked_image`.
        """
        row = self.rows[position]
        image = tv_tensors.Image(v2.functional.pil_to_tensor(read_checked_image(self.source, row)))
        boxes = torch.from_numpy(self.source.boxes[row])
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[-2:]))
        labels = torch.from_numpy(self.source.labels[row]) + self.first_label
        image, target = self.transform(image, {"boxes": boxes, "labels": labels})
        target = {name: value.as_subclass(torch.Tensor) for name, value in target.items()}
        return image.as_subclass(torch.Tensor), {**target, "position": position}


def detection_transform(
    *,
    hflip: float,
    photometric: bool = False,
    lsj: int | None = None,
    scale_jitter: tuple[int, int] | None = None,
    max_size: int | None = None,
) -> v2.Transform:
    """The augmentation of images with boxes, by torchvision's transforms.

    Args:
        hflip: probability of a horizontal flip.
        photometric: distort colours, as SSD does (Liu et al. 2016, arXiv 1512.02325).
        lsj: large-scale jitter (Ghiasi et al. 2021, arXiv 2012.07177) on a square canvas of so many pixels.
        scale_jitter: without `lsj`: lowest and highest length of the shorter side in pixels.
        max_size: with `scale_jitter`: highest length of the longer side in pixels.
    """
    parts = [v2.RandomPhotometricDistort()] if photometric else []
    if lsj:
        canvas = (lsj, lsj)
        parts += [v2.ScaleJitter(canvas, antialias=True), v2.RandomCrop(canvas, pad_if_needed=True, fill=127)]
    elif scale_jitter:
        low, high = scale_jitter
        parts.append(v2.RandomShortestSize(list(range(low, high + 1, 32)), max_size=max_size, antialias=True))
    parts += [v2.RandomHorizontalFlip(hflip), v2.ToDtype(torch.float32, scale=True)]
    if lsj:
        parts.append(v2.SanitizeBoundingBoxes(min_size=1.0))
    return v2.Compose(parts)


class GroupedBatches(EpochBatches):
    """Epochs whose updates hold images of one group (an aspect ratio) each, except those left at the end.

    Args:
        groups: the group of each image.
        micro_batches: of an update.
        batch_size, batches, seed, rank, world: see `EpochBatches`.
    """

    def __init__(
        self,
        groups: list[int],
        *,
        batch_size: int,
        batches: int,
        seed: int,
        micro_batches: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(len(groups), batch_size=batch_size, batches=batches, seed=seed, rank=rank, world=world)
        self.groups, self.per_update = groups, batch_size * micro_batches * world

    def order(self, epoch: int) -> list[int]:
        """A permutation, reordered so that updates cut from it fill up group by group."""
        full, waiting = [], {}
        for position in super().order(epoch):
            queue = waiting.setdefault(self.groups[position], [])
            queue.append(position)
            if len(queue) == self.per_update:
                full += waiting.pop(self.groups[position])
        return full + [position for queue in waiting.values() for position in queue]


class SameSizeBatches:
    """Batches of images of one size, dealt to the processes in turn, each image once.

    No image is padded to match another one. So what a detector sees depends neither on the number of processes nor on
    the batch size.

    Args:
        sizes: (width, height) of each image.
        batch_size: images of a batch at most.
        rank, world: this process and how many there are.
    """

    def __init__(self, sizes: list[tuple[int, int]], *, batch_size: int, rank: int = 0, world: int = 1) -> None:
        by_size = sorted(range(len(sizes)), key=lambda position: (sizes[position], position))
        batches = []
        for _, group in groupby(by_size, key=lambda position: sizes[position]):
            positions = list(group)
            batches += [positions[k : k + batch_size] for k in range(0, len(positions), batch_size)]
        self.batches = batches[rank::world]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter([[(0, position) for position in batch] for batch in self.batches])

    def __len__(self) -> int:
        return len(self.batches)


def train_batches(
    dataset: DetectionSplit,
    accelerator: Accelerator,
    *,
    batch_size: int,
    batches_per_epoch: int,
    micro_batches: int,
    start: int,
    seed: int,
    workers: int,
    group_aspect: bool,
) -> Iterator[tuple[list[torch.Tensor], list[dict]]]:
    """Endless batches of images and targets (see `DetectionSplit.item`) on this process's device.

    Args:
        dataset: the training split.
        accelerator: says which process this is, and its device.
        batch_size: images of a micro-batch of this process.
        batches_per_epoch: micro-batches of an epoch.
        micro_batches: of an update.
        start: the micro-batch of the run to begin with.
        seed: of the order.
        workers: loader processes.
        group_aspect: put images of similar aspect ratio into a batch.
    """
    if group_aspect:
        groups = [int(np.searchsorted(ASPECT_BINS, width / height, side="right")) for width, height in dataset.sizes]
    else:
        groups = [0] * len(dataset)
    sampler = GroupedBatches(
        groups,
        batch_size=batch_size,
        batches=batches_per_epoch,
        micro_batches=micro_batches,
        seed=seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    sampler.start = start
    return to_device(_loader(dataset, sampler, accelerator, workers), accelerator.device)


def eval_loader(dataset: DetectionSplit, accelerator: Accelerator, *, batch_size: int, workers: int) -> DataLoader:
    """This process's part of an evaluation split, as batches of images and targets on the CPU."""
    sampler = SameSizeBatches(
        dataset.sizes, batch_size=batch_size, rank=accelerator.process_index, world=accelerator.num_processes
    )
    return _loader(dataset, sampler, accelerator, workers)


def _loader(
    dataset: DetectionSplit, sampler: EpochBatches | SameSizeBatches, accelerator: Accelerator, workers: int
) -> DataLoader:
    generator = torch.Generator().manual_seed(0)  # a loader without one would draw from the global generator
    options = loader_options(workers=workers, device=accelerator.device)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_detection, generator=generator, **options)


def collate_detection(items: list[tuple[torch.Tensor, dict]]) -> tuple[list[torch.Tensor], list[dict]]:
    """Lists of images and targets: images of a batch may differ in size."""
    return [image for image, _ in items], [target for _, target in items]


def read_checked_image(source: AnnotatedImages, row: int) -> Image.Image:
    """The RGB image of a row.

    Raises:
        InputError: it is missing, corrupt, or of another size than its annotation says; the message names it.
    """
    entry = source.images[row]
    name = entry.get("file_name", f"of id {entry['id']}")
    try:
        image = source.read(row)
    except Exception as error:  # Pillow raises many kinds
        raise InputError(f"corrupt image {name} of {source.where}: {on_one_line(error, limit=200)}") from None
    annotated_size = entry["width"], entry["height"]
    if image.size != annotated_size:
        raise InputError(f"image {name} is {image.size}, its annotation says {annotated_size} in {source.where}")
    return image
