"""Images for diffusion: the training set in [-1, 1], and the sets that samples are compared with as uint8."""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.utils import make_grid

from w2s.engine.errors import InputError
from w2s.images.cache import CachedSplit, cache_split, resolve_cache
from w2s.images.data import STREAMS, check_images, class_names, image_mode, open_dataset, split_training, targets_of
from w2s.images.loading import ImageSplit, eval_transform
from w2s.record import replacing


@dataclass
class Reference:
    """A set of images that samples are compared with; `key` is what tells it from any other."""

    split: Dataset
    key: dict

    def __len__(self) -> int:
        return len(self.split)

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """Those images, uint8 (B, C, H, W)."""
        if isinstance(self.split, CachedSplit):
            return self.split.pixels[rows[0] : rows[-1] + 1].permute(0, 3, 1, 2)
        images = torch.stack([image for image, _ in self.split.__getitems__([(0, row) for row in rows])])
        return ((images + 1) * 127.5).round().to(torch.uint8)


class Unlabelled(Dataset):
    """The images of a dataset, all of one class: whatever stands in its labels is not looked at."""

    def __init__(self, source: Dataset) -> None:
        self.images, self.reader = getattr(source, "reader", source), self
        self.dataset = getattr(self.images, "dataset", None)  # of hfds readers
        self.split_name = getattr(source, "split_name", None)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.images[index][0], 0

    def filename(self, index: int, absolute: bool = False) -> str:
        """Of an image, as timm's readers have it."""
        return self.images.filename(index, absolute=absolute)


@dataclass
class PixelData:
    """What a run trains on, and what its samples are compared with: for the report, and for the switch-off."""

    train: Dataset  # batches (B, C, H, W) in [-1, 1] and labels, through w2s.images.loading.train_batches
    report: Reference
    switch: Reference
    num_classes: int
    samples: int  # training images an epoch
    cache: str  # what --cache came to
    sizes: dict


def load_pixels(args, accelerator, cache: str) -> PixelData:
    """Open, check and resize `--dataset` for a run; settles what `--cache auto` means.

    The shorter side is resized to --img-size and the centre cut out. The switch-off compares with the slice that
    --switch-split holds out of training, or with the training images where that is 0. Without --class-cond no labels
    are needed; where there are some that subsets can be balanced by, they are.

    Raises:
        InputError: see the functions this one calls.
    """
    if args.dataset.partition("/")[0] in STREAMS:
        raise InputError(f"--dataset {args.dataset} is a stream; diffusion needs images that can be read in any order")
    mode = image_mode(args)
    half = (0.5,) * args.in_chans
    config = {"input_size": (args.in_chans, args.img_size, args.img_size), "mean": half, "std": half}
    config |= {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    source = open_dataset(args, args.train_split, labelled=args.class_cond or args.target_key is not None)
    try:
        fraction = float(args.switch_split)
    except ValueError:
        raise InputError(f"--switch-split {args.switch_split}: a share of the training data, as 0.02") from None

    def cut(targets: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
        return split_training(targets, num_classes, fraction, args.train_samples, args.switch_seed)

    try:
        names = class_names(source)
        targets = targets_of(source, args.train_split, len(names) or None)
        num_classes = len(names) or int(targets.max()) + 1
        if args.class_cond and num_classes == 1:
            raise InputError(f"--class-cond: the images of split '{args.train_split}' have no labels, or one class")
        rows, held = cut(targets, num_classes)
    except InputError:
        if args.class_cond:
            raise
        source, num_classes = Unlabelled(source), 1
        rows, held = cut(np.zeros(len(source), np.int64), num_classes)
    plainly = argparse.Namespace(**vars(args), no_aug=True, pad_crop=None)  # what the cache is asked to do
    cache = resolve_cache(plainly, cache, len(rows), config, accelerator)
    device = accelerator.device if cache == "device" else torch.device("cpu")
    plain, flip = eval_transform(config), transforms.RandomHorizontalFlip(args.hflip)

    def split(part: Dataset, indices: np.ndarray, training: bool = False) -> Dataset:
        if cache != "none":
            cached = cache_split(ImageSplit(part, indices, None, mode), args, config, device, training=False)
            cached.hflip = args.hflip if training else 0.0
            return cached
        decoded = check_images(part, indices, mode, args.check_images)
        shape = transforms.Compose([flip, plain]) if training else plain
        return ImageSplit(part, indices, shape, mode, args.seed if training else None, decoded)

    def reference(part: Dataset, name: str, indices: np.ndarray, cached: Dataset | None = None) -> Reference:
        indices = indices[: 4 * args.batch_size] if args.dry_run else indices
        digest = hashlib.sha256(np.ascontiguousarray(indices, np.int64).tobytes()).hexdigest()
        place = str(Path(args.data_dir).resolve()) if args.data_dir else None
        key = {"dataset": identity(args.dataset, part), "folder": place, "column": args.input_key}
        key |= {"split": name, "rows": digest}
        key |= {"n": len(indices), "size": args.img_size, "channels": args.in_chans}
        return Reference(cached if cached is not None and not args.dry_run else split(part, indices), key)

    train = split(source, rows, training=True)
    trained = reference(source, args.train_split, rows, train if cache != "none" else None)
    other = args.fd_split not in (None, args.train_split)
    report = trained
    if other:
        against = Unlabelled(open_dataset(args, args.fd_split, labelled=False))
        report = reference(against, args.fd_split, np.arange(len(against)))
    switch = reference(source, args.train_split, held) if len(held) else trained
    sizes = {"train": len(rows), "switch": len(held), "report": len(report)}
    return PixelData(train, report, switch, num_classes=num_classes, samples=len(rows), cache=cache, sizes=sizes)


def identity(dataset: str, part: Dataset) -> list:
    """What tells `--dataset` from another of its name: hfds's may be a relative folder, or have come to new files."""
    kind, _, name = dataset.partition("/")
    if kind != "hfds":
        return [dataset]
    fingerprint = getattr(part.reader.dataset, "_fingerprint", None)  # of the files, made by the datasets library
    return [kind, str(Path(name).resolve()) if Path(name).exists() else name, fingerprint]


def save_grid(images: Tensor, path: Path, count: int = 64) -> None:
    """Write the first `count` images (N, C, H, W), uint8, as one PNG, small ones enlarged; complete or not at all."""
    scale = max(1, 48 // images.shape[-1])
    grid = make_grid(images[:count], nrow=8, padding=2).permute(1, 2, 0).numpy()
    with replacing(path, "wb") as file:
        Image.fromarray(grid.repeat(scale, 0).repeat(scale, 1)).save(file, format="PNG")
