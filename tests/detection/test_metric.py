"""The metric against pycocotools, on random detections and edge cases; detections.json and pictures."""

import contextlib
import copy
import io
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from detection.annotated import annotated
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from w2s.detection import metric
from w2s.detection.loading import DetectionSplit, SameSizeBatches
from w2s.detection.metric import (
    COCO_METRICS,
    coco_metrics,
    coco_results,
    detection_rows,
    draw_predictions,
    gather_detections,
    score_detections,
    write_detections,
)
from w2s.engine.errors import InputError


def random_boxes(
    images: int = 13, seed: int = 0, image_id: Callable = lambda k: 100 - k, category_id: Callable = int
) -> tuple[DetectionSplit, list[dict[str, torch.Tensor]]]:
    """Ground truth of all sizes with crowds and empty images, and detections that are partly right."""
    generator = np.random.default_rng(seed)
    annotations, detections = [], []
    for k in range(images):
        boxes = []
        for _ in range(generator.integers(0, 7) if k else 0):
            width, height = generator.uniform(8, 200, 2)
            x, y = generator.uniform(0, 300 - width), generator.uniform(0, 300 - height)
            category = int(generator.choice([3, 8, 20]))
            crowd = int(generator.random() < 0.1)
            ids = {"id": len(annotations) + 1, "image_id": image_id(k), "category_id": category_id(category)}
            annotation = ids | {"iscrowd": crowd}
            annotations.append(annotation | {"bbox": [x, y, width, height], "area": 0.7 * width * height})
            boxes.append((x, y, x + width, y + height, [3, 8, 20].index(category)))
        rows = [(*(np.array(b[:4]) + generator.normal(0, 6, 4)), generator.random(), b[4]) for b in boxes]
        for _ in range(generator.integers(0, 5)):
            x, y, width, height = generator.uniform(5, 140, 4)
            rows.append((x, y, x + width, y + height, generator.random(), generator.integers(0, 3)))
        table = torch.tensor(np.array(rows, np.float32).reshape(-1, 6))
        detections.append({"boxes": table[:, :4], "scores": table[:, 4], "labels": table[:, 5].long() + 1})
    truth = {
        "images": [{"id": image_id(k), "width": 300, "height": 300} for k in range(images)],
        "annotations": annotations,
        "categories": [{"id": category_id(c), "name": str(c)} for c in (3, 8, 20)],
    }
    source = annotated(truth, read=lambda row: Image.new("RGB", (300, 300)))
    return DetectionSplit(source, list(range(images)), first_label=1), detections


def rows_at(positions: list[int], detections: list[dict]) -> list:
    """What one process counts that evaluates the images at these positions."""
    return detection_rows([detections[p] for p in positions], [{"position": p} for p in positions])


def in_order(detections: list[dict]) -> list[np.ndarray]:
    """The detections of a whole split."""
    return [table for _, table in rows_at(list(range(len(detections))), detections)]


def pycocotools(split: DetectionSplit, results: list[dict]) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = split.source.ground_truth(split.rows)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("seed", range(3))
def test_the_twelve_metrics_are_cocos_own(seed):
    split, detections = random_boxes(seed=seed)
    results = coco_results(in_order(detections), split)
    metrics = coco_metrics(results, split)
    expected = pycocotools(split, results)
    assert tuple(metrics) == COCO_METRICS and len(expected) == 12
    assert list(metrics.values()) == pytest.approx((100 * expected).tolist(), abs=1e-6)
    assert 5 < metrics["AP50"] < 95, "the example says something"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_same_metrics_on_any_number_of_processes(world, monkeypatch):
    split, detections = random_boxes()  # 13 images
    of_processes = []
    for rank in range(world):
        rows = []
        for batch in SameSizeBatches(split.sizes, batch_size=2, rank=rank, world=world):
            rows += rows_at([position for _, position in batch], detections)
        of_processes.append(rows)
    monkeypatch.setattr(metric, "gather_object", lambda own: [entry for rows in of_processes for entry in rows])
    metrics, gathered = score_detections(of_processes[0], split, Accelerator(cpu=True))
    alone = in_order(detections)
    assert metrics == coco_metrics(coco_results(alone, split), split)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(gathered, alone, strict=True))


def test_an_image_missing_or_counted_twice_is_an_error():
    split, detections = random_boxes()
    for positions in (list(range(12)), [*range(13), 5]):
        with pytest.raises(InputError, match=f"counted {len(positions)} images instead of 13"):
            gather_detections(rows_at(positions, detections), split)


