"""Detectors: any timm backbone -> torchvision's FPN -> torchvision's RetinaNet or Faster R-CNN.

A forward in training gives torchvision's own losses, and beside them what the distillation terms need (`Seen`): the
batch as the student resized it, its head outputs, the proposals it sampled.
"""

import dataclasses
import inspect
import json
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign

from w2s.detection.backbones import NORMS, TimmFPN, group_norm
from w2s.engine.errors import InputError
from w2s.engine.files import replacing_folder
from w2s.images.models import find_model, load_weights, pretrained_cfg

# strides of the backbone's levels, levels above them, anchor side over stride: as torchvision builds them
DEFAULTS = {"retinanet": ([8, 16, 32], 2, 4.0), "fasterrcnn": ([4, 8, 16, 32], 1, 8.0)}
OWN = ("backbone", "num_classes", "min_size", "max_size", "image_mean", "image_std", "anchor_generator", "head")
OWN += ("proposal_matcher",)
OWN += ("rpn_anchor_generator", "rpn_head", "box_roi_pool", "box_head", "box_predictor")  # of a detector's arguments
TERMS = {"retinanet": ("cls", "box"), "fasterrcnn": ("rpn_cls", "rpn_box", "roi_cls", "roi_box")}


@dataclass
class DetectorConfig:
    """All that builds a detector but its weights; config.json of an export.

    `classes` are names, in the order of the labels. None and [] stand for the detector's defaults.
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
        if self.detector not in DEFAULTS:
            raise InputError(f"unknown detector '{self.detector}': there are {' and '.join(DEFAULTS)}")
        strides, extra, scale = DEFAULTS[self.detector]
        self.strides = sorted(self.strides or strides)
        self.extra_levels = extra if self.extra_levels is None else self.extra_levels
        self.anchor_scale = scale if self.anchor_scale is None else self.anchor_scale
        if not 1 <= self.anchor_scale * self.strides[0] < 2**16:
            raise InputError(f"--anchor-scale {self.anchor_scale:g}: no side in pixels on stride {self.strides[0]}")
        if self.extra_levels not in (0, 1, 2):
            raise InputError(f"--extra-levels {self.extra_levels}: 0, 1 (pooled) or 2 (convolutions)")
        if self.norm not in NORMS:
            raise InputError(f"--norm {self.norm}: {', '.join(NORMS)}")
        if self.min_size > self.max_size:
            raise InputError(f"--min-size {self.min_size} is above --max-size {self.max_size}")

    def anchors(self) -> tuple[tuple[int, ...], ...]:
        """Anchor sides in pixels, level by level: proportional to the strides, three a level for RetinaNet."""
        strides = self.strides + [self.strides[-1] * 2**k for k in range(1, self.extra_levels + 1)]
        octaves = (0, 1 / 3, 2 / 3) if self.detector == "retinanet" else (0,)
        return tuple(tuple(int(int(self.anchor_scale * s) * 2**octave) for octave in octaves) for s in strides)


class Seen(NamedTuple):
    """What a training forward leaves for the distillation terms."""

    images: ImageList  # resized, normalised and padded by the student
    outputs: dict[str, Tensor]  # raw outputs of the heads, float32, by the names of TERMS
    proposals: list[Tensor] | None  # Faster R-CNN: those sampled for the RoI head, in the pixels of `images`


class _Float32Anchors(AnchorGenerator):
    """torchvision's takes the features' type: in bfloat16 a coordinate of 600 would be rounded to multiples of 4."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32, device)


class _Watched(nn.Module):
    """Keeps what the terms need while torchvision's own forward runs; head outputs are float32 from there on."""

    def _watch(self, **modules: nn.Module) -> None:
        self._kept = {}
        for name, module in modules.items():
            module.register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, module: nn.Module, inputs: tuple, output):
        if name == "images":
            kept = output[0]
        elif name == "proposals":
            kept = inputs[1]
        else:
            kept = output = _float32(output)
        if self.training:
            self._kept[name] = kept
        return output

    def eager_outputs(self, losses: dict[str, Tensor], detections: list[dict[str, Tensor]]):
        """torchvision's last word of a forward: (losses, Seen) in training, detections otherwise."""
        if not self.training:
            return detections
        kept, self._kept = self._kept, {}
        return losses, Seen(kept["images"], self.name_outputs(kept), kept.get("proposals"))


class RetinaNet(_Watched, detection.RetinaNet):
    """torchvision's RetinaNet; labels count from 0."""

    first_label = 0
    losses = ("classification", "bbox_regression")  # names of the task's own, in torchvision's order

    def __init__(self, backbone: nn.Module, **kwargs) -> None:
        super().__init__(backbone, **kwargs)
        self._watch(images=self.transform, heads=self.head)

    @staticmethod
    def name_outputs(kept: dict) -> dict[str, Tensor]:
        """Logits (N, anchors, classes) and deltas (N, anchors, 4)."""
        return {"cls": kept["heads"]["cls_logits"], "box": kept["heads"]["bbox_regression"]}

    def look(self, seen: Seen) -> dict[str, Tensor]:
        """The head outputs for a batch that another detector transformed."""
        return self.name_outputs({"heads": self.head(list(self.backbone(seen.images.tensors).values()))})


