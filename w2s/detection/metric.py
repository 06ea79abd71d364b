"""COCO's 12 metrics over a whole split, each image once whatever the processes; detections.json; pictures.

Detections of a split are a list of arrays, one for each image in the order of the split. The rows of an array are
x1, y1, x2, y2, score, label: corners in pixels of the image, a probability, and the detector's number of the class.
"""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from faster_coco_eval import COCO, COCOeval_faster
from matplotlib import get_data_path
from torchvision.ops import nms
from torchvision.transforms.v2.functional import resize, to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

from w2s.detection.loading import DetectionSplit
from w2s.engine.errors import InputError
from w2s.record import replacing

COCO_METRICS = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR1",
    "AR10",
    "AR100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
TILE = 640  # height and width in pixels of an image in a picture's grid


def detection_rows(detections: list[dict[str, torch.Tensor]], targets: list[dict]) -> list[tuple[int, np.ndarray]]:
    """The positions of a batch's images in their split, each with the rows of its detections (n, 6).

    Args:
        detections: of a detector, with boxes (n, 4), scores (n,) and labels (n,).
        targets: of the same images, see `DetectionSplit.item`.
    """
    rows = [torch.cat([d["boxes"], d["scores"][:, None], d["labels"][:, None]], 1) for d in detections]
    return [(target["position"], table.double().cpu().numpy()) for target, table in zip(targets, rows, strict=True)]


def gather_detections(rows: list[tuple[int, np.ndarray]], split: DetectionSplit) -> list[np.ndarray]:
    """The detections of a split, from the `detection_rows` of all batches of all processes.

    Raises:
        InputError: an image is missing or was counted twice.
    """
    gathered = sorted(gather_object(rows), key=lambda entry: entry[0])
    if [position for position, _ in gathered] != list(range(len(split))):
        raise InputError(f"an evaluation counted {len(gathered)} images instead of {len(split)}")
    return [table for _, table in gathered]


def coco_results(detections: list[np.ndarray], split: DetectionSplit) -> list[dict]:
    """The detections of a split in COCO's result format, with the ids of the data."""
    category_ids = split.source.category_ids
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[int(label) - split.first_label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for image_id, rows in zip(split.ids, detections, strict=True)
        for x1, y1, x2, y2, score, label in rows.tolist()
    ]


def coco_metrics(results: list[dict], split: DetectionSplit) -> dict[str, float]:
    """The 12 metrics in percent, by the names of COCO_METRICS; -1, as COCO has it, where there is nothing to find, such
    as large objects."""
    truth, results = _numbered(split.source.ground_truth(split.rows), results)
    truth = COCO(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval_faster(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = np.asarray(evaluation.stats[:12], float)
    return dict(zip(COCO_METRICS, np.where(values < 0, -1, 100 * values).tolist(), strict=True))


def _numbered(truth: dict, results: list[dict]) -> tuple[dict, list[dict]]:
    """Ground truth and results with images and categories numbered from 1.

    The evaluator takes ids as floats, so that it cannot take names and takes two large ids for the same.
    """
    images = {image["id"]: number for number, image in enumerate(truth["images"], 1)}
    categories = {category["id"]: number for number, category in enumerate(truth["categories"], 1)}

    def renumber(parts: list[dict]) -> list[dict]:
        return [
            {**part, "image_id": images[part["image_id"]], "category_id": categories[part["category_id"]]}
            for part in parts
        ]

    numbered = {
        "images": [{**image, "id": images[image["id"]]} for image in truth["images"]],
        "categories": [{**category, "id": categories[category["id"]]} for category in truth["categories"]],
        "annotations": renumber(truth["annotations"]),
    }
    return truth | numbered, renumber(results)


def score_detections(
    rows: list[tuple[int, np.ndarray]], split: DetectionSplit, accelerator: Accelerator
) -> tuple[dict[str, float], list[np.ndarray]]:
    """The `coco_metrics` of a split, the same on all processes, and its detections.

    Args:
        rows: the `detection_rows` of all batches of this process.
        split: the split.
        accelerator: says which process computes the metrics.

    Raises:
        InputError: see `gather_detections`.
    """
    detections = gather_detections(rows, split)
    metrics = [coco_metrics(coco_results(detections, split), split) if accelerator.is_main_process else None]
    return broadcast_object_list(metrics)[0], detections


def write_detections(path: Path, detections: list[np.ndarray], split: DetectionSplit) -> None:
    """Write the detections of a split as COCO's tools and evaluation server take them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        json.dump(coco_results(detections, split), file)


def draw_predictions(
    path: Path, detections: list[np.ndarray], split: DetectionSplit, *, count: int = 4, threshold: float = 0.3
) -> None:
    """Write a PNG of the first images of a split, with the ground truth in the upper row and the detections below it.

    Detections that overlap by more than half, of whatever classes, are drawn as one: the one with the highest score.

    Args:
        path: of the file.
        detections: of the whole split.
        split: the split.
        count: number of images at most.
        threshold: detections with a lower score are left out.
    """
    classes, first_label = split.source.classes, split.first_label
    with_truth, with_detections = [], []
    for position in range(min(count, len(split))):
        image, target = split.item(position)
        image = (image * 255).to(torch.uint8)
        texts = [classes[label - first_label] for label in target["labels"].tolist()]
        with_truth.append(_tile(image, target["boxes"], texts, "lime"))
        rows = torch.from_numpy(detections[position][detections[position][:, 4] >= threshold])
        rows = rows[nms(rows[:, :4], rows[:, 4], iou_threshold=0.5)]
        texts = [f"{classes[int(label) - first_label]} {score:.2f}" for score, label in rows[:, 4:].tolist()]
        with_detections.append(_tile(image, rows[:, :4], texts, "orange"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb") as file:
        to_pil_image(make_grid(with_truth + with_detections, nrow=len(with_truth))).save(file, format="PNG")


def _tile(image: torch.Tensor, boxes: torch.Tensor, texts: list[str], colour: str) -> torch.Tensor:
    """An image (3, H, W) with boxes and their texts, its longer side resized to TILE pixels, padded to a square."""
    height, width = image.shape[-2:]
    scale = TILE / max(height, width)
    image = resize(image, [max(round(height * scale), 1), max(round(width * scale), 1)], antialias=True)
    if len(boxes):
        image = draw_bounding_boxes(
            image,
            boxes * scale,
            texts,
            colour,
            width=3,
            font=str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")),
            font_size=20,
            label_colors="black",
            fill_labels=True,
        )
    return torch.nn.functional.pad(image, (0, TILE - image.shape[-1], 0, TILE - image.shape[-2]))
