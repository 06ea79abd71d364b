"""Image data: the built-in digits and every timm dataset, cut into train, switch and report splits.

Randomness is stateless: the order of an epoch is a function of (seed, epoch), the augmentation of an image of
(seed, epoch, index). So both arms of a comparison see the same batches, a resumed run sees exactly what is left, and
neither workers nor the number of processes change a pixel.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision import transforms

from w2s.options import InputError

STREAMS = ("wds", "hfids", "tfds")
# what fits small grey digits; an option given by the user or a recipe wins
DIGITS_DEFAULTS = {"img_size": 32, "hflip": 0.0, "mean": [0.5] * 3, "std": [0.5] * 3, "val_split": "test"}


class Digits(Dataset):
    """scikit-learn's handwritten digits: 1,797 real 8x8 images, 1,200 to train and 597 to test, the same every time."""

    class_to_idx: ClassVar = {str(digit): digit for digit in range(10)}

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        if split not in ("train", "test"):
            raise InputError(f"digits has the splits train and test, not '{split}'")
        digits = load_digits()
        parts = train_test_split(np.arange(1797), train_size=1200, random_state=0, stratify=digits.target)
        rows = parts[split == "test"]
        self.images = (digits.images[rows] * (255 / 16)).round().astype(np.uint8)
        self.targets = digits.target[rows]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.targets[index])


class ImageSplit(Dataset):
    """Some images of a dataset under one transform.

    Args:
        source: `Digits` or a timm/torchvision dataset with random access.
        indices: which images, in this order.
        transform: PIL image -> tensor.
        mode: PIL mode, "RGB" or "L".
        seed: of the augmentation; None for a transform without randomness.
    """

    def __init__(self, source: Dataset, indices: np.ndarray, transform: Callable, mode: str, seed: int | None) -> None:
        self.source, self.indices, self.transform, self.mode, self.seed = source, indices, transform, mode, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[torch.Tensor, int]]:
        """A batch: keys are (epoch, position)."""
        if self.seed is None:
            return [self._item(position) for _, position in keys]
        with _own_randomness():
            items = []
            for epoch, position in keys:
                _seed_augmentation(self.seed, epoch, int(self.indices[position]))
                items.append(self._item(position))
            return items

    def _item(self, position: int) -> tuple[torch.Tensor, int]:
        image, target = read_image(self.source, int(self.indices[position]), self.mode)
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
    except (OSError, SyntaxError, ValueError) as error:
        try:
            name = f" {reader.filename(index)}" if reader is not None and reader.filename(index) else ""
        except Exception:
            name = ""
        raise InputError(f"corrupt image{name} (row {index}): {' '.join(str(error).split())[:200]}") from None


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Let a block reseed the CPU generators without touching the caller's (the main process, with 0 workers)."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed_augmentation(*key: int) -> None:
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
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
            for k in range(batch, self.batches):
                begin = (k * self.world + self.rank) * self.batch_size
                yield [(epoch, position) for position in order[begin : begin + self.batch_size]]
            epoch, batch = epoch + 1, 0


class EvalBatches:
    """A batch sampler: every rank-th image in order, each exactly once over all processes, nothing padded."""

    def __init__(self, length: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.positions, self.batch_size = range(rank, length, world), batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for k in range(0, len(self.positions), self.batch_size):
            yield [(0, position) for position in self.positions[k : k + self.batch_size]]

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)


@dataclass
class ImageData:
    """The three splits of a run; `switch` is None where nothing is held out."""

    train: Dataset
    switch: Dataset | None
    report: Dataset
    num_classes: int
    samples: int  # training images an epoch
    facts: dict = field(default_factory=dict)  # sizes, for summary.json and the first lines


def open_dataset(args, split: str, training: bool = False, class_map: dict | None = None, samples: int | None = None):
    """A split of `--dataset`, through timm's factory.

    Raises:
        InputError: it cannot be opened or is empty.
    """
    if args.dataset == "digits":
        return Digits(split)
    kind = args.dataset.partition("/")[0]
    options = {"input_key": args.input_key, "target_key": args.target_key}
    if kind in STREAMS:
        options |= {"batch_size": args.batch_size, "num_samples": samples, "seed": args.seed}
    elif not args.dataset and not args.data_dir:
        raise InputError("no data: give --dataset (digits, hfds/NAME_OR_FOLDER, wds/...) or --data-dir FOLDER")
    try:
        dataset = create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            is_training=training,
            class_map=class_map,
            input_img_mode=image_mode(args),
            **options,
        )
    except Exception as error:  # every reader raises its own kinds
        where = " ".join(filter(None, [args.dataset, args.data_dir]))
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise InputError(f"cannot open split '{split}' of dataset {where}: {type(error).__name__}: {reason}") from None
    if kind not in STREAMS and len(dataset) == 0:
        raise InputError(f"split '{split}' of dataset {args.dataset or args.data_dir} is empty")
    return dataset