class FasterRCNN(_Watched, detection.FasterRCNN):
    """torchvision's Faster R-CNN; labels count from 1, 0 is the background."""

    first_label = 1
    losses = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")

    def __init__(self, backbone: nn.Module, **kwargs) -> None:
        super().__init__(backbone, **kwargs)
        roi = self.roi_heads
        self._watch(images=self.transform, rpn=self.rpn.head, proposals=roi.box_roi_pool, roi=roi.box_predictor)

    @staticmethod
    def name_outputs(kept: dict) -> dict[str, Tensor]:
        """RPN logits (anchors, 1) and deltas (anchors, 4), RoI logits (proposals, classes + 1) and their deltas."""
        outputs = dict(zip(("rpn_cls", "rpn_box"), concat_box_prediction_layers(*kept["rpn"]), strict=True))
        return outputs | dict(zip(("roi_cls", "roi_box"), kept["roi"], strict=True))

    def look(self, seen: Seen) -> dict[str, Tensor]:
        """The head outputs for a batch and proposals of another detector, on this one's own features."""
        features = self.backbone(seen.images.tensors)
        rpn = self.rpn.head(list(features.values()))
        pooled = self.roi_heads.box_roi_pool(features, seen.proposals, seen.images.image_sizes)
        return self.name_outputs({"rpn": rpn, "roi": self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))})


DETECTORS = {"retinanet": RetinaNet, "fasterrcnn": FasterRCNN}


def build_detector(config: DetectorConfig, pretrained: bool = False) -> RetinaNet | FasterRCNN:
    """The detector of a config, with random weights but for a `pretrained` backbone.

    Raises:
        InputError: see TimmFPN; arguments that torchvision's detector does not take.
    """
    cfg = pretrained_cfg(config.backbone)
    backbone = TimmFPN(
        *(config.backbone, config.strides, config.extra_levels, config.fpn_channels, config.norm),
        *(config.trainable_layers, config.model_kwargs, pretrained),
    )
    sizes = config.anchors()
    anchors = _Float32Anchors(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    width, classes = config.fpn_channels, len(config.classes)
    options = {"min_size": config.min_size, "max_size": config.max_size, **config.detector_kwargs}
    options |= {"image_mean": list(cfg["mean"]), "image_std": list(cfg["std"])}
    kind = DETECTORS[config.detector]
    known = inspect.signature(kind.__bases__[-1]).parameters  # torchvision itself lets unknown ones pass
    if unknown := [name for name in config.detector_kwargs if name not in known or name == "kwargs"]:
        raise InputError(f"--detector-kwargs: torchvision's {config.detector} has no '{unknown[0]}'")
    if own := [name for name in config.detector_kwargs if name in OWN]:
        raise InputError(f"--detector-kwargs: '{own[0]}' follows from the other options, as --min-size and --data")
    for name, value in config.detector_kwargs.items():
        if value != known[name].default:
            _check_argument(name, value, known[name].default)
    for low, high in ((n, n.replace("bg_", "fg_")) for n in known if n.endswith("bg_iou_thresh")):
        if (bg := options.get(low, known[low].default)) > (fg := options.get(high, known[high].default)):
            raise InputError(f"--detector-kwargs: {low} {bg:g} is above {high} {fg:g}")
    if config.detector == "retinanet":
        norm = group_norm if config.norm == "gn" else None
        head = RetinaNetHead(width, anchors.num_anchors_per_location()[0], classes, norm_layer=norm)
        model = kind(backbone, num_classes=classes, anchor_generator=anchors, head=head, **options)
    else:
        options |= {"box_head": TwoMLPHead(width * 49, width * 4)}  # 256 channels: torchvision's 1024
        options |= {"box_predictor": FastRCNNPredictor(width * 4, classes + 1)}
        options["box_roi_pool"] = MultiScaleRoIAlign([str(k) for k in range(len(config.strides))], 7, 2)
        model = kind(backbone, rpn_anchor_generator=anchors, **options)
    model.config = config
    return model


def _check_argument(name: str, value: object, default: object) -> None:
    """Refuse what torchvision would stumble over in the middle of the first evaluation.

    Raises:
        InputError: no count where the default is one, no share where it is one, no four weights.
    """

    def positive(number: object, kind: type) -> bool:
        return isinstance(number, kind) and not isinstance(number, bool) and 0 < number < math.inf

    if isinstance(default, int):
        wanted, good = "a number from 1 up", positive(value, int)
    elif isinstance(default, float):
        wanted, good = "a number in [0, 1]", value == 0 or (positive(value, int | float) and value <= 1)
    else:  # bbox_reg_weights
        wanted = "four numbers above 0"
        good = isinstance(value, list | tuple) and len(value) == 4 and all(positive(v, int | float) for v in value)
    if not good:
        raise InputError(f"--detector-kwargs: {name} is {wanted}, got {value!r}")


def _float32(output):
    if isinstance(output, dict):
        return {k: _float32(v) for k, v in output.items()}
    return output.float() if isinstance(output, Tensor) else type(output)(_float32(v) for v in output)


def export(model: RetinaNet | FasterRCNN, folder: Path) -> None:
    """Write model.safetensors and config.json into `folder`, complete or as it was before."""
    with replacing_folder(folder) as beside:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, beside / "model.safetensors")
        (beside / "config.json").write_text(json.dumps(dataclasses.asdict(model.config), indent=2))


def read_config(folder: Path) -> DetectorConfig:
    """config.json of an export.

    Raises:
        InputError: it is no detector's.
    """
    try:
        options = json.loads((folder / "config.json").read_text())
        if "detector" not in options:
            raise InputError(f"{folder} is no detector: it holds no exported detector, but another kind of model")
        return DetectorConfig(**options)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} holds no exported detector: {' '.join(str(error).split())[:200]}") from None


def load_detector(path: str, **changes: object) -> tuple[RetinaNet | FasterRCNN, Path]:
    """The detector of a run folder or an exported folder, with its weights, and where it was found.

    Args:
        path: of the folder.
        changes: to its config, as min_size.

    Raises:
        InputError: nothing there, or it cannot be read.
    """
    folder = find_model(path)
    model = build_detector(dataclasses.replace(read_config(folder), **changes))
    load_weights(model, folder / "model.safetensors")
    return model, folder
