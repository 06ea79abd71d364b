"""Images for diffusion: the training set in [-1, 1], and the sets that samples are compared with as uint8."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.utils import make_grid

from w2s.engine.decoding import check_readable_rows
from w2s.engine.errors import InputError
from w2s.engine.launch import decide_on_main
from w2s.engine.loading import loader_options
from w2s.engine.options import switch_fraction
from w2s.images.augmentation import eval_transform
from w2s.images.cache import CachedSplit, cache_device, cache_split, resolve_cache
from w2s.images.datasets import class_names, image_mode, open_dataset, read_image, targets_of
from w2s.images.loading import ImageSplit
from w2s.images.pixels import DeviceTransform
from w2s.images.splits import stratified_split
from w2s.images.streams import is_stream
from w2s.record import replacing


@dataclass
class Reference:
    """A set of images that samples are compared with.

    Attributes:
        images: the images without augmentation.
        key: what tells the set from any other.
        workers: processes that load images which are not in memory.
    """

    images: CachedSplit | ImageSplit
    key: dict
    workers: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def __call__(self, batches: Sequence[range]) -> Iterator[Tensor]:
        """Batches of consecutive rows, uint8 (B, C, H, W), one after the other."""
        if isinstance(self.images, CachedSplit):
            pixels = (self.images.images[rows.start : rows.stop] for rows in batches)
        else:
            options = loader_options(workers=self.workers, device=torch.device("cpu")) | {"persistent_workers": False}
            keys = [[(0, row) for row in rows] for rows in batches]
            generator = torch.Generator().manual_seed(0)
            pixels = (batch for batch, _ in DataLoader(self.images, batch_sampler=keys, generator=generator, **options))
        for batch in pixels:
            yield batch.permute(0, 3, 1, 2)


class Unlabelled(Dataset):
    """The images of a dataset, all of class 0, whatever labels it has."""

    def __init__(self, labelled: Dataset) -> None:
        self.images, self.reader = getattr(labelled, "reader", labelled), self
        self.dataset = getattr(self.images, "dataset", None)  # of Hugging Face datasets
        self.split_name = getattr(labelled, "split_name", None)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.images[index][0], 0

    def filename(self, index: int, absolute: bool = False) -> str:
        """The file of an image, as timm's readers give it."""
        return self.images.filename(index, absolute=absolute)


@dataclass
class DiffusionData:
    """What a run trains on, and what its samples are compared with.

    Attributes:
        train: batches (B, C, H, W) in [-1, 1] and labels, through w2s.images.loading.train_batches.
        report: the images that the reported distance refers to.
        switch: the images that decide on the switch-off.
        num_classes: of the labels.
        samples: training images an epoch.
        cache: what `--cache` means for this run: "device", "cpu" or "none".
        sizes: of the splits, for summary.json and the first lines.
    """

    train: Dataset
    report: Reference
    switch: Reference
    num_classes: int
    samples: int
    cache: str
    sizes: dict[str, int]


def load_diffusion_data(args, accelerator: Accelerator, *, cache: str) -> DiffusionData:
    """Open, check and resize `--dataset` for a run, and settle what `--cache auto` means.

    The shorter side of each image is resized to --img-size and the centre cut out. The switch-off compares with the
    slice that --switch-split holds out of training, or with the training images where that is 0.

    Args:
        args: resolved options; this reads those of the group "data", --class-cond, --fd-split and the switch split.
        accelerator: gives the device and the processes.
        cache: the value of `--cache`, or what a resumed run had settled on.

    Raises:
        InputError: the data cannot be opened or read, do not fit the options, or cannot be cut as they ask.
    """
    if is_stream(args.dataset):
        raise InputError(f"--dataset {args.dataset} is a stream; diffusion needs images that can be read in any order")
    open_split = partial(
        open_dataset,
        args.dataset,
        data_dir=args.data_dir,
        mode=image_mode(args.in_chans),
        input_key=args.input_key,
        target_key=args.target_key,
    )
    labelled = args.class_cond or args.target_key is not None
    dataset, num_classes, train_rows, switch_rows = _cut(args, open_split(args.train_split, labelled=labelled))
    data_config = _data_config(args.img_size, args.in_chans)
    cache = resolve_cache(
        cache,
        obstacle=None,
        images=len(train_rows),
        input_size=data_config["input_size"],
        pad=0,
        accelerator=accelerator,
    )
    build_split = partial(_build_split, args, data_config=data_config, accelerator=accelerator, cache=cache)

    def reference(part: Dataset, split: str, rows: np.ndarray, cached: CachedSplit | None = None) -> Reference:
        if args.dry_run:
            rows, cached = rows[: 4 * args.batch_size], None
        images = build_split(part, rows) if cached is None else cached
        return Reference(images, key=_reference_key(args, part, split=split, rows=rows), workers=args.workers)

    train = build_split(dataset, train_rows, training=True)
    report = train_reference = reference(
        dataset, args.train_split, train_rows, cached=train if isinstance(train, CachedSplit) else None
    )
    if args.fd_split not in (None, args.train_split):
        others = Unlabelled(open_split(args.fd_split, labelled=False))
        report = reference(others, args.fd_split, np.arange(len(others)))
    switch = reference(dataset, args.train_split, switch_rows) if len(switch_rows) else train_reference
    return DiffusionData(
        train=train,
        report=report,
        switch=switch,
        num_classes=num_classes,
        samples=len(train_rows),
        cache=cache,
        sizes={"train": len(train_rows), "switch": len(switch_rows), "report": len(report)},
    )


