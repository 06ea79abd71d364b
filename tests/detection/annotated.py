"""Annotated images and options of data for the tests of detection."""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from helpers import words
from PIL import Image

import train_det
from w2s.detection.annotations import AnnotatedImages, annotate


def truth() -> dict:
    """Three images, the last without objects; category ids with a gap, in no order; a crowd."""
    images = [{"id": k, "file_name": f"{k}.png", "width": 40, "height": 30} for k in (7, 3, 9)]
    boxes = [(1, 7, 90, [2, 3, 10, 12]), (2, 7, 4, [0, 0, 40, 30]), (3, 3, 4, [5, 5, 8.5, 9])]
    annotations = [
        {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for number, image, category, box in boxes
    ]
    annotations.append({"id": 4, "image_id": 3, "category_id": 90, "bbox": [1, 1, 30, 20], "area": 300, "iscrowd": 1})
    categories = [{"id": 90, "name": "brush"}, {"id": 4, "name": "plane"}, {"id": 50, "name": "spoon"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def changed(change: Callable[[dict], object]) -> dict:
    """`truth` after a change in place."""
    data = copy.deepcopy(truth())
    change(data)
    return data


def annotated(data: dict, *, fix_boxes: bool = False, read: Callable[[int], Image.Image] | None = None):
    """`data` without files."""
    return annotate(data, where="here", fix_boxes=fix_boxes, read=read)


def write_coco(folder: Path, data: dict | None = None, parts: tuple[str, ...] = ("train", "val")) -> Path:
    """`data` in COCO's layout, with noise for pictures."""
    data = data or truth()
    (folder / "annotations").mkdir(parents=True)
    for part in parts:
        (folder / f"{part}2017").mkdir()
        for image in data["images"]:
            pixels = np.random.default_rng(image["id"]).integers(0, 255, (image["height"], image["width"], 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{part}2017" / image["file_name"])
        (folder / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(data))
    return folder


def white_boxes(count: int = 6, width: int = 60, height: int = 40) -> AnnotatedImages:
    """Black images, each with two white rectangles that its annotations name."""
    images = [{"id": k, "width": width, "height": height} for k in range(count)]
    boxes = [[4 + k, 6, 10, 12] for k in range(count)], [[30, 20 - k, 14, 9] for k in range(count)]
    annotations = [
        {"id": 2 * k + n, "image_id": k, "category_id": n, "bbox": boxes[n][k]} for k in range(count) for n in (0, 1)
    ]
    data = {"images": images, "annotations": annotations, "categories": [{"id": k, "name": str(k)} for k in (0, 1)]}

    def read(row: int) -> Image.Image:
        pixels = np.zeros((height, width, 3), np.uint8)
        for x, y, w, h in (boxes[0][row], boxes[1][row]):
            pixels[y : y + h, x : x + w] = 255
        return Image.fromarray(pixels)

    return annotated(data, read=read)


def data_options(*parts: object) -> argparse.Namespace:
    """The options of train_det.py for data that are checked whole, with nothing held out of training."""
    common = "--check-images -1 --switch-split 0 --val-split test --batch-size 2"
    return train_det.build_parser().parse_recipe(words(common, *parts))
