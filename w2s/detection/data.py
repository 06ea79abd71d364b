"""The detection data of a run: a COCO folder, a Hugging Face set or the built-in digits, opened and cut into splits."""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torchvision.transforms import v2

from w2s.detection.annotations import AnnotatedImages, read_coco
from w2s.detection.digits import built_in_digits, check_digits
from w2s.detection.hf_data import open_hf
from w2s.detection.loading import DetectionSplit, read_checked_image
from w2s.engine.decoding import check_readable_rows
from w2s.engine.errors import InputError


@dataclass
class DetectionData:
    """The splits of a training.

    Attributes:
        train: the images to train on.
        switch: the images held out of training for the switch-off; None where there are none.
        report: the images that are reported on.
        classes: the names of the classes in the order of their labels.
        sizes: images of the splits and boxes of the training split, for summary.json and the first lines of a run.
    """

    train: DetectionSplit
    switch: DetectionSplit | None
    report: DetectionSplit
    classes: list[str]
    sizes: dict[str, int]


def open_detection(
    data: str | None,
    *,
    train_images: str | None,
    train_json: str | None,
    val_images: str | None,
    val_json: str | None,
    output: Path,
    train_split: str,
    val_split: str,
    image_key: str,
    objects_key: str,
    bbox_format: str,
    fix_boxes: bool,
    with_train: bool,
) -> tuple[AnnotatedImages | None, AnnotatedImages]:
    """The training and the reporting images with checked annotations; None for the former unless `with_train`.

    Args:
        data: a folder in COCO's layout, "digits_det", or "hfds/" and the name or folder of a Hugging Face set; None
            for the four explicit paths.
        train_images, train_json, val_images, val_json: image folders and annotation files in place of `data`.
        output: the folder of all runs, where the built-in digits are kept.
        train_split, val_split, image_key, objects_key, bbox_format: of a Hugging Face set, see `open_hf`.
        fix_boxes: see `annotate`.
        with_train: whether training images are needed.

    Raises:
        InputError: data are missing or named twice, `annotate` refuses the annotations, or there is nothing to report.
    """
    explicit = {"train": (train_images, train_json), "val": (val_images, val_json)}
    needed = ("train", "val") if with_train else ("val",)
    if data and any(path for paths in explicit.values() for path in paths):
        raise InputError("--data and --train-images/--train-json/--val-images/--val-json exclude each other")
    if data and data.startswith("hfds/"):
        train, val = open_hf(
            data.removeprefix("hfds/"),
            train_split=train_split,
            report_split=val_split,
            image_key=image_key,
            objects_key=objects_key,
            bbox_format=bbox_format,
            fix_boxes=fix_boxes,
            with_train=with_train,
        )
    else:
        located = _locate_parts(data, {part: explicit[part] for part in needed}, output)
        opened = {part: read_coco(images, file, fix_boxes=fix_boxes) for part, (images, file) in located.items()}
        train, val = opened.get("train"), opened["val"]
    if not any(len(boxes) for boxes in val.boxes):
        raise InputError(f"{val.where} has no boxes to report on")
    return train, val


def _locate_parts(
    data: str | None, explicit: dict[str, tuple[str | None, str | None]], output: Path
) -> dict[str, tuple[Path, Path]]:
    """The image folder and the annotation file of each part that `explicit` has a pair of paths for.

    Raises:
        InputError: there are none.
    """
    if data:
        folder = _find_folder(data, output)
        return {part: _locate_coco(folder, part) for part in explicit}
    if not all(path for paths in explicit.values() for path in paths):
        raise InputError("no data: --data FOLDER, or all of --train-images, --train-json, --val-images and --val-json")
    return {part: (Path(images), Path(file)) for part, (images, file) in explicit.items()}


def _find_folder(data: str, output: Path) -> Path:
    """The folder in COCO's layout that --data means.

    Raises:
        InputError: there is none.
    """
    folder = Path(data)
    if data == "digits_det":
        folder = built_in_digits(output / "digits_det")
        check_digits(folder)
    if not folder.is_dir():
        raise InputError(f"--data {folder}: no such folder; other data are called digits_det or hfds/NAME_OR_FOLDER")
    return folder


def _locate_coco(folder: Path, part: str) -> tuple[Path, Path]:
    """The image folder and the annotation file of a part ("train" or "val") in COCO's layout.

    Raises:
        InputError: there is no annotation file, or more than one.
    """
    files = sorted(folder.glob(f"annotations/instances_{part}*.json"))
    if len(files) != 1:
        raise InputError(
            f"{folder}/annotations has {len(files) or 'no'} instances_{part}*.json where one is expected: name the "
            "files with --train-images, --train-json, --val-images and --val-json"
        )
    return folder / files[0].stem.removeprefix("instances_"), files[0]


