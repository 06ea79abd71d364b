"""What builds a detector: the values that config.json of an export holds, and checks of them."""

import inspect
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torchvision.models import detection

from w2s.engine.errors import InputError

NORMS = ("frozen_bn", "bn", "gn")


class DetectorKind(NamedTuple):
    """What distinguishes one kind of detector from another.

    Attributes:
        torchvision: its class there.
        strides, extra_levels, anchor_scale: the pyramid and anchors that torchvision builds, see `DetectorConfig`.
        first_label: the label of the first class.
        losses: names of torchvision's losses, in its order.
        terms: names of the head outputs, and of the distillation terms that compare them.
        lr: the learning rate of torchvision's reference for a global batch of 16.
    """

    torchvision: type
    strides: tuple[int, ...]
    extra_levels: int
    anchor_scale: float
    first_label: int
    losses: tuple[str, ...]
    terms: tuple[str, ...]
    lr: float

    @property
    def loss_columns(self) -> tuple[str, ...]:
        """The columns of metrics.csv for torchvision's losses and for the distillation terms."""
        return (*self.losses, *(f"kd_{name}" for name in self.terms))


DETECTOR_KINDS = {
    "retinanet": DetectorKind(
        torchvision=detection.RetinaNet,
        strides=(8, 16, 32),
        extra_levels=2,
        anchor_scale=4.0,
        first_label=0,
        losses=("classification", "bbox_regression"),
        terms=("cls", "box"),
        lr=0.01,
    ),
    "fasterrcnn": DetectorKind(
        torchvision=detection.FasterRCNN,
        strides=(4, 8, 16, 32),
        extra_levels=1,
        anchor_scale=8.0,
        first_label=1,  # 0 is the background
        losses=("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"),
        terms=("rpn_cls", "rpn_box", "roi_cls", "roi_box"),
        lr=0.02,
    ),
}

# arguments of torchvision's detectors that `build_detector` derives from the rest of the config
DERIVED_ARGUMENTS = (
    *("backbone", "num_classes", "min_size", "max_size", "image_mean", "image_std", "anchor_generator", "head"),
    *("proposal_matcher", "rpn_anchor_generator", "rpn_head", "box_roi_pool", "box_head", "box_predictor"),
)


@dataclass
class DetectorConfig:
    """Everything that builds a detector, apart from its weights.

    Attributes:
        detector: "retinanet" or "fasterrcnn".
        backbone: timm's name.
        classes: names in the order of the labels.
        norm: one of NORMS; "gn" also normalises the pyramid.
        strides: of the backbone's levels; empty for the default.
        extra_levels: levels above them: 0, 1 (pooled) or 2 (convolutions); None for the default.
        anchor_scale: side of the smallest anchor of a level over its stride; None for the default.
        fpn_channels: channels of the pyramid.
        min_size, max_size: images are resized to this shorter side in pixels, and at most this longer side.
        trainable_layers: how many of the backbone's last stages are trained; None for all.
        model_kwargs: further arguments of timm's backbone.
        detector_kwargs: further arguments of torchvision's detector.

    Raises:
        InputError: a value is out of range.
    """

    detector: str
    backbone: str
    classes: list[str]
    norm: str = "bn"
    strides: list[int] = field(default_factory=list)
    extra_levels: int | None = None
    anchor_scale: float | None = None
    fpn_channels: int = 256
    min_size: int = 800
    max_size: int = 1333
    trainable_layers: int | None = None
    model_kwargs: dict = field(default_factory=dict)
    detector_kwargs: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.detector not in DETECTOR_KINDS:
            raise InputError(f"unknown detector '{self.detector}': there are {' and '.join(DETECTOR_KINDS)}")
        self.strides = sorted(self.strides or self.kind.strides)
        if self.extra_levels is None:
            self.extra_levels = self.kind.extra_levels
        if self.anchor_scale is None:
            self.anchor_scale = self.kind.anchor_scale
        if not 1 <= self.anchor_scale * self.strides[0] < 2**16:
            raise InputError(f"--anchor-scale {self.anchor_scale:g}: no side in pixels on stride {self.strides[0]}")
        if self.extra_levels not in (0, 1, 2):
            raise InputError(f"--extra-levels {self.extra_levels}: 0, 1 (pooled) or 2 (convolutions)")
        if self.norm not in NORMS:
            raise InputError(f"--norm {self.norm}: {', '.join(NORMS)}")
        if self.min_size > self.max_size:
            raise InputError(f"--min-size {self.min_size} is above --max-size {self.max_size}")

    @property
    def kind(self) -> DetectorKind:
        """What follows from `detector`."""
        return DETECTOR_KINDS[self.detector]

    def anchors(self) -> tuple[tuple[int, ...], ...]:
        """Anchor sides in pixels, level by level: proportional to the strides, three to a level for RetinaNet."""
        extra_strides = [self.strides[-1] * 2**k for k in range(1, self.extra_levels + 1)]
        octaves = (0, 1 / 3, 2 / 3) if self.detector == "retinanet" else (0,)
        return tuple(
            tuple(int(int(self.anchor_scale * stride) * 2**octave) for octave in octaves)
            for stride in self.strides + extra_strides
        )


def check_classes(config: DetectorConfig, classes: list[str], source: Path) -> None:
    """Refuse data whose classes are not those of the detector from `source`.

    Raises:
        InputError: other names, or the same in another order.
    """
    if config.classes != classes:
        raise InputError(f"{source} has {len(config.classes)} classes, which are not the {len(classes)} of the data")


def check_detector_kwargs(config: DetectorConfig) -> None:
    """Refuse further arguments that torchvision would ignore, or stumble over in the middle of the first evaluation.

    Raises:
        InputError: an unknown or derived argument, or an impossible value.
    """
    parameters = inspect.signature(config.kind.torchvision).parameters
    for name in config.detector_kwargs:  # torchvision passes unknown names on to classes that ignore them
        if name not in parameters or name == "kwargs":
            raise InputError(f"--detector-kwargs: torchvision's {config.detector} has no '{name}'")
    for name in config.detector_kwargs:
        if name in DERIVED_ARGUMENTS:
            raise InputError(
                f"--detector-kwargs: '{name}' follows from the other options, such as --min-size or --data"
            )
    for name, value in config.detector_kwargs.items():
        if value != parameters[name].default:
            _check_value(name, value, parameters[name].default)
    for low in parameters:
        if low.endswith("bg_iou_thresh"):
            high = low.replace("bg_", "fg_")
            background = config.detector_kwargs.get(low, parameters[low].default)
            foreground = config.detector_kwargs.get(high, parameters[high].default)
            if background > foreground:
                raise InputError(f"--detector-kwargs: {low} {background:g} is above {high} {foreground:g}")


def _check_value(name: str, value: object, default: object) -> None:
    """Compare an argument's value with its default.

    Raises:
        InputError: it is no count where the default is one, no share where it is one, or no four weights.
    """

    def is_positive(number: object, kind: type) -> bool:
        return isinstance(number, kind) and not isinstance(number, bool) and 0 < number < math.inf

    if isinstance(default, int):
        expected, is_good = "a number from 1 up", is_positive(value, int)
    elif isinstance(default, float):
        expected, is_good = "a number in [0, 1]", value == 0 or (is_positive(value, int | float) and value <= 1)
    else:  # bbox_reg_weights
        expected = "four numbers above 0"
        is_good = isinstance(value, list | tuple) and len(value) == 4
        is_good = is_good and all(is_positive(weight, int | float) for weight in value)
    if not is_good:
        raise InputError(f"--detector-kwargs: {name} is {expected}, got {value!r}")
