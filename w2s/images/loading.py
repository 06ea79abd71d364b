"""How images are served: transforms, loaders, streams."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision import transforms

from w2s.engine.errors import InputError
from w2s.engine.loading import EpochBatches, EvalBatches, loader_options, to_device
from w2s.engine.randomness import mix_seed, own_randomness, seed_augmentation
from w2s.images.cache import CachedSplit


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
        image, target = self.read(position)
        return self.transform(image), target

    def read(self, position: int) -> tuple[Image.Image, int]:
        """The decoded image and target at a position, before any transform."""
        index = int(self.indices[position])
        if index in self.decoded:
            pixels, target = self.decoded[index]
            return Image.fromarray(pixels), target
        return read_image(self.source, index, self.mode)


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
            path = reader.filename(index, absolute=True) if reader is not None else None
        except Exception:
            path = None
        name, split = f" {path}" if path else "", getattr(source, "split_name", None)
        where = f"row {index} of split '{split}'" if split else f"row {index}"
        raise InputError(f"corrupt image{name} ({where}): {' '.join(str(error).split())[:200]}") from None


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
    """Endless (images, targets) on this process's device, from micro-batch `start` of the run on.

    `batches` of them are an epoch.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    options = loader_options(workers=args.workers, device=accelerator.device)
    if isinstance(dataset, CachedSplit):
        source = dataset.train_batches(args.batch_size, batches, args.seed, start, rank, world)
    elif isinstance(dataset, IterableDataset):
        source = _stream_batches(dataset, args, accelerator, start, batches, options)
    else:
        sampler = EpochBatches(len(dataset), args.batch_size, batches, args.seed, rank, world)
        sampler.start = start
        generator = torch.Generator().manual_seed(args.seed)  # a loader without one draws from the global generator
        source = DataLoader(dataset, batch_sampler=sampler, generator=generator, **options)
    return to_device(source, accelerator.device)


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


def eval_loader(dataset: Dataset, args, accelerator) -> Iterable:
    """Every image of a split exactly once over all processes."""
    batch_size = args.validation_batch_size or args.batch_size
    if isinstance(dataset, CachedSplit):
        return dataset.eval_batches(batch_size, accelerator.process_index, accelerator.num_processes)
    options = {**loader_options(workers=args.workers, device=accelerator.device), "persistent_workers": False}
    generator = torch.Generator().manual_seed(0)
    if isinstance(dataset, IterableDataset):
        dataset.set_loader_cfg(num_workers=args.workers)
        return DataLoader(dataset, batch_size=batch_size, generator=generator, **options)
    sampler = EvalBatches(len(dataset), batch_size, accelerator.process_index, accelerator.num_processes)
    return DataLoader(dataset, batch_sampler=sampler, generator=generator, **options)