def image_mode(args) -> str:
    """The PIL mode for --in-chans."""
    if args.in_chans not in (1, 3):
        raise InputError(f"--in-chans {args.in_chans}: images have 1 or 3 channels")
    return "RGB" if args.in_chans == 3 else "L"


def targets_of(dataset: Dataset, split: str, num_classes: int | None) -> np.ndarray:
    """All labels of a dataset, checked.

    Raises:
        InputError: labels that are no integers, or out of range.
    """
    reader = getattr(dataset, "reader", None)
    try:
        if hasattr(dataset, "targets"):
            targets = np.asarray(dataset.targets)
        elif hasattr(reader, "samples"):
            targets = np.asarray([target for _, target in reader.samples])
        elif hasattr(reader, "label_key"):
            targets = np.asarray(reader.dataset.with_format("numpy")[reader.label_key][:])
        else:
            targets = np.asarray([dataset[i][1] for i in range(len(dataset))])
        targets = targets.astype(np.int64, casting="same_kind")
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"the labels of split '{split}' are no integers: {error}; see --target-key") from None
    top = num_classes if num_classes is not None else targets.max() + 1
    wrong = np.flatnonzero((targets < 0) | (targets >= top))
    if len(wrong):
        raise InputError(
            f"label {targets[wrong[0]]} of row {wrong[0]} in split '{split}' is out of range 0..{top - 1}; "
            "see --num-classes and --target-key"
        )
    return targets


def balanced(targets: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Sorted positions of `counts[c]` random items of each class c."""
    generator = np.random.default_rng(seed)
    picks = [generator.permutation(np.flatnonzero(targets == c))[:n] for c, n in enumerate(counts)]
    return np.sort(np.concatenate(picks))


def split_training(targets: np.ndarray, num_classes: int, fraction: float, samples: int | None, seed: int):
    """The rows to train on and the rows held out for the switch-off, class by class.

    The held-out slice depends on the labels, the fraction and the seed only; `samples` then takes a class-balanced
    subset of what is left.

    Returns:
        (train, switch): sorted row numbers; switch may be empty (fraction 0).

    Raises:
        InputError: fraction or samples impossible, a class with no image.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"--switch-split {fraction:g}: a share lies in [0, 1)")
    per_class = np.bincount(targets, minlength=num_classes)
    if empty := [c for c in range(num_classes) if per_class[c] == 0]:
        raise InputError(f"class {empty[0]} has no image in the training split ({len(empty)} such classes)")
    held = np.maximum(np.round(per_class * fraction).astype(int), 1) if fraction else np.zeros(num_classes, int)
    switch = balanced(targets, held, seed)
    train = np.setdiff1d(np.arange(len(targets)), switch)
    left = per_class - held
    if (left == 0).any():
        raise InputError(f"class {int(np.argmin(left))} has no image left to train on beside the switch split")
    if samples is not None:
        if not num_classes <= samples <= len(train):
            raise InputError(f"--train-samples {samples}: between {num_classes} and {len(train)} images are there")
        counts = np.full(num_classes, samples // num_classes)
        counts[: samples % num_classes] += 1
        counts = np.minimum(counts, left)
        while (missing := samples - counts.sum()) > 0:  # small classes are used up: the others fill in
            open_classes = np.flatnonzero(counts < left)[:missing]
            counts[open_classes] += 1
        train = train[balanced(targets[train], counts, seed)]
    return train, switch


def check_images(source: Dataset, indices: np.ndarray, mode: str, limit: int) -> None:
    """Decode up to `limit` images (all if negative), so that a corrupt one ends the run before it begins.

    Raises:
        InputError: an image is corrupt; it is named.
    """
    chosen = indices if limit < 0 else indices[:limit]
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda index: read_image(source, int(index), mode), chosen):
            pass


