"""COCO's 12 numbers over a whole split, each image once whatever the processes; detections.json; pictures."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from faster_coco_eval import COCO, COCOeval_faster
from torchvision.transforms.v2.functional import resize, to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

from w2s.detection.loading import DetectionSplit
from w2s.engine.errors import InputError
from w2s.record import replacing

NUMBERS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
NUMBERS += ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")
TILE = 256  # pixels of a picture in the grid


def record(detections: list[dict[str, torch.Tensor]], targets: list[dict]) -> list[tuple[int, np.ndarray]]:
    """Detections of a batch as (position, (n, 6) rows of x1, y1, x2, y2, score, label)."""
    rows = [torch.cat([d["boxes"], d["scores"][:, None], d["labels"][:, None]], 1) for d in detections]
    return [(t["position"], row.double().cpu().numpy()) for t, row in zip(targets, rows, strict=True)]


def gather(records: list[tuple[int, np.ndarray]], split: DetectionSplit) -> list[np.ndarray]:
    """The records of all processes, one an image, in the order of the split.

    Raises:
        InputError: not each image exactly once.
    """
    together = sorted(gather_object(records), key=lambda entry: entry[0])
    if [position for position, _ in together] != list(range(len(split))):
        raise InputError(f"an evaluation counted {len(together)} images instead of {len(split)}")
    return [rows for _, rows in together]


def coco_results(found: list[np.ndarray], split: DetectionSplit) -> list[dict]:
    """Detections in COCO's result format, with the ids of the data."""
    ids = split.source.category_ids
    return [
        {
            "image_id": image_id,
            "category_id": ids[int(label) - split.first_label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for image_id, rows in zip(split.ids, found, strict=True)
        for x1, y1, x2, y2, score, label in rows.tolist()
    ]


def coco_numbers(results: list[dict], split: DetectionSplit) -> dict[str, float]:
    """The 12 numbers in percent; -1 where there is nothing to find (COCO's own sign), as no large objects."""
    truth, found = COCO(split.source.truth(split.rows)), None
    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes(results)
        evaluation = COCOeval_faster(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = np.asarray(evaluation.stats[:12], float)
    return dict(zip(NUMBERS, np.where(values < 0, -1, 100 * values).tolist(), strict=True))


def shared_numbers(found: list[np.ndarray], split: DetectionSplit, accelerator) -> dict[str, float]:
    """`coco_numbers` computed by the main process, for all of them."""
    numbers = [coco_numbers(coco_results(found, split), split) if accelerator.is_main_process else None]
    return broadcast_object_list(numbers)[0]


def write_detections(path: Path, found: list[np.ndarray], split: DetectionSplit) -> None:
    """detections.json, as COCO's tools and servers take it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        json.dump(coco_results(found, split), file)


def draw_predictions(
    path: Path, found: list[np.ndarray], split: DetectionSplit, count: int = 8, threshold: float = 0.3
) -> None:
    """Write a grid of the first images: ground truth above, detections with a score of `threshold` or more below."""
    rows: list[list[torch.Tensor]] = [[], []]
    names = split.source.names
    for position in range(min(count, len(split))):
        image, target = split.item(position)
        pixels = (image * 255).to(torch.uint8)
        seen = found[position][found[position][:, 4] >= threshold]
        labels = [names[label - split.first_label] for label in target["labels"].tolist()]
        rows[0].append(_drawn(pixels, target["boxes"], labels, "lime"))
        texts = [f"{names[int(label) - split.first_label]} {score:.2f}" for score, label in seen[:, 4:].tolist()]
        rows[1].append(_drawn(pixels, torch.from_numpy(seen[:, :4]), texts, "orange"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb") as file:
        to_pil_image(make_grid(rows[0] + rows[1], nrow=len(rows[0]))).save(file, format="PNG")


def _drawn(pixels: torch.Tensor, boxes: torch.Tensor, labels: list[str], colour: str) -> torch.Tensor:
    """An image with boxes, its longer side TILE pixels, padded to a square."""
    height, width = pixels.shape[-2:]
    scale = TILE / max(height, width)
    pixels = resize(pixels, [max(round(height * scale), 1), max(round(width * scale), 1)], antialias=True)
    if len(boxes):
        pixels = draw_bounding_boxes(pixels, boxes * scale, labels, colour)
    return torch.nn.functional.pad(pixels, (0, TILE - pixels.shape[-1], 0, TILE - pixels.shape[-2]))