def reporting_split(
    report: AnnotatedImages, *, first_label: int, check_images: int, limit: int | None = None
) -> DetectionSplit:
    """The split to report on, some of its images decoded as a check.

    Args:
        report: from `open_detection`.
        first_label: the number that the detector gives the first class.
        check_images: how many images to decode, see `check_readable_rows`.
        limit: take no more images than so many, for a dry run.

    Raises:
        InputError: an image cannot be read.
    """
    rows = list(range(len(report.images)))[:limit]
    check_readable_rows(partial(read_checked_image, report), rows, check_images)
    return DetectionSplit(report, rows, first_label)


def split_detection(
    train: AnnotatedImages,
    report: AnnotatedImages,
    *,
    first_label: int,
    transform: v2.Transform,
    seed: int,
    switch_fraction: float,
    switch_seed: int,
    keep_empty: bool,
    check_images: int,
    samples: int | None = None,
    limit: int | None = None,
) -> DetectionData:
    """Cut the images of a training into its splits, and decode some of each as a check.

    Args:
        train, report: from `open_detection`.
        first_label: the number that the detector gives the first class.
        transform: augmentation of the training images.
        seed: of the augmentation.
        switch_fraction, switch_seed: see `hold_out_images`.
        keep_empty: train on images without boxes, too.
        check_images: how many images of a split to decode, see `check_readable_rows`.
        samples: train on so many images, the same ones for the same `switch_seed`; on all of them if None.
        limit: evaluate no more images of a split than so many, for a dry run.

    Raises:
        InputError: the classes of the two differ, the fraction or the number of samples is impossible, or an image
            cannot be read.
    """
    if report.category_ids != train.category_ids or report.classes != train.classes:
        different = [name for name in report.classes if name not in train.classes] or ["in another order"]
        raise InputError(f"the classes of the two splits differ: {different[0]}")
    train_rows, switch_rows = hold_out_images(train.labels, switch_fraction, switch_seed)
    if not keep_empty:
        train_rows = [row for row in train_rows if len(train.boxes[row])]
    if samples is not None:
        if samples > len(train_rows):
            raise InputError(f"--train-samples {samples}: only {len(train_rows)} images are there to train on")
        train_rows = sorted(np.random.default_rng(switch_seed).permutation(train_rows)[:samples].tolist())
    switch_rows = switch_rows[:limit]
    check_readable_rows(partial(read_checked_image, train), train_rows + switch_rows, check_images)
    report_split = reporting_split(report, first_label=first_label, check_images=check_images, limit=limit)
    return DetectionData(
        train=DetectionSplit(train, train_rows, first_label, transform, seed),
        switch=DetectionSplit(train, switch_rows, first_label) if switch_rows else None,
        report=report_split,
        classes=train.classes,
        sizes={
            "train": len(train_rows),
            "boxes": sum(len(train.boxes[row]) for row in train_rows),
            "switch": len(switch_rows),
            "report": len(report_split),
        },
    )


def hold_out_images(labels: list[np.ndarray], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """The rows to train on, and those held out for the switch-off, both sorted.

    The latter depend on the labels, the fraction and the seed only. Images with objects are drawn at random; each class
    that the draw missed gets one more image, provided that another one is left to train on.

    Args:
        labels: of each image, (n,).
        fraction: the share of the images with objects that is held out, in [0, 1); 0 holds out none.
        seed: of the draw.

    Raises:
        InputError: the fraction is impossible.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"--switch-split {fraction:g}: a share lies in [0, 1)")
    with_objects = [row for row, image_labels in enumerate(labels) if len(image_labels)]
    shuffled = np.random.default_rng(seed).permutation(with_objects).tolist()
    count = max(round(fraction * len(shuffled)), 1) if fraction else 0
    held_out = shuffled[:count]
    if fraction:
        covered = {label for row in held_out for label in labels[row].tolist()}
        images_left = Counter(label for row in shuffled[count:] for label in set(labels[row].tolist()))
        for row in shuffled[count:]:
            classes = set(labels[row].tolist())
            if classes - covered and all(images_left[label] > 1 for label in classes):
                held_out.append(row)
                covered |= classes
                images_left.subtract(classes)
    switch = sorted(held_out)
    train = sorted(set(range(len(labels))) - set(switch))
    if not any(len(labels[row]) for row in train):
        raise InputError(f"--switch-split {fraction:g} leaves no image with objects to train on")
    return train, switch
