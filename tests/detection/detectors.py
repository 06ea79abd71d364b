"""Small detectors, their teachers and batches for the tests."""

import copy

import pytest
import torch

from w2s.detection.config import DetectorConfig
from w2s.detection.models import FasterRCNN, RetinaNet, build_detector
from w2s.detection.teacher import DetectorTeacher

NAMES = [str(k) for k in range(1, 6)]
SMALL = {"min_size": 96, "max_size": 160}
TINY = {"strides": [4, 8, 16], "fpn_channels": 16, "min_size": 64, "max_size": 96}
KINDS = pytest.mark.parametrize("kind", ["retinanet", "fasterrcnn"])
RESNET = {"channels": [8, 8, 16, 16], "stem_width": 8}


def tiny(kind: str = "retinanet", backbone: str = "resnet10t", **options) -> DetectorConfig:
    """A detector of a few thousand parameters."""
    kwargs = RESNET if backbone.startswith("resnet") else {}
    if kind == "fasterrcnn":
        fewer = {"box_batch_size_per_image": 16, "rpn_post_nms_top_n_train": 50}
        options["detector_kwargs"] = fewer | options.get("detector_kwargs", {})
    return DetectorConfig(kind, backbone=backbone, classes=NAMES, **{**TINY, "model_kwargs": kwargs, **options})


def batch(first_label: int = 0, seed: int = 0) -> tuple[list[torch.Tensor], list[dict]]:
    """Two images of different size; the second holds no object."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, 70, 90, generator=generator), torch.rand(3, 64, 64, generator=generator)]
    boxes = torch.tensor([[5.0, 8.0, 40.0, 50.0], [30.0, 20.0, 62.0, 44.0], [60.0, 40.0, 80.0, 66.0]])
    labels = torch.tensor([0, 3, 4]) + first_label
    return images, [{"boxes": boxes, "labels": labels}, {"boxes": boxes[:0], "labels": labels[:0]}]


def student_and_teacher(kind: str, same: bool = False) -> tuple[RetinaNet | FasterRCNN, DetectorTeacher]:
    """A student in training, and a teacher: its copy, or one of another backbone and width."""
    torch.manual_seed(0)
    student = build_detector(tiny(kind, norm="gn"))
    if same:
        model = copy.deepcopy(student)
    else:
        narrow = {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
        model = build_detector(tiny(kind, "convnext_atto", model_kwargs=narrow, fpn_channels=8))
    return student, DetectorTeacher(model, source="somewhere", device="cpu", student=student)