def _cut(args, dataset: Dataset) -> tuple[Dataset, int, np.ndarray, np.ndarray]:
    """Choose the images to train on and those held out for the switch-off, class by class where there are labels.

    Returns:
        The dataset, `Unlabelled` where its labels are neither usable nor needed; the number of classes; the rows to
        train on; and the rows held out.

    Raises:
        InputError: the options ask for an impossible cut, or for labels that are not there.
    """
    split = partial(
        stratified_split,
        fraction=switch_fraction(args.switch_split),
        samples=args.train_samples,
        seed=args.switch_seed,
    )
    try:
        names = class_names(dataset)
        targets = targets_of(dataset, args.train_split, len(names) or None)
        num_classes = len(names) or int(targets.max()) + 1
        if args.class_cond and num_classes == 1:
            raise InputError(f"--class-cond: the images of split '{args.train_split}' have no labels, or one class")
        return dataset, num_classes, *split(targets, num_classes=num_classes)
    except InputError:
        if args.class_cond:
            raise
    dataset = Unlabelled(dataset)
    return dataset, 1, *split(np.zeros(len(dataset), np.int64), num_classes=1)


def _data_config(img_size: int, in_chans: int) -> dict:
    """timm's data config of images in [-1, 1]."""
    return {
        "input_size": (in_chans, img_size, img_size),
        "mean": (0.5,) * in_chans,
        "std": (0.5,) * in_chans,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }


def _build_split(
    args,
    dataset: Dataset,
    rows: np.ndarray,
    *,
    data_config: dict,
    accelerator: Accelerator,
    cache: str,
    training: bool = False,
) -> CachedSplit | ImageSplit:
    """Some images, flipped at random in training. Where they are not cached, they are read in every epoch."""
    mode, transform = image_mode(args.in_chans), eval_transform(data_config)
    mean, std = data_config["mean"], data_config["std"]
    on_device = DeviceTransform(mean, std, device=accelerator.device, channels_last=args.channels_last)
    if (device := cache_device(cache, accelerator)) is not None:
        return cache_split(
            dataset,
            rows,
            mode=mode,
            transform=transform,
            on_device=on_device,
            input_size=data_config["input_size"],
            device=device,
            hflip=args.hflip if training else 0.0,
        )
    check_readable_rows(lambda row: read_image(dataset, row, mode), rows, args.check_images)
    seed = None
    if training:
        transform, seed = transforms.Compose([transforms.RandomHorizontalFlip(args.hflip), transform]), args.seed
    return ImageSplit(dataset, rows, mode=mode, transform=transform, on_device=on_device, seed=seed)


def _reference_key(args, dataset: Dataset, *, split: str, rows: np.ndarray) -> dict:
    """A key that identifies the images of these rows; their statistics are stored under it."""
    return {
        "dataset": identity(args.dataset, dataset),
        "folder": str(Path(args.data_dir).resolve()) if args.data_dir else None,
        "column": args.input_key,
        "split": split,
        "rows": hashlib.sha256(np.ascontiguousarray(rows, np.int64).tobytes()).hexdigest(),
        "files": decide_on_main(partial(_files_digest, dataset, rows)),  # one look at each file is enough
        "n": len(rows),
        "size": args.img_size,
        "channels": args.in_chans,
    }


def _files_digest(dataset: Dataset, rows: np.ndarray) -> str | None:
    """Tells these files, or their tar, apart from others in their place; None for other readers.

    Hugging Face's datasets have a fingerprint, see `identity`.

    Raises:
        InputError: a file is gone.
    """
    reader = dataset.images if isinstance(dataset, Unlabelled) else getattr(dataset, "reader", None)
    if not isinstance(reader, ReaderImageFolder | ReaderImageInTar):
        return None
    paths = [reader.root] if isinstance(reader, ReaderImageInTar) else [reader.samples[row][0] for row in rows]
    sha = hashlib.sha256()
    for path in map(Path, paths):
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        sha.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return sha.hexdigest()


def identity(name: str, dataset: Dataset) -> list:
    """A key that differs between two datasets of the same `--dataset` name.

    The name of a Hugging Face dataset may be a relative folder, and its files may have been replaced.
    """
    kind, _, rest = name.partition("/")
    if kind != "hfds":
        return [name]
    fingerprint = getattr(dataset.reader.dataset, "_fingerprint", None)  # of the files, made by the datasets library
    return [kind, str(Path(rest).resolve()) if Path(rest).exists() else rest, fingerprint]


def save_grid(images: Tensor, path: Path, count: int = 64) -> None:
    """Write the first `count` images (N, C, H, W), uint8, as one PNG, with small ones enlarged.

    An older file stays as it was if that fails.
    """
    scale = max(1, 48 // images.shape[-1])
    grid = make_grid(images[:count], nrow=8, padding=2).permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
    with replacing(path, "wb") as file:
        Image.fromarray(grid).save(file, format="PNG")
