"""Image data: the built-in digits and every timm dataset, checked and cut into train, switch and report splits."""

import dataclasses
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import PartialState
from timm.data import create_dataset
from torch.utils.data import Dataset

from w2s.engine.errors import InputError
from w2s.engine.randomness import evenly_spread
from w2s.images.cache import cache_split, resolve_cache
from w2s.images.digits import Digits
from w2s.images.loading import ImageSplit, eval_transform, read_image, train_transform

STREAMS = ("wds", "hfids", "tfds")


@dataclass
class ImageData:
    """The three splits of a run; `switch` is None where nothing is held out."""

    train: Dataset
    switch: Dataset | None
    report: Dataset
    num_classes: int
    samples: int  # training images an epoch
    cache: str  # what --cache came to: "device", "cpu" or "none"
    sizes: dict = field(default_factory=dict)  # of the splits, for summary.json and the first lines


def open_dataset(
    args,
    split: str,
    training: bool = False,
    class_map: dict | None = None,
    samples: int | None = None,
    labelled: bool = True,
):
    """A split of `--dataset`, through timm's factory; where it need not be `labelled` and is not, all of one class.

    Raises:
        InputError: it cannot be opened or is empty.
    """
    if args.dataset == "digits":
        return Digits(split)
    kind = args.dataset.partition("/")[0]
    if not args.dataset and args.data_dir and not os.path.exists(args.data_dir):
        raise InputError(f"--data-dir {args.data_dir}: no such folder")
    options = {"input_key": args.input_key, "target_key": args.target_key}
    if kind in STREAMS:
        options |= {"batch_size": args.batch_size, "num_samples": samples, "seed": args.seed}
    elif "/" not in args.dataset and not args.data_dir:
        what = f"--dataset {args.dataset}" if args.dataset else "no data"
        raise InputError(f"{what}: give --data-dir FOLDER, or --dataset digits, hfds/NAME_OR_FOLDER or wds/...")
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
    if kind in STREAMS:
        return dataset if training else _whole_split(dataset, args, split)
    dataset.split_name = split  # for errors
    if len(dataset) == 0:
        raise InputError(f"split '{split}' of dataset {args.dataset or args.data_dir} is empty")
    reader = getattr(dataset, "reader", None)
    if hasattr(reader, "samples") and os.path.isdir(args.data_dir) and os.path.samefile(reader.root, args.data_dir):
        raise InputError(f"{args.data_dir} has no folder for the split '{split}'")  # timm would take all of it
    for key, option in ((getattr(reader, "image_key", None), "input"), (getattr(reader, "label_key", None), "target")):
        if key and reader.dataset[0].get(key) is None:
            if option == "target" and not labelled:
                others = reader.dataset.select_columns([c for c in reader.dataset.column_names if c != key])
                reader.dataset = others.add_column(key, [0] * len(others))
                continue
            raise InputError(f"dataset {args.dataset} has nothing in column '{key}'; see --{option}-key")
    return dataset


def _whole_split(dataset: Dataset, args, split: str) -> Dataset:
    """An evaluation stream that every process reads its own shards of, each sample once; `total` is its length.

    timm's reader would make all processes serve the same number, repeating some samples and missing others.
    """
    reader = dataset.reader
    world, rank = PartialState().num_processes, PartialState().process_index
    dataset.total = getattr(reader, "num_samples", 0)
    if not dataset.total:
        raise InputError(f"the length of split '{split}' is not known; write it as 'SHARDS|LENGTH'")
    if world > 1:
        if not hasattr(getattr(reader, "split_info", None), "filenames"):
            raise InputError(f"--dataset {args.dataset}: only wds/ streams can be evaluated by several processes")
        files = tuple(reader.split_info.filenames)
        if len(files) < world:
            raise InputError(f"split '{split}' has {len(files)} shards, fewer than {world} processes")
        reader.split_info = dataclasses.replace(reader.split_info, filenames=files[rank::world])
        reader.dist_rank, reader.dist_num_replicas = 0, 1
    return dataset


def image_mode(args) -> str:
    """The PIL mode for --in-chans."""
    if args.in_chans not in (1, 3):
        raise InputError(f"--in-chans {args.in_chans}: images have 1 or 3 channels")
    return "RGB" if args.in_chans == 3 else "L"