def load_data(args, data_config: dict, num_classes: int | None) -> ImageData:
    """Open, check and cut `--dataset` for a run.

    Raises:
        InputError: see the functions this one calls.
    """
    training, evaluation = train_transform(args, data_config), eval_transform(data_config)
    if args.dataset.partition("/")[0] in STREAMS:
        return _load_stream(args, training, evaluation, num_classes)
    mode = image_mode(args)
    source = open_dataset(args, args.train_split)
    names = class_names(source)
    num_classes = num_classes or (len(names) if names else None)
    targets = targets_of(source, args.train_split, num_classes)
    num_classes = num_classes or int(targets.max()) + 1
    report = open_dataset(args, args.val_split)
    if names and (own := class_names(report)) != names:
        if unknown := sorted(set(own) - set(names)):
            raise InputError(f"class '{unknown[0]}' of split '{args.val_split}' is not in '{args.train_split}'")
        report = open_dataset(args, args.val_split, class_map=names)
    targets_of(report, args.val_split, num_classes)
    try:
        fraction = float(args.switch_split)
    except ValueError:
        raise InputError(f"--switch-split {args.switch_split}: a share of the training data, as 0.02") from None
    train_rows, switch_rows = split_training(targets, num_classes, fraction, args.train_samples, args.switch_seed)
    report_rows = np.arange(len(report))
    for part, rows in ((source, train_rows), (source, switch_rows), (report, report_rows)):
        check_images(part, rows, mode, args.check_images)
    return ImageData(
        train=ImageSplit(source, train_rows, training, mode, args.seed),
        switch=ImageSplit(source, switch_rows, evaluation, mode, None) if len(switch_rows) else None,
        report=ImageSplit(report, report_rows, evaluation, mode, None),
        num_classes=num_classes,
        samples=len(train_rows),
        facts={"train": len(train_rows), "switch": len(switch_rows), "report": len(report_rows)},
    )


def class_names(dataset: Dataset) -> dict:
    """name -> index, empty where the dataset names no classes."""
    return getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {}


def _load_stream(args, training: Callable, evaluation: Callable, num_classes: int | None) -> ImageData:
    """Shards read in sequence: no random access, so the switch split is a split of its own."""
    if num_classes is None:
        raise InputError(f"--dataset {args.dataset} is a stream: give --num-classes")
    if args.train_samples is not None:
        raise InputError(f"--train-samples needs random access, which --dataset {args.dataset} has not")
    switch = None
    if args.teacher:
        try:
            float(args.switch_split)
        except ValueError:
            switch = open_dataset(args, args.switch_split)
        else:
            raise InputError(
                f"--dataset {args.dataset} is a stream and cannot be sliced: name held-out shards with --switch-split, "
                "and leave them out of --train-split"
            )
    train = open_dataset(args, args.train_split, training=True, samples=args.train_num_samples)
    report = open_dataset(args, args.val_split, samples=args.val_num_samples)
    train.transform, report.transform = training, evaluation
    if switch is not None:
        switch.transform = evaluation
    samples = args.train_num_samples or len(train)
    facts = {"train": samples, "switch": len(switch) if switch else 0, "report": len(report)}
    return ImageData(train, switch, report, num_classes, samples, facts)


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
        color_jitter=args.color_jitter,
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


def train_batches(data: ImageData, args, accelerator, start: int, batches: int) -> Iterator:
    """Endless (images, targets) of this process, from micro-batch `start` of the run on, `batches` an epoch."""
    options = _loader_options(args, accelerator)
    if isinstance(data.train, IterableDataset):
        yield from _stream_batches(data.train, args, accelerator, start, batches, options)
    sampler = EpochBatches(
        *(len(data.train), args.batch_size, batches, args.seed),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    sampler.start = start
    generator = torch.Generator().manual_seed(args.seed)  # a loader without one draws from the global generator
    yield from DataLoader(data.train, batch_sampler=sampler, generator=generator, **options)


def _stream_batches(dataset, args, accelerator, start: int, batches: int, options: dict) -> Iterator:
    epoch, skip = divmod(start, batches)
    dataset.set_loader_cfg(num_workers=args.workers)
    options = {**options, "persistent_workers": False}
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
    options = {**_loader_options(args, accelerator), "persistent_workers": False}
    generator = torch.Generator().manual_seed(0)
    batch_size = args.validation_batch_size or args.batch_size
    if isinstance(dataset, IterableDataset):
        dataset.set_loader_cfg(num_workers=args.workers)
        return DataLoader(dataset, batch_size=batch_size, generator=generator, **options)
    sampler = EvalBatches(len(dataset), batch_size, accelerator.process_index, accelerator.num_processes)
    return DataLoader(dataset, batch_sampler=sampler, generator=generator, **options)


def _loader_options(args, accelerator) -> dict:
    return {
        "num_workers": args.workers,
        "pin_memory": accelerator.device.type == "cuda",
        "persistent_workers": args.workers > 0,
    }
