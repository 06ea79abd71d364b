"""How images are served: transforms, the order of an epoch, its randomness, loaders.

Randomness is stateless: the order of an epoch is a function of (seed, epoch), the augmentation of an image of
(seed, epoch, index). So both arms of a comparison see the same batches, a resumed run sees exactly what is left, and
neither workers nor the number of processes change a pixel.
"""

import contextlib
import random
import signal
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision import transforms

from w2s.options import InputError


class ImageSplit(Dataset):
    """Some images of a dataset under one transform.

    Args:
        source: `Digits` or a timm/torchvision dataset with random access.
        indices: which images, in this order.
        transform: PIL image -> tensor.
        mode: PIL mode, "RGB" or "L".
        seed: of the augmentation; None for a transform without randomness.
        decoded: images that need not be read again, by index.
    """

    def __init__(
        self,
        source: Dataset,
        indices: np.ndarray,
        transform: Callable,
        mode: str,
        seed: int | None = None,
        decoded: dict[int, tuple[np.ndarray, int]] | None = None,
    ) -> None:
        self.source, self.indices, self.transform, self.mode, self.seed = source, indices, transform, mode, seed
        self.decoded = decoded or {}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[torch.Tensor, int]]:
        """A batch: keys are (epoch, position)."""
        if self.seed is None:
            return [self._item(position) for _, position in keys]
        with own_randomness():
            items = []
            for epoch, position in keys:
                seed_augmentation(self.seed, epoch, int(self.indices[position]))
                items.append(self._item(position))
            return items

    def _item(self, position: int) -> tuple[torch.Tensor, int]:
        index = int(self.indices[position])
        if index in self.decoded:
            pixels, target = self.decoded[index]
            return self.transform(Image.fromarray(pixels)), target
        image, target = read_image(self.source, index, self.mode)
        return self.transform(image), target


def read_image(source: Dataset, index: int, mode: str) -> tuple[Image.Image, int]:
    """The decoded image and target of one row.

    Raises:
        InputError: the image is missing or corrupt; it is named. (timm would silently take the next one.)
    """
    reader = getattr(source, "reader", None)
    try:
        image, target = (reader[index] if reader is not None else source[index])[:2]
        if not isinstance(image, Image.Image):
            with image:
                return Image.open(image).convert(mode), int(target)
        return image.convert(mode), int(target)
    except Exception as error:  # Pillow and the readers raise many kinds
        try:
            name = f" {reader.filename(index)}" if reader is not None and reader.filename(index) else ""
        except Exception:
            name = ""
        raise InputError(f"corrupt image{name} (row {index}): {' '.join(str(error).split())[:200]}") from None


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """Let a block reseed the CPU generators without touching the caller's (the main process, with 0 workers)."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_augmentation(*key: int) -> None:
    seed = mix_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)  # the CPU's only: torch.manual_seed would reset the GPU's too


def mix_seed(*key: int) -> int:
    """A 63-bit seed from a tuple of integers; nearby tuples give unrelated seeds (splitmix64)."""
    state = 0
    for part in key:
        state = (state + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


class EpochBatches:
    """A batch sampler: the batches of one process, epoch after epoch, from any point on.

    Global batches are cut from a permutation of (seed, epoch); process r takes the r-th part of each. So one process
    with batch 2B and two with batch B train on the same images in every update.
    """

    def __init__(self, length: int, batch_size: int, batches: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.length, self.batch_size, self.batches, self.seed = length, batch_size, batches, seed
        self.rank, self.world, self.start = rank, world, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, batch = divmod(self.start, self.batches)
        while True:
            order = self.order(epoch)
            for k in range(batch, self.batches):
                begin = (k * self.world + self.rank) * self.batch_size
                yield [(epoch, position) for position in order[begin : begin + self.batch_size]]
            epoch, batch = epoch + 1, 0

    def order(self, epoch: int) -> list[int]:
        """All positions in the order of an epoch, the same on all processes."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        return torch.randperm(self.length, generator=generator).tolist()