def targets_of(dataset: Dataset, split: str, num_classes: int | None) -> np.ndarray:
    """All labels of a dataset, checked.

    Raises:
        InputError: labels that are no integers, or several an image, or out of range.
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
    if targets.ndim != 1:
        raise InputError(f"images of split '{split}' have {targets.shape[1]} labels each, not one; see --target-key")
    top = num_classes if num_classes is not None else targets.max() + 1
    wrong = np.flatnonzero((targets < 0) | (targets >= top))
    if len(wrong):
        raise InputError(
            f"label {targets[wrong[0]]} of row {wrong[0]} in split '{split}' is out of range 0..{max(top, 1) - 1}; "
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
    if seed < 0:
        raise InputError(f"--switch-seed {seed}: must be 0 or more")
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


def check_images(source: Dataset, indices: np.ndarray, mode: str, limit: int) -> dict[int, tuple[np.ndarray, int]]:
    """Decode up to `limit` images (all if negative), evenly spread: a corrupt one ends the run before it begins.

    Returns:
        Those of at most 64x64 pixels, by index: so small, they are kept rather than read again every epoch.

    Raises:
        InputError: an image is corrupt; it is named.
    """
    decoded = {}
    chosen = indices[evenly_spread(len(indices), limit)]
    with ThreadPoolExecutor() as pool:
        for index, (image, target) in zip(
            chosen, pool.map(lambda i: read_image(source, int(i), mode), chosen), strict=True
        ):
            if image.width * image.height <= 64 * 64:
                decoded[int(index)] = np.asarray(image), target
    return decoded


def load_data(args, data_config: dict, num_classes: int | None, accelerator, cache: str) -> ImageData:
    """Open, check and cut `--dataset` for a run; settles what `--cache auto` means.

    Raises:
        InputError: see the functions this one calls.
    """
    try:
        training, evaluation = train_transform(args, data_config), eval_transform(data_config)
    except Exception as error:  # timm checks --aa, --interpolation, --remode and the like by assertion and look-up
        raise InputError(f"cannot build the transforms: {type(error).__name__}: {error}") from None
    if args.dataset.partition("/")[0] in STREAMS:
        return _load_stream(args, training, evaluation, num_classes, cache)
    mode = image_mode(args)
    source = open_dataset(args, args.train_split)
    names = class_names(source)
    num_classes = num_classes or (len(names) if names else None)
    targets = targets_of(source, args.train_split, num_classes)
    num_classes = num_classes or int(targets.max()) + 1
    _refuse_empty(targets, args.train_split, num_classes, names)
    report = open_dataset(args, args.val_split)
    own = class_names(report)
    if names and own != names:
        if unknown := sorted(set(own) - set(names)):
            folder = os.path.join(getattr(getattr(source, "reader", None), "root", None) or "", unknown[0])
            if os.path.isdir(folder):  # timm's readers know no class without an image
                raise InputError(f"class '{unknown[0]}' of split '{args.train_split}' has no image")
            raise InputError(f"class '{unknown[0]}' of split '{args.val_split}' is not in '{args.train_split}'")
        if missing := sorted(set(names) - set(own)) if own else []:
            raise InputError(
                f"class '{missing[0]}' of split '{args.val_split}' has no image ({len(missing)} such classes)"
            )
        report = open_dataset(args, args.val_split, class_map=names)
    _refuse_empty(targets_of(report, args.val_split, num_classes), args.val_split, num_classes, own)
    if args.train_split == args.val_split:
        raise InputError(f"training and reporting on the same split '{args.val_split}'; see --train-split, --val-split")
    try:
        fraction = float(args.switch_split)
    except ValueError:
        raise InputError(f"--switch-split {args.switch_split}: a share of the training data, as 0.02") from None
    train_rows, switch_rows = split_training(targets, num_classes, fraction, args.train_samples, args.switch_seed)
    report_rows = np.arange(len(report))
    if args.dry_run:
        switch_rows, report_rows = (rows[: 4 * args.batch_size] for rows in (switch_rows, report_rows))

    cache = resolve_cache(args, cache, len(train_rows), data_config, accelerator)
    device = accelerator.device if cache == "device" else torch.device("cpu")

    def split(part: Dataset, rows: np.ndarray, transform: Callable, seed: int | None = None) -> Dataset:
        unused = args.eval_only and part is source
        if cache != "none" and not unused:
            return cache_split(ImageSplit(part, rows, None, mode), args, data_config, device, training=seed is not None)
        limit = 0 if unused else args.check_images
        return ImageSplit(part, rows, transform, mode, seed, check_images(part, rows, mode, limit))

    return ImageData(
        train=split(source, train_rows, training, args.seed),
        switch=split(source, switch_rows, evaluation) if len(switch_rows) else None,
        report=split(report, report_rows, evaluation),
        num_classes=num_classes,
        samples=len(train_rows),
        cache=cache,
        sizes={"train": len(train_rows), "switch": len(switch_rows), "report": len(report_rows)},
    )


def _refuse_empty(targets: np.ndarray, split: str, num_classes: int, names: dict) -> None:
    if empty := np.flatnonzero(np.bincount(targets, minlength=num_classes) == 0).tolist():
        name = next((f"'{name}'" for name, index in names.items() if index == empty[0]), empty[0])
        raise InputError(f"class {name} of split '{split}' has no image ({len(empty)} such classes)")


def class_names(dataset: Dataset) -> dict:
    """name -> index, empty where the dataset names no classes."""
    return getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {}


def _load_stream(args, training: Callable, evaluation: Callable, num_classes: int | None, cache: str) -> ImageData:
    """Shards read in sequence: no random access, so the switch split is a split of its own."""
    if num_classes is None:
        raise InputError(f"--dataset {args.dataset} is a stream: give --num-classes")
    if args.train_samples is not None:
        raise InputError(f"--train-samples needs random access, which --dataset {args.dataset} has not")
    if cache not in ("auto", "none"):
        raise InputError(f"--cache {cache}: --dataset {args.dataset} is a stream and cannot be kept")
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
    samples = args.train_num_samples or getattr(train.reader, "num_samples", 0) or len(train)
    shards = len(getattr(getattr(train.reader, "split_info", None), "filenames", ())) or math.inf
    readers = max(args.workers, 1) * PartialState().num_processes
    if shards < readers:
        raise InputError(f"split '{args.train_split}' has {shards} shards, fewer than {readers} loader workers")
    sizes = {"train": samples, "switch": switch.total if switch is not None else 0, "report": report.total}
    return ImageData(train, switch, report, num_classes=num_classes, samples=samples, cache="none", sizes=sizes)
