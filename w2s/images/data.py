"""The images of a run: opened, checked and cut into the training, the switch and the reporting split."""

import itertools
import math
import os
from dataclasses import dataclass
from functools import partial

import numpy as np
from accelerate import Accelerator, PartialState
from torch import nn
from torch.utils.data import Dataset

from w2s.engine.decoding import check_readable_rows
from w2s.engine.errors import InputError
from w2s.engine.options import switch_fraction
from w2s.images.augmentation import (
    cache_obstacle,
    cached_crop_and_flip,
    cached_transform,
    classification_transform,
    device_transform,
    eval_transform,
)
from w2s.images.cache import CachedSplit, cache_device, cache_split, resolve_cache
from w2s.images.chance import guessing_metrics
from w2s.images.classes import Classes
from w2s.images.datasets import class_names, image_mode, open_dataset, read_image, targets_of
from w2s.images.loading import ImageSplit
from w2s.images.splits import stratified_split
from w2s.images.streams import is_stream, open_stream

SWITCH = "switch"  # --val-split: report on the switch split, to choose settings on images that no result is read from


@dataclass
class ImageData:
    """The three splits of a run.

    Attributes:
        train: None where the run only evaluates.
        switch: None where nothing is held out, or the run only evaluates.
        report: the split that is reported on.
        classes: of the labels, and their names where the data have names.
        samples: training images an epoch.
        cache: what `--cache` means for this run: "device", "cpu" or "none".
        sizes: of the splits, for summary.json and the first lines.
        guess: what guessing scores on the reporting split, see `guessing_metrics`.
    """

    train: Dataset | None
    switch: Dataset | None
    report: Dataset
    classes: Classes
    samples: int
    cache: str
    sizes: dict[str, int]
    guess: dict[str, float]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return self.classes.count

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is reported of a classifier. Of five classes or fewer top5 would always be 100."""
        return ("top1", "top5", "eval_loss") if self.num_classes > 5 else ("top1", "eval_loss")


def load_data(args, data_config: dict, accelerator: Accelerator, *, cache: str) -> ImageData:
    """Open, check and cut `--dataset` for a run, and settle what `--cache auto` means.

    Args:
        args: resolved options; this reads those of the groups "data" and "augmentation", and the switch split.
        data_config: timm's data config: input_size, mean, std, interpolation, crop_pct.
        accelerator: gives the device and the processes.
        cache: the value of `--cache`, or what a resumed run had settled on.

    Raises:
        InputError: the data cannot be opened or read, do not fit the options, or cannot be cut as they ask.
    """
    if args.class_map and args.dataset:
        raise InputError(f"--class-map: the labels of --dataset {args.dataset} are numbers already; leave it out")
    if is_stream(args.dataset):
        return _load_stream(args, data_config, accelerator, cache=cache)
    mode = image_mode(args.in_chans)
    dataset, targets, report, report_targets, num_classes = _open_checked(args, mode)
    if num_classes < 2:
        raise InputError(f"only one class in split '{args.train_split}': images belong in FOLDER/train/CLASS/")
    train_rows, switch_rows = stratified_split(
        targets,
        num_classes=num_classes,
        fraction=switch_fraction(args.switch_split),
        samples=args.train_samples,
        seed=args.switch_seed,
    )
    report_rows = switch_rows if args.val_split == SWITCH else np.arange(len(report))
    if len(report_rows) == 0:
        raise InputError("--val-split switch reports on the switch split: give --switch-split a share above 0")
    if args.dry_run:
        switch_rows, report_rows = switch_rows[: 4 * args.batch_size], report_rows[: 4 * args.batch_size]
    cache = resolve_cache(
        cache,
        obstacle=cache_obstacle(args),
        images=len(train_rows),
        input_size=data_config["input_size"],
        pad=args.pad_crop or 0,
        accelerator=accelerator,
    )

    build_split = partial(_build_split, args, data_config, accelerator, mode=mode, cache=cache)
    return ImageData(
        train=None if args.eval_only else build_split(dataset, train_rows, training=True),
        switch=build_split(dataset, switch_rows) if len(switch_rows) and not args.eval_only else None,
        report=build_split(report, report_rows),
        classes=_named_classes(dataset, num_classes),
        samples=len(train_rows),
        cache=cache,
        sizes={"train": len(train_rows), "switch": len(switch_rows), "report": len(report_rows)},
        guess=guessing_metrics(report_targets[report_rows], num_classes),
    )


def _build_split(
    args,
    data_config: dict,
    accelerator: Accelerator,
    dataset: Dataset,
    rows: np.ndarray,
    *,
    mode: str,
    cache: str,
    training: bool = False,
) -> CachedSplit | ImageSplit:
    """Some images, augmented in training. Where `--cache` does not keep them, they are read in every epoch."""
    transforms = {
        "transform": classification_transform(args, data_config) if training else eval_transform(data_config),
        "on_device": device_transform(args, data_config, accelerator.device, training=training),
    }
    if (device := cache_device(cache, accelerator)) is None:
        check_readable_rows(lambda row: read_image(dataset, row, mode), rows, args.check_images)
        return ImageSplit(dataset, rows, mode=mode, seed=args.seed if training else None, **transforms)
    if training:
        transforms |= {"transform": cached_transform(args, data_config), **cached_crop_and_flip(args)}
    return cache_split(dataset, rows, mode=mode, input_size=data_config["input_size"], device=device, **transforms)


def set_config(model: nn.Module, data_config: dict, classes: Classes) -> None:
    """Make the images and the classes of a run the pretrained_cfg of its model, so that an export is complete.

    Args:
        model: a timm model.
        data_config: timm's data config of the run.
        classes: of the run's data.
    """
    model.pretrained_cfg = {
        **{k: v for k, v in model.pretrained_cfg.items() if not k.startswith("test_")},
        **{k: data_config[k] for k in ("input_size", "mean", "std", "interpolation", "crop_pct")},
        "num_classes": classes.count,
        "label_names": classes.namings[0] if classes.namings else None,
    }


def _named_classes(dataset: Dataset, count: int) -> Classes:
    """The classes of a dataset, with their names where each label has one."""
    names = {label: name for name, label in class_names(dataset).items()}
    is_named = sorted(names) == list(range(count))
    return Classes(count, (tuple(str(names[label]) for label in range(count)),) if is_named else ())


def _open_checked(args, mode: str) -> tuple[Dataset, np.ndarray, Dataset, np.ndarray, int]:
    """Open the training and the reporting split, with the same classes in both and images of every class.

    Returns:
        The training split, its labels (N,), the reporting split, its labels, and the number of classes.

    Raises:
        InputError: a split cannot be opened, or its classes are not those of the other.
    """
    open_split = partial(
        open_dataset,
        args.dataset,
        data_dir=args.data_dir,
        mode=mode,
        input_key=args.input_key,
        target_key=args.target_key,
    )
    train = open_split(args.train_split, class_map=args.class_map)
    names = class_names(train)
    num_classes = args.num_classes or len(names) or None
    targets = targets_of(train, args.train_split, num_classes)
    num_classes = num_classes or int(targets.max()) + 1
    _refuse_empty_classes(targets, args.train_split, num_classes=num_classes, names=names)
    if args.val_split == SWITCH:
        return train, targets, train, targets, num_classes
    report = open_split(args.val_split, class_map=args.class_map)
    report_names = class_names(report)
    if names and report_names != names:
        _check_class_names(
            train,
            names=names,
            report_names=report_names,
            train_split=args.train_split,
            val_split=args.val_split,
        )
        report = open_split(args.val_split, class_map=names)
    report_targets = targets_of(report, args.val_split, num_classes)
    _refuse_empty_classes(report_targets, args.val_split, num_classes=num_classes, names=report_names)
    if args.train_split == args.val_split:
        raise InputError(f"training and reporting on the same split '{args.val_split}'; see --train-split, --val-split")
    return train, targets, report, report_targets, num_classes


def _check_class_names(
    train: Dataset, *, names: dict[str, int], report_names: dict[str, int], train_split: str, val_split: str
) -> None:
    """Refuse a reporting split that names other classes than the training split."""
    if unknown := sorted(set(report_names) - set(names)):
        folder = os.path.join(getattr(getattr(train, "reader", None), "root", None) or "", unknown[0])
        if os.path.isdir(folder):  # timm's readers know no class without an image
            raise InputError(f"class '{unknown[0]}' of split '{train_split}' has no image")
        raise InputError(f"class '{unknown[0]}' of split '{val_split}' is not in '{train_split}'")
    missing = sorted(set(names) - set(report_names))
    if report_names and missing:
        raise InputError(f"class '{missing[0]}' of split '{val_split}' has no image ({len(missing)} such classes)")


def _refuse_empty_classes(targets: np.ndarray, split: str, *, num_classes: int, names: dict[str, int]) -> None:
    if empty := np.flatnonzero(np.bincount(targets, minlength=num_classes) == 0).tolist():
        name = next((f"'{name}'" for name, index in names.items() if index == empty[0]), empty[0])
        raise InputError(f"class {name} of split '{split}' has no image ({len(empty)} such classes)")


def _load_stream(args, data_config: dict, accelerator: Accelerator, *, cache: str) -> ImageData:
    """The data of a stream. It has no random access, so that the switch split must be a split of its own."""
    if args.num_classes is None:
        raise InputError(f"--dataset {args.dataset} is a stream: give --num-classes")
    if args.train_samples is not None:
        raise InputError(f"--train-samples needs random access, which --dataset {args.dataset} has not")
    if cache not in ("auto", "none"):
        raise InputError(f"--cache {cache}: --dataset {args.dataset} is a stream and cannot be kept")
    open_split = partial(
        open_stream,
        args.dataset,
        data_dir=args.data_dir,
        mode=image_mode(args.in_chans),
        batch_size=args.batch_size,
        seed=args.seed,
        input_key=args.input_key,
        target_key=args.target_key,
    )
    named = {"--train-split": args.train_split, "--val-split": args.val_split, "--switch-split": args.switch_split}
    for (option, split), (other, same) in itertools.combinations(named.items(), 2):
        if split == same:
            raise InputError(f"{option} and {other} are both '{split}': what is reported may not train, nor decide")
    report_transforms = eval_transform(data_config), device_transform(args, data_config, accelerator.device)
    switch = None
    if args.teacher and args.kd_off != "running":
        if _is_number(args.switch_split):
            raise InputError(
                f"--dataset {args.dataset} is a stream and cannot be sliced: name held-out shards with --switch-split "
                "and leave them out of --train-split, or give --kd-off running"
            )
        switch = open_split(args.switch_split)
        switch.transform, switch.on_device = report_transforms
    train = open_split(args.train_split, training=True, samples=args.train_num_samples)
    report = open_split(args.val_split, samples=args.val_num_samples)
    train.transform = classification_transform(args, data_config)
    train.on_device = device_transform(args, data_config, accelerator.device, training=True)
    report.transform, report.on_device = report_transforms
    for part in (train, report) if switch is None else (train, switch, report):
        part.num_classes = args.num_classes  # for `with_known_labels`
    shards = len(getattr(getattr(train.reader, "split_info", None), "filenames", ())) or math.inf
    readers = max(args.workers, 1) * PartialState().num_processes
    if shards < readers:
        raise InputError(f"split '{args.train_split}' has {shards} shards, fewer than {readers} loader workers")
    samples = args.train_num_samples or getattr(train.reader, "num_samples", 0) or len(train)
    return ImageData(
        train=train,
        switch=switch,
        report=report,
        classes=Classes(args.num_classes),
        samples=samples,
        cache="none",
        sizes={"train": samples, "switch": switch.total if switch is not None else 0, "report": report.total},
        guess=guessing_metrics(np.arange(args.num_classes), args.num_classes),  # as if the classes were equally large
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