class EvalBatches:
    """A batch sampler: every rank-th image in order, each exactly once over all processes, nothing padded."""

    def __init__(self, length: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.positions, self.batch_size = range(rank, length, world), batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for k in range(0, len(self.positions), self.batch_size):
            yield [(0, position) for position in self.positions[k : k + self.batch_size]]

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)


def train_transform(args, data_config: dict) -> Callable:
    """timm's training transform; with `--pad-crop` the crop of small images: pad, random crop, flip."""
    parts = create_transform(
        data_config["input_size"],
        is_training=True,
        no_aug=args.no_aug,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter or None,  # 0 would still cost its random draws
        auto_augment=args.aa,
        interpolation=args.train_interpolation or data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        re_prob=args.reprob,
        re_mode=args.remode,
        separate=not args.no_aug,
    )
    if args.no_aug:
        return parts
    primary, secondary, final = parts
    if args.pad_crop is not None:
        size = list(data_config["input_size"][-2:])
        primary = transforms.Compose(
            [
                transforms.Resize(size, transforms.InterpolationMode(data_config["interpolation"])),
                transforms.RandomCrop(size, padding=args.pad_crop),
                transforms.RandomHorizontalFlip(args.hflip),
                transforms.RandomVerticalFlip(args.vflip),
            ]
        )
    return transforms.Compose([primary, secondary, final])


def eval_transform(data_config: dict) -> Callable:
    """timm's evaluation transform."""
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return create_transform(is_training=False, **{k: data_config[k] for k in keys if k in data_config})


def train_batches(dataset: Dataset, args, accelerator, start: int, batches: int) -> Iterator:
    """Endless (images, targets) of this process, from micro-batch `start` of the run on, `batches` an epoch."""
    options = loader_options(args, accelerator)
    if isinstance(dataset, IterableDataset):
        yield from _stream_batches(dataset, args, accelerator, start, batches, options)
    sampler = EpochBatches(
        *(len(dataset), args.batch_size, batches, args.seed),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    sampler.start = start
    generator = torch.Generator().manual_seed(args.seed)  # a loader without one draws from the global generator
    yield from DataLoader(dataset, batch_sampler=sampler, generator=generator, **options)


def _stream_batches(dataset, args, accelerator, start: int, batches: int, options: dict) -> Iterator:
    epoch, skip = divmod(start, batches)
    # at least one worker, made anew for every epoch: its seed is all that shuffling and augmentation hang on
    options = {**options, "persistent_workers": False, "num_workers": max(args.workers, 1)}
    dataset.set_loader_cfg(num_workers=options["num_workers"])
    while True:
        left = batches
        dataset.set_epoch(epoch)
        generator = torch.Generator().manual_seed(mix_seed(args.seed, epoch, accelerator.process_index))
        loader = DataLoader(dataset, batch_size=args.batch_size, drop_last=True, generator=generator, **options)
        for batch in loader:
            left -= 1
            if skip:
                skip -= 1
            else:
                yield batch
            if left == 0:
                break
        if left == batches:
            raise InputError(f"split '{args.train_split}' gives no batch: too few shards for {args.workers} workers?")
        epoch += 1


def eval_loader(dataset: Dataset, args, accelerator) -> DataLoader:
    """Every image of a split exactly once over all processes."""
    options = {**loader_options(args, accelerator), "persistent_workers": False}
    generator = torch.Generator().manual_seed(0)
    batch_size = args.validation_batch_size or args.batch_size
    if isinstance(dataset, IterableDataset):
        dataset.set_loader_cfg(num_workers=args.workers)
        return DataLoader(dataset, batch_size=batch_size, generator=generator, **options)
    sampler = EvalBatches(len(dataset), batch_size, accelerator.process_index, accelerator.num_processes)
    return DataLoader(dataset, batch_sampler=sampler, generator=generator, **options)


def loader_options(args, accelerator) -> dict:
    return {
        "num_workers": args.workers,
        "pin_memory": accelerator.device.type == "cuda",
        "persistent_workers": args.workers > 0,
        "worker_init_fn": _leave_signals_to_parent,
    }


def _leave_signals_to_parent(_: int) -> None:
    """Ctrl-C and job schedulers signal every process: a worker that dies of it would take the last batches with it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