def test_perfect_and_empty_detections():
    split, _ = random_boxes()
    truth = split.source.ground_truth(split.rows)
    perfect = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in truth["annotations"]
        if not a["iscrowd"]
    ]
    assert coco_metrics(perfect, split)["AP"] == pytest.approx(100)
    assert coco_metrics([], split)["AP50"] == 0
    empty = [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}] * 13
    detections = gather_detections(rows_at(list(range(13)), empty), split)
    assert coco_results(detections, split) == []


def test_annotation_ids_may_count_from_zero():
    """The evaluators take an id of 0 for no match."""
    truth = {"images": [{"id": 1, "width": 50, "height": 50}], "categories": [{"id": 1, "name": "a"}]}
    truth["annotations"] = [
        {"id": k, "image_id": 1, "category_id": 1, "bbox": [20 * k, 5, 10, 10], "area": 100} for k in range(2)
    ]
    split = DetectionSplit(annotated(truth), [0], first_label=0)
    perfect = [{"image_id": 1, "category_id": 1, "bbox": a["bbox"], "score": 1.0} for a in truth["annotations"]]
    assert coco_metrics(perfect, split)["AP"] == pytest.approx(100)


@pytest.mark.parametrize("image_id", [lambda k: 2**60 + k, "image {}".format, "{:012}".format])
def test_ids_of_the_data_may_be_large_or_names(image_id):
    """The evaluator takes them as floats."""
    metrics = []
    for names in ({}, {"image_id": image_id, "category_id": "/m/{:02}".format}):
        split, detections = random_boxes(**names)
        results, before = coco_results(in_order(detections), split), copy.deepcopy(split.source.images)
        metrics.append(coco_metrics(results, split))
        assert {result["image_id"] for result in results} <= set(split.ids)
        assert split.source.images == before
    assert metrics[0] == pytest.approx(metrics[1]) and metrics[0]["AP50"] > 10


def test_what_is_not_there_is_minus_one_as_in_coco():
    truth = {"images": [{"id": 1, "width": 50, "height": 50}], "categories": [{"id": 1, "name": "a"}]}
    truth["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 10, 10], "area": 100}]
    split = DetectionSplit(annotated(truth), [0], first_label=0)
    metrics = coco_metrics([{"image_id": 1, "category_id": 1, "bbox": [5, 5, 10, 10], "score": 0.5}], split)
    assert metrics["AP_small"] == pytest.approx(100) and metrics["AP_large"] == -1


def test_detections_have_the_ids_of_the_data(tmp_path):
    split, detections = random_boxes()
    write_detections(tmp_path / "run" / "detections.json", in_order(detections), split)
    results = json.loads((tmp_path / "run" / "detections.json").read_text())
    assert {r["category_id"] for r in results} == {3, 8, 20} and {r["image_id"] for r in results} <= set(split.ids)
    assert not list((tmp_path / "run").glob("*.partial"))
    x, y, width, height = results[0]["bbox"]
    position = split.ids.index(results[0]["image_id"])
    assert detections[position]["boxes"][0].tolist() == pytest.approx([x, y, x + width, y + height], abs=1e-4)


def test_pictures_show_truth_and_predictions(tmp_path):
    split, detections = random_boxes()
    draw_predictions(tmp_path / "predictions.png", in_order(detections), split, count=3)
    grid = np.asarray(Image.open(tmp_path / "predictions.png"))
    assert grid.shape[1] > 3 * 640 and grid.shape[0] > 2 * 640
    top, bottom = grid[: len(grid) // 2], grid[len(grid) // 2 :]
    assert (top == (0, 255, 0)).all(-1).any() and (bottom == (255, 165, 0)).all(-1).any()
    assert not (bottom == (0, 255, 0)).all(-1).any()


def test_a_picture_has_one_box_for_one_object(tmp_path):
    """Another class at the same place with a lower score, and a detection below the threshold, are not drawn."""
    split, _ = random_boxes()
    alone = np.array([[8, 8, 30, 30, 0.9, 1]], np.float32)
    more = np.array([[9, 8, 30, 31, 0.8, 2], [8, 8, 30, 30, 0.9, 1], [32, 32, 60, 60, 0.2, 1]], np.float32)
    for name, rows in (("alone", alone), ("more", more)):
        draw_predictions(tmp_path / f"{name}.png", [rows] * len(split), split, count=1)
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "more.png").read_bytes()
