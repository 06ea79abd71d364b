"""Detection data: COCO folders, Hugging Face sets and the built-in digits, checked and cut into splits."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from w2s.detection.digits import built_in_digits, check_digits
from w2s.detection.loading import DetectionSplit, check_images, train_transform
from w2s.engine.errors import InputError

TOLERANCE = 1.0  # pixels by which a box may reach outside unnoticed: rounding
MIN_SIDE = 0.1  # pixels; less is no area


@dataclass
class Annotated:
    """Images with their annotations in COCO's terms; the four lists run in parallel.

    Attributes:
        images: id, width, height, and what else the source says.
        annotations: those of an image, untouched, for the metric: id, bbox (x, y, width, height), area, iscrowd, ...
        boxes: (n, 4) float32 corners to train on, clipped to the image, without crowds.
        labels: (n,) indices into `names`.
        names, category_ids: of the classes, in order of the ids (COCO's 80 ids lie in 1..90).
        read: row -> RGB image.
        where: names the source in errors.
    """

    images: list[dict]
    annotations: list[list[dict]]
    boxes: list[np.ndarray]
    labels: list[np.ndarray]
    names: list[str]
    category_ids: list[int]
    read: Callable[[int], Image.Image]
    where: str

    def truth(self, rows: Iterable[int]) -> dict:
        """Ground truth of some images as COCO's tools take it.

        Annotations are numbered anew from 1: the evaluators take the id as the mark of a match, and 0 as none.
        """
        rows = list(rows)
        annotations = [annotation for row in rows for annotation in self.annotations[row]]
        return {
            "info": {},
            "images": [self.images[row] for row in rows],
            "annotations": [{**annotation, "id": number} for number, annotation in enumerate(annotations, 1)],
            "categories": [{"id": i, "name": n} for i, n in zip(self.category_ids, self.names, strict=True)],
        }


@dataclass
class DetectionData:
    """The three splits of a run; `switch` is None where nothing is held out, `train` where it only evaluates."""

    train: DetectionSplit | None
    switch: DetectionSplit | None
    report: DetectionSplit
    classes: list[str]
    sizes: dict = field(default_factory=dict)  # of the splits, for summary.json and the first lines


def load_detection(args, first_label: int) -> DetectionData:
    """Open, check and cut `--data` (or the four explicit paths) for a run; `first_label` is the detector's.

    Raises:
        InputError: see the functions this one calls.
    """
    train, report = open_detection(args)
    report_rows = list(range(len(report.images)))[: 4 * args.batch_size if args.dry_run else None]
    if args.eval_only:
        check_images(report, report_rows, args.check_images)
        return DetectionData(None, None, DetectionSplit(report, report_rows, first_label), report.names)
    if report.category_ids != train.category_ids or report.names != train.names:
        different = [n for n in report.names if n not in train.names] or ["in another order"]
        raise InputError(f"the classes of the two splits differ: {different[0]}")
    try:
        fraction = float(args.switch_split)
    except ValueError:
        raise InputError(f"--switch-split {args.switch_split}: a share of the training data, as 0.02") from None
    train_rows, switch_rows = split_training(train.labels, fraction, args.switch_seed)
    if not args.keep_empty:
        train_rows = [row for row in train_rows if len(train.boxes[row])]
    if args.dry_run:
        switch_rows = switch_rows[: 4 * args.batch_size]
    for part, rows in ((train, train_rows + switch_rows), (report, report_rows)):
        check_images(part, rows, args.check_images)
    boxes = sum(len(train.boxes[row]) for row in train_rows)
    return DetectionData(
        train=DetectionSplit(train, train_rows, first_label, train_transform(args), args.seed),
        switch=DetectionSplit(train, switch_rows, first_label) if switch_rows else None,
        report=DetectionSplit(report, report_rows, first_label),
        classes=train.names,
        sizes={"train": len(train_rows), "boxes": boxes, "switch": len(switch_rows), "report": len(report_rows)},
    )


def open_detection(args) -> tuple[Annotated | None, Annotated]:
    """The training and the reporting split, checked; --eval-only needs no training images, and gets None for them.

    Raises:
        InputError: nothing there, or annotations that cannot be trained on.
    """
    explicit = [args.train_images, args.train_json, args.val_images, args.val_json]
    wanted = ("val",) if args.eval_only else ("train", "val")
    if args.data and any(explicit):
        raise InputError("--data and --train-images/--train-json/--val-images/--val-json exclude each other")
    if str(args.data).startswith("hfds/"):
        from w2s.detection.hf_data import open_hf

        return open_hf(args)
    if args.data:
        folder = Path(args.data)
        if args.data == "digits_det":
            folder = built_in_digits(Path(args.output) / "digits_det")
            check_digits(folder)
        if not folder.is_dir():
            raise InputError(f"--data {folder}: no such folder; digits_det and hfds/NAME_OR_FOLDER are no folders")
        names = {part: sorted(folder.glob(f"annotations/instances_{part}*.json")) for part in wanted}
        for part, found in names.items():
            if len(found) != 1:
                raise InputError(f"{folder}/annotations has {len(found) or 'no'} instances_{part}*.json: name them all")
        explicit = []
        for found in names.values():
            explicit += [folder / found[0].stem.removeprefix("instances_"), found[0]]
    elif not all(explicit[-2 * len(wanted) :]):
        raise InputError("no data: --data FOLDER, or all of --train-images, --train-json, --val-images and --val-json")
    train = None if args.eval_only else read_coco(Path(explicit[0]), Path(explicit[1]), args.fix_boxes)
    return train, read_coco(Path(explicit[-2]), Path(explicit[-1]), args.fix_boxes)


def read_coco(folder: Path, annotations: Path, fix: bool) -> Annotated:
    """Images in a folder and their annotations in COCO's JSON.

    Raises:
        InputError: see `annotate`; missing files.
    """
    try:
        truth = json.loads(annotations.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read annotations {annotations}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{annotations} is no JSON: {' '.join(str(error).split())}") from None
    paths: list[Path] = []

    def read(row: int) -> Image.Image:
        return Image.open(paths[row]).convert("RGB")

    result = annotate(truth, str(annotations), fix, read)
    try:
        there = set(os.listdir(folder))
        names = [image["file_name"] for image in result.images]
    except OSError as error:
        raise InputError(f"cannot read image folder {folder}: {error.strerror}") from None
    except KeyError:
        raise InputError(f"{annotations}: an image has no file_name") from None
    missing = [name for name in names if name not in there and not (folder / name).is_file()]
    if missing:
        raise InputError(f"{len(missing)} images of {annotations} are not in {folder}, the first: {missing[0]}")
    paths += [folder / name for name in names]
    return result


def annotate(truth: dict, where: str, fix: bool, read: Callable[[int], Image.Image]) -> Annotated:
    """Check annotations in COCO's format and make training boxes of them.

    Args:
        truth: images, annotations, categories.
        where: names the source in errors.
        fix: drop boxes without area and clip those that reach outside, instead of refusing them.
        read: row -> RGB image.

    Raises:
        InputError: keys missing, sizes that are none, ids twice, unknown images or categories, boxes that are none,
            and unless `fix`, boxes without area or outside their image.
    """
    try:
        images, categories = truth["images"], sorted(truth["categories"], key=lambda c: c["id"])
        ids = [image["id"] for image in images], [a["id"] for a in truth["annotations"]], [c["id"] for c in categories]
        rows = {key: row for row, key in enumerate(ids[0])}
        labels = {key: label for label, key in enumerate(ids[2])}
        sizes = [(image["width"], image["height"]) for image in images]
        names = [str(category["name"]) for category in categories]
    except (KeyError, TypeError) as error:
        raise InputError(f"{where} is not in COCO's format: {type(error).__name__}: {error}") from None
    if not images or not categories:
        raise InputError(f"{where} has no {'categories' if images else 'images'}")
    for image, size in zip(images, sizes, strict=True):
        if not all(isinstance(side, int | float) and side > 0 for side in size):
            raise InputError(f"{where}: image {image['id']!r} has no width and height in pixels, but {size}")
    for kind, keys in zip(("image", "annotation", "category"), ids, strict=True):
        if len(set(keys)) != len(keys):
            raise InputError(f"{where}: {kind} id {Counter(keys).most_common(1)[0][0]!r} is there twice")
    result = Annotated(images, [[] for _ in images], [], [], names, ids[2], read, where)
    kept, bad = [[] for _ in images], []
    for annotation in truth["annotations"]:
        row, label = rows.get(annotation.get("image_id")), labels.get(annotation.get("category_id"))
        if row is None or label is None:
            what = "image_id" if row is None else "category_id"
            raise InputError(f"{where}: annotation {annotation['id']} has unknown {what} {annotation.get(what)!r}")
        x, y, width, height = box = _four_numbers(annotation, where)
        crowd, area = annotation.get("iscrowd") or 0, annotation.get("area")
        area = width * height if area is None else area
        if crowd not in (0, 1) or not isinstance(area, int | float):
            raise InputError(f"{where}: annotation {annotation['id']} has iscrowd {crowd!r} and area {area!r}")
        fields = {k: annotation[k] for k in ("id", "image_id", "category_id", "bbox")}
        result.annotations[row].append({**fields, "area": area, "iscrowd": int(crowd)})
        if crowd:
            continue
        right, bottom = sizes[row]
        outside = min(x, y, right - x - width, bottom - y - height) < -TOLERANCE
        corners = max(x, 0), max(y, 0), min(x + width, right), min(y + height, bottom)
        empty = min(corners[2] - corners[0], corners[3] - corners[1]) < MIN_SIDE
        if outside or empty:
            bad.append(f"annotation {annotation['id']}: {box} in an image of {right} x {bottom}")
        if not empty:
            kept[row].append((*corners, label))
    if bad and not fix:
        raise InputError(
            f"{where}: {len(bad)} boxes have no area or reach outside their image, the first (x, y, width, height): "
            f"{bad[0]}; mend them, or --fix-boxes drops and clips them"
        )
    for entries in kept:
        table = np.asarray(entries, np.float32).reshape(-1, 5)
        result.boxes.append(table[:, :4])
        result.labels.append(table[:, 4].astype(np.int64))
    return result


def _four_numbers(annotation: dict, where: str) -> list[float]:
    try:
        box = [float(value) for value in annotation["bbox"]]
    except (KeyError, TypeError, ValueError):
        box = []
    if len(box) != 4 or not np.isfinite(box).all():
        raise InputError(f"{where}: annotation {annotation['id']} has no bbox of four numbers")
    return box


def split_training(labels: list[np.ndarray], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """The rows to train on and those held out for the switch-off; the latter depend on labels, fraction and seed only.

    Images with objects are drawn at random; each class of the data that the draw missed gets one image more, where
    another one is left to train on.

    Raises:
        InputError: an impossible fraction.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"--switch-split {fraction:g}: a share lies in [0, 1)")
    order = np.random.default_rng(seed).permutation([row for row, each in enumerate(labels) if len(each)]).tolist()
    held = order[: max(round(fraction * len(order)), 1)] if fraction else []
    if fraction:
        seen = {label for row in held for label in labels[row].tolist()}
        left = Counter(label for row in order[len(held) :] for label in set(labels[row].tolist()))
        for row in order[len(held) :]:
            own = set(labels[row].tolist())
            if own - seen and all(left[label] > 1 for label in own):
                held.append(row)
                seen |= own
                left.subtract(own)
    switch = sorted(held)
    train = sorted(set(range(len(labels))) - set(switch))
    if not any(len(labels[row]) for row in train):
        raise InputError(f"--switch-split {fraction:g} leaves no image with objects to train on")
    return train, switch
