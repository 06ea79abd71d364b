"""The detector that `--teacher` means: found, built, and with the student's classes in the student's order."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from w2s.detection.config import DetectorConfig
from w2s.detection.foreign import torchvision_builders, torchvision_detector
from w2s.detection.models import ASPECT_RATIOS, FasterRCNN, RetinaNet, build_detector, load_detector
from w2s.detection.terms import merge_background
from w2s.engine.errors import InputError
from w2s.images.checkpoints import WEIGHT_FILES, read_checkpoint
from w2s.images.classes import Classes, ClassMap, MappedLogits, match_classes
from w2s.images.foreign import TORCHVISION
from w2s.images.models import load_weights


def load_detector_teacher(
    spec: str,
    *,
    backbone: str | None,
    model_kwargs: dict,
    student: DetectorConfig,
    map_file: str | None = None,
    trained: bool = True,
) -> tuple[RetinaNet | FasterRCNN, str, ClassMap | None]:
    """The detector that `--teacher` means, with the student's classes in the student's order; where it comes from; and
    which of its own classes stand for the student's, None where they are the same.

    Args:
        spec: a run folder or another exported folder, a weights file of the student's kind of detector or of one of
            torchvision's, or `torchvision/NAME` for torchvision's own weights.
        backbone: with a weights file, timm's name of its backbone, or `torchvision/NAME` of the whole detector.
        model_kwargs: with a weights file, further arguments of its backbone, or of torchvision's detector.
        student: the student's config, which a weights file shares except for its backbone, pyramid width and norm.
        map_file: --teacher-classes.
        trained: whether to load the weights. Without it the detector has random ones.

    Raises:
        InputError: there is nothing of that kind, it cannot be read, or its classes cannot be matched.
    """
    path = Path(spec)
    if path.suffix in WEIGHT_FILES and not path.is_dir():
        model, classes = _load_file(path, name=backbone, model_kwargs=model_kwargs, student=student, trained=trained)
        source = spec
    elif backbone or model_kwargs:
        raise InputError(f"--teacher-model and --teacher-kwargs go with a weights file, but --teacher {spec} is none")
    elif spec.startswith(TORCHVISION):
        (model, classes), source = torchvision_detector(spec, model_kwargs={}, trained=trained), spec
    elif path.is_dir():
        model, folder = load_detector(spec, trained=trained)
        classes, source = Classes(len(model.config.classes), (tuple(model.config.classes),)), str(folder)
    else:
        raise InputError(f"--teacher {spec}: no such run folder or file; torchvision's detectors are torchvision/NAME")
    student_classes = Classes(len(student.classes), (tuple(student.classes),))
    class_map = match_classes(student_classes, classes, map_file=map_file, spec=spec)
    # COCO's ids count the background, which the classes of a config do not
    offset = model.first_label - (classes.count - len(model.config.classes))
    is_same = class_map.is_identity(classes.count) and offset == model.first_label
    if not is_same:
        map_outputs(model, class_map.columns, offset=offset)
    model.config = replace(model.config, classes=student.classes)
    return model, source, None if is_same else class_map


class MappedPredictor(nn.Module):
    """The predictor of Faster R-CNN's RoI head in the student's classes. What is none of them counts as background.

    Args:
        predictor: gives logits (n, its classes + 1) and box deltas (n, 4 (its classes + 1)); 0 is the background.
        columns: its column for each of the student's classes, None for those that it does not know.
    """

    def __init__(self, predictor: nn.Module, columns: list[int | None]) -> None:
        super().__init__()
        self.predictor = predictor
        known = [label for label, column in enumerate(columns, 1) if column is not None]
        self.num_outputs = len(columns) + 1
        self.register_buffer("known", torch.tensor(known), persistent=False)
        self.register_buffer(
            "kept", torch.tensor([column for column in columns if column is not None]), persistent=False
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, classes + 1), -inf for unknown classes, and deltas (n, 4 (classes + 1)), 0 for them."""
        logits, deltas = self.predictor(features)
        merged = merge_background(logits.float(), self.kept)
        mapped = merged.new_full((len(merged), self.num_outputs), -torch.inf)
        mapped[:, 0], mapped[:, self.known] = merged[:, 0], merged[:, 1:]
        boxes = deltas.new_zeros(len(deltas), self.num_outputs, 4)
        boxes[:, self.known] = deltas.unflatten(-1, (-1, 4))[:, self.kept]
        return mapped, boxes.flatten(1)


def map_outputs(model: RetinaNet | FasterRCNN, columns: list[int | None], offset: int) -> None:
    """Give a detector the student's classes, by replacing the part that predicts classes.

    Args:
        model: the detector.
        columns: of a `ClassMap`.
        offset: the column of its first class.
    """
    columns = [None if column is None else column + offset for column in columns]
    if isinstance(model, RetinaNet):
        model.head.classification_head = MappedLogits(model.head.classification_head, columns)
    else:
        model.roi_heads.box_predictor = MappedPredictor(model.roi_heads.box_predictor, columns)


def _load_file(
    path: Path, *, name: str | None, model_kwargs: dict, student: DetectorConfig, trained: bool
) -> tuple[RetinaNet | FasterRCNN, Classes]:
    """The detector of a weights file and its classes, which are the student's if there are as many."""
    weights, arch, _ = read_checkpoint(path)
    if not any(tensor.startswith("backbone.") for tensor in weights):
        raise InputError(f"--teacher {path} holds no weights of a detector")
    if not name and arch:
        name = f"{TORCHVISION}{arch}" if arch in torchvision_builders() else arch
    if not name:
        raise InputError(
            f"--teacher {path} is a weights file: name its timm backbone, or torchvision/NAME, with --teacher-model"
        )
    if name.startswith(TORCHVISION):
        model, classes = torchvision_detector(name, model_kwargs=model_kwargs, weights=weights)
    else:
        # the number of stages to train is one of the student's backbone
        config = replace(student, backbone=name, model_kwargs=model_kwargs, trainable_layers=None)
        config = replace(config, **_options_of_file(weights, config))
        model, classes = build_detector(config), Classes(len(config.classes))
    if trained:
        load_weights(model, path, weights)
    return model, classes


def _options_of_file(weights: dict[str, Tensor], config: DetectorConfig) -> dict[str, object]:
    """Width, norm and number of classes of a detector by the names and shapes of its weights, as `DetectorConfig` has
    them.

    Empty where they are not the weights of a detector of the config's kind.
    """
    lateral = weights.get("backbone.fpn.inner_blocks.0.0.weight")
    is_retinanet = config.detector == "retinanet"
    part = "head.classification_head.cls_logits" if is_retinanet else "roi_heads.box_predictor.cls_score"
    outputs = weights.get(f"{part}.bias")
    if lateral is None or outputs is None:
        return {}
    if "backbone.fpn.inner_blocks.0.1.weight" in weights:
        norm = "gn"
    elif any(name.endswith("num_batches_tracked") for name in weights):
        norm = "bn"
    else:  # a frozen BatchNorm does not count batches
        norm = "frozen_bn"
    anchors = len(ASPECT_RATIOS) * len(config.anchors()[0])  # at each place
    count = len(outputs) // anchors if is_retinanet else len(outputs) - 1
    classes = config.classes if count == len(config.classes) else [str(label) for label in range(count)]
    return {"fpn_channels": len(lateral), "norm": norm, "classes": classes}
