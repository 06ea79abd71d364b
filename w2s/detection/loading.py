"""How images with boxes are served: torchvision's transforms, batches of one aspect ratio, loaders.

Randomness is stateless, as in `loading`: the order of an epoch is a function of (seed, epoch), the augmentation of an
image of (seed, epoch, image).
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from w2s.engine.errors import InputError
from w2s.engine.loading import EpochBatches, loader_options, to_device
from w2s.engine.randomness import evenly_spread, own_randomness, seed_augmentation

ASPECT_BINS = 2.0 ** np.linspace(-1, 1, 7)  # of width over height, as in torchvision's reference


class DetectionSplit(Dataset):
    """Some annotated images under one transform.

    Args:
        source: an `Annotated`.
        rows: which images, in this order.
        first_label: what the detector calls the first class.
        transform: (image, target) -> (image, target); None: none.
        seed: of the augmentation; None for a transform without randomness.
    """

    def __init__(
        self,
        source: "w2s.detection.data.Annotated",  # noqa: F821
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
        """Image (3, H, W) in 0..1, and {boxes (n, 4) in its pixels, labels (n,), position}.

        Raises:
            InputError: the image is missing or corrupt; it is named.
        """
        row = self.rows[position]
        image = tv_tensors.Image(v2.functional.pil_to_tensor(read_checked(self.source, row)))
        boxes = torch.from_numpy(self.source.boxes[row])
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[-2:]))
        labels = torch.from_numpy(self.source.labels[row]) + self.first_label
        image, target = self.transform(image, {"boxes": boxes, "labels": labels})
        target = {name: value.as_subclass(torch.Tensor) for name, value in target.items()}
        return image.as_subclass(torch.Tensor), {**target, "position": position}


def train_transform(args) -> v2.Transform:
    """Flip, scale jitter or large-scale jitter (Ghiasi et al., arXiv 2012.07177), photometric distortion (SSD)."""
    parts = [v2.RandomPhotometricDistort()] if args.photometric else []
    if args.lsj:
        size = (args.lsj, args.lsj)
        parts += [v2.ScaleJitter(size, antialias=True), v2.RandomCrop(size, pad_if_needed=True, fill=127)]
    elif args.scale_jitter:
        low, high = args.scale_jitter
        parts.append(v2.RandomShortestSize(list(range(low, high + 1, 32)), max_size=args.max_size, antialias=True))
    parts += [v2.RandomHorizontalFlip(args.hflip), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*parts, v2.SanitizeBoundingBoxes(min_size=1.0)] if args.lsj else parts)


class GroupedBatches(EpochBatches):
    """Epochs whose global batches hold images of one group (an aspect ratio) each, but for what is left at the end."""

    def __init__(self, groups: list[int], *args: int, **kwargs: int) -> None:
        super().__init__(len(groups), *args, **kwargs)
        self.groups = groups

    def order(self, epoch: int) -> list[int]:
        """A permutation, reordered so that global batches cut from it fill up group by group."""
        full, waiting = [], {}
        for position in super().order(epoch):
            queue = waiting.setdefault(self.groups[position], [])
            queue.append(position)
            if len(queue) == self.batch_size * self.world:
                full += waiting.pop(self.groups[position])
        return full + [position for queue in waiting.values() for position in queue]


class SizedBatches:
    """Batches of images of one size, dealt to the processes in turn; each image once.

    So no image is padded for another's sake, and what a detector sees depends neither on the number of processes nor
    on the batch size.
    """

    def __init__(self, sizes: list[tuple[int, int]], batch_size: int, rank: int = 0, world: int = 1) -> None:
        order = sorted(range(len(sizes)), key=lambda position: (sizes[position], position))
        batches = []
        for _, same in groupby(order, key=lambda position: sizes[position]):
            same = list(same)
            batches += [same[k : k + batch_size] for k in range(0, len(same), batch_size)]
        self.batches = batches[rank::world]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter([[(0, position) for position in batch] for batch in self.batches])

    def __len__(self) -> int:
        return len(self.batches)


def train_batches(dataset: DetectionSplit, args, accelerator, start: int, batches: int) -> Iterator:
    """Endless (images, targets), lists, on this process's device, from micro-batch `start` of the run on, `batches` an
    epoch."""
    groups = [int(np.searchsorted(ASPECT_BINS, width / height, side="right")) for width, height in dataset.sizes]
    sampler = GroupedBatches(
        *(groups if args.group_aspect else [0] * len(groups), args.batch_size, batches, args.seed),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    sampler.start = start
    return to_device(_loader(dataset, sampler, args, accelerator), accelerator.device)


def eval_loader(dataset: DetectionSplit, args, accelerator) -> DataLoader:
    """This process's part of an evaluation split."""
    batch_size = args.validation_batch_size or args.batch_size
    sampler = SizedBatches(dataset.sizes, batch_size, accelerator.process_index, accelerator.num_processes)
    return _loader(dataset, sampler, args, accelerator)


def _loader(dataset: DetectionSplit, sampler, args, accelerator) -> DataLoader:
    generator = torch.Generator().manual_seed(args.seed)  # a loader without one draws from the global generator
    options = loader_options(workers=args.workers, device=accelerator.device)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=_lists, generator=generator, **options)


def _lists(items: list[tuple[torch.Tensor, dict]]) -> tuple[list[torch.Tensor], list[dict]]:
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)


def check_images(source: "w2s.detection.data.Annotated", rows: list[int], limit: int) -> None:  # noqa: F821
    """Decode up to `limit` images (all if negative), evenly spread: a corrupt one ends the run before it begins.

    Raises:
        InputError: an image is corrupt or not of the size its annotation gives; it is named.
    """
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda position: read_checked(source, rows[position]), evenly_spread(len(rows), limit)):
            pass


def read_checked(source: "w2s.detection.data.Annotated", row: int) -> Image.Image:  # noqa: F821
    """The image of a row.

    Raises:
        InputError: see `check_images`.
    """
    entry = source.images[row]
    name = entry.get("file_name", f"of id {entry['id']}")
    try:
        image = source.read(row)
    except Exception as error:  # Pillow raises many kinds
        raise InputError(f"corrupt image {name} of {source.where}: {' '.join(str(error).split())[:200]}") from None
    if image.size != (entry["width"], entry["height"]):
        told = entry["width"], entry["height"]
        raise InputError(f"image {name} is {image.size}, its annotation says {told} in {source.where}")
    return image
