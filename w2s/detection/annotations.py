"""Annotated images in COCO's terms: read from JSON, checked, and turned into boxes to train on."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from w2s.engine.errors import InputError, on_one_line
from w2s.engine.parsing import announce

TOLERANCE = 1.0  # pixels by which a box may reach outside its image: annotations are rounded
UNUSED = ("segmentation", "license", "coco_url", "flickr_url", "date_captured")  # keys of COCO's JSON
MIN_SIDE = 0.1  # pixels; a box whose side is shorter has no area


@dataclass
class AnnotatedImages:
    """Images with their annotations in COCO's terms. The four lists of one entry per image run in parallel.

    Attributes:
        images: id, width and height of each image, and whatever else its source says.
        annotations: all annotations of each image with unchanged boxes, for the metric: id, image_id, category_id,
            bbox (x, y, width, height), area, iscrowd.
        boxes: corners (n, 4) to train on, float32 in pixels, clipped to the image, without crowds.
        labels: indices (n,) into `classes`, one for each of the boxes.
        classes: the names of the classes in the order of their ids.
        category_ids: their ids in the data, which may have gaps (COCO's 80 ids lie in 1..90).
        read: takes a row and returns its RGB image.
        where: names the source in errors.
    """

    images: list[dict]
    annotations: list[list[dict]]
    boxes: list[np.ndarray]
    labels: list[np.ndarray]
    classes: list[str]
    category_ids: list[int]
    read: Callable[[int], Image.Image]
    where: str

    def ground_truth(self, rows: Iterable[int]) -> dict:
        """The annotations of some images as COCO's tools take them.

        Annotations are numbered anew from 1: the evaluators store the id of a match, and take 0 to mean no match.
        """
        rows = list(rows)
        annotations = [annotation for row in rows for annotation in self.annotations[row]]
        return {
            "info": {},
            "images": [self.images[row] for row in rows],
            "annotations": [{**annotation, "id": number} for number, annotation in enumerate(annotations, 1)],
            "categories": [
                {"id": category_id, "name": name}
                for category_id, name in zip(self.category_ids, self.classes, strict=True)
            ],
        }


def read_coco(image_folder: Path, annotation_file: Path, *, fix_boxes: bool) -> AnnotatedImages:
    """Images in a folder and their annotations in COCO's JSON.

    Raises:
        InputError: a file or folder cannot be read, images are missing, or `annotate` refuses the annotations.
    """
    try:
        truth = json.loads(annotation_file.read_text(encoding="utf-8"), object_hook=_without_unused)
    except OSError as error:
        raise InputError(f"cannot read annotations {annotation_file}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{annotation_file} is no JSON: {on_one_line(error)}") from None

    def read(row: int) -> Image.Image:
        return Image.open(image_folder / annotated.images[row]["file_name"]).convert("RGB")

    annotated = annotate(truth, where=str(annotation_file), fix_boxes=fix_boxes, read=read)
    try:
        present = set(os.listdir(image_folder))
        names = [image["file_name"] for image in annotated.images]
    except OSError as error:
        raise InputError(f"cannot read image folder {image_folder}: {error.strerror}") from None
    except KeyError:
        raise InputError(f"{annotation_file}: an image has no file_name") from None
    # a file_name may also be a path of several parts, which a listing of the folder does not contain
    missing = [name for name in names if name not in present and not (image_folder / name).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} images of {annotation_file} are not in {image_folder}, the first: {missing[0]}"
        )
    return annotated


def _without_unused(entry: dict) -> dict:
    """An entry of COCO's JSON without what nobody reads, dropped while the file is parsed: it is most of the memory."""
    for key in UNUSED:
        entry.pop(key, None)
    return entry


def annotate(truth: dict, *, where: str, fix_boxes: bool, read: Callable[[int], Image.Image]) -> AnnotatedImages:
    """Check annotations in COCO's format and make training boxes of them.

    Args:
        truth: a mapping with images, annotations and categories.
        where: names the source in errors.
        fix_boxes: drop boxes without area and clip those that reach outside their image, instead of refusing them.
        read: takes a row and returns its RGB image.

    Raises:
        InputError: missing keys, impossible sizes, duplicate ids, unknown images or categories, malformed boxes, boxes
            as shares of their image, and unless `fix_boxes`, boxes that have no area or reach outside it.
    """
    images, categories = _check_tables(truth, where)
    rows = {image["id"]: row for row, image in enumerate(images)}
    labels = {category["id"]: label for label, category in enumerate(categories)}
    annotations: list[list[dict]] = [[] for _ in images]
    training_boxes: list[list[tuple]] = [[] for _ in images]  # left, top, right, bottom, label
    bad_boxes, furthest = [], 0.0
    for annotation in truth["annotations"]:
        checked, box = _check_annotation(annotation, rows, labels, where)
        row = rows[checked["image_id"]]
        annotations[row].append(checked)
        if checked["iscrowd"]:
            continue
        furthest = max(furthest, *box)
        width, height = images[row]["width"], images[row]["height"]
        corners, is_outside = _clip(box, width, height)
        is_empty = min(corners[2] - corners[0], corners[3] - corners[1]) < MIN_SIDE
        if is_outside or is_empty:
            bad_boxes.append(f"annotation {checked['id']}: {box} in an image of {width} x {height}")
        if not is_empty:
            training_boxes[row].append((*corners, labels[checked["category_id"]]))
    if 0 < furthest <= 1:
        raise InputError(f"{where}: no box reaches beyond the first pixel, so they are shares of the image, not pixels")
    if bad_boxes:
        of_all = f"{len(bad_boxes)} of {sum(map(len, annotations))} boxes have no area or reach outside their image"
        if not fix_boxes:
            raise InputError(
                f"{where}: {of_all}, the first (x, y, width, height): {bad_boxes[0]}; correct them, or have them "
                "dropped and clipped by --fix-boxes"
            )
        announce(f"warning: {where}: {of_all}; they are dropped or clipped")
    tables = [np.asarray(entries, np.float32).reshape(-1, 5) for entries in training_boxes]
    return AnnotatedImages(
        images=images,
        annotations=annotations,
        boxes=[table[:, :4] for table in tables],
        labels=[table[:, 4].astype(np.int64) for table in tables],
        classes=[str(category["name"]) for category in categories],
        category_ids=[category["id"] for category in categories],
        read=read,
        where=where,
    )


def _check_tables(truth: dict, where: str) -> tuple[list[dict], list[dict]]:
    """The images, and the categories sorted by id, of annotations in COCO's format.

    Raises:
        InputError: missing keys, nothing there, impossible sizes or duplicate ids.
    """
    try:
        images = truth["images"]
        categories = sorted(truth["categories"], key=lambda category: category["id"])
        counts = {
            "image": Counter(image["id"] for image in images),
            "annotation": Counter(annotation["id"] for annotation in truth["annotations"]),
            "category": Counter(category["id"] for category in categories),
        }
        sizes = [(image["width"], image["height"]) for image in images]
        for category in categories:
            category["name"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{where} is not in COCO's format: {type(error).__name__}: {error}") from None
    if not images:
        raise InputError(f"{where} has no images")
    if not categories:
        raise InputError(f"{where} has no categories")
    for image, size in zip(images, sizes, strict=True):
        if not all(isinstance(side, int | float) and side > 0 for side in size):
            raise InputError(f"{where}: image {image['id']!r} has no width and height in pixels, but {size}")
    for kind, count in counts.items():
        for key, times in count.most_common(1):
            if times > 1:
                raise InputError(f"{where}: {kind} id {key!r} is there twice")
    return images, categories


def _check_annotation(annotation: dict, rows: dict, labels: dict, where: str) -> tuple[dict, list[float]]:
    """What the metric needs of an annotation, and its box (x, y, width, height).

    Args:
        annotation: an entry of COCO's annotations.
        rows: the row of each image id.
        labels: the label of each category id.
        where: names the source in errors.

    Raises:
        InputError: an unknown image or category, a malformed box, or values of iscrowd and area that mean nothing.
    """
    for key, known in (("image_id", rows), ("category_id", labels)):
        if annotation.get(key) not in known:
            raise InputError(f"{where}: annotation {annotation['id']} has unknown {key} {annotation.get(key)!r}")
    try:
        box = [float(value) for value in annotation["bbox"]]
    except (KeyError, TypeError, ValueError):
        box = []
    if len(box) != 4 or not np.isfinite(box).all():
        raise InputError(f"{where}: annotation {annotation['id']} has no bbox of four numbers")
    is_crowd, area = annotation.get("iscrowd") or 0, annotation.get("area")
    if area is None:
        area = box[2] * box[3]
    if is_crowd not in (0, 1) or not isinstance(area, int | float):
        raise InputError(f"{where}: annotation {annotation['id']} has iscrowd {is_crowd!r} and area {area!r}")
    fields = {key: annotation[key] for key in ("id", "image_id", "category_id", "bbox")}
    return {**fields, "area": area, "iscrowd": int(is_crowd)}, box


def _clip(box: list[float], image_width: float, image_height: float) -> tuple[tuple[float, ...], bool]:
    """The corners of a box (x, y, width, height) inside its image, and whether it reached outside by more than
    TOLERANCE."""
    x, y, width, height = box
    corners = max(x, 0), max(y, 0), min(x + width, image_width), min(y + height, image_height)
    margin = min(x, y, image_width - x - width, image_height - y - height)
    return corners, margin < -TOLERANCE
