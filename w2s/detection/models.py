"""Detectors: any timm backbone -> torchvision's FPN -> torchvision's RetinaNet or Faster R-CNN.

In training a forward returns torchvision's own losses and, beside them, what the distillation terms need: a
`StudentView` with the batch as the student resized it, its head outputs, and the proposals that it sampled.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign

from w2s.detection.backbones import TimmFPN, group_norm
from w2s.detection.config import DetectorConfig, check_detector_kwargs
from w2s.engine.errors import InputError, on_one_line
from w2s.engine.files import replacing_folder
from w2s.images.models import find_model, load_weights, pretrained_cfg

ASPECT_RATIOS = (0.5, 1.0, 2.0)  # of anchors, height over width


class StudentView(NamedTuple):
    """What the student made of a batch in training: all that a teacher and the distillation terms need of it.

    Attributes:
        images: the batch as the student resized, normalised and padded it.
        outputs: the raw outputs of its heads, float32, by the names of `DetectorKind.terms`.
        proposals: for Faster R-CNN the boxes (n, 4) of each image that were sampled for the RoI head, in pixels of
            `images`; None for RetinaNet.
        heads: the tensors that came out of the heads, float32, from which both the losses and `outputs` were made.
        targets: boxes and labels of each image, as the student resized them.
        anchors: of each image, (anchors, 4) in pixels of `images`, for RetinaNet; None for Faster R-CNN.
    """

    images: ImageList
    outputs: dict[str, Tensor]
    proposals: list[Tensor] | None
    heads: list[Tensor]
    targets: list[dict[str, Tensor]]
    anchors: list[Tensor] | None = None


class Float32Anchors(AnchorGenerator):
    """Anchors in float32: torchvision's take the type of the features, and bfloat16 rounds 601 to a multiple of 4."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32, device)


class _RecordingDetector(nn.Module):
    """Records what a `StudentView` holds while torchvision's own forward runs, and converts head outputs to float32."""

    config: DetectorConfig  # set by `build_detector`

    @property
    def first_label(self) -> int:
        """The label of the first class."""
        return self.config.kind.first_label

    def _record_from(self, **modules: nn.Module) -> None:
        """Record what goes into or comes out of these modules, under the names of the arguments."""
        self._recorded = {}
        for name, module in modules.items():
            module.register_forward_hook(partial(self._record, name))

    def _record(self, name: str, module: nn.Module, inputs: tuple, output: object) -> object:
        """A forward hook: what it returns takes the place of the module's output."""
        if name in ("batch", "anchors"):
            value = output
        elif name == "proposals":
            value = inputs[1]
        else:
            value = output = _to_float32(output)
        if self.training:
            self._recorded[name] = value
        return output

    def eager_outputs(self, losses: dict[str, Tensor], detections: list[dict[str, Tensor]]) -> object:
        """What torchvision's forward returns: (losses, StudentView) in training, detections otherwise."""
        if not self.training:
            return detections
        recorded, self._recorded = self._recorded, {}
        return losses, StudentView(
            images=recorded["batch"][0],
            outputs=self.name_outputs(recorded),
            proposals=recorded.get("proposals"),
            heads=self.head_tensors(recorded),
            targets=recorded["batch"][1],
            anchors=recorded.get("anchors"),
        )


class RetinaNet(_RecordingDetector, detection.RetinaNet):
    """torchvision's RetinaNet."""

    def __init__(self, backbone: nn.Module, **kwargs) -> None:
        super().__init__(backbone, **kwargs)
        self._record_from(batch=self.transform, anchors=self.anchor_generator, heads=self.head)

    @staticmethod
    def name_outputs(recorded: dict) -> dict[str, Tensor]:
        """The head outputs by their names: logits (N, anchors, classes), deltas (N, anchors, 4)."""
        return {"cls": recorded["heads"]["cls_logits"], "box": recorded["heads"]["bbox_regression"]}

    @staticmethod
    def head_tensors(recorded: dict) -> list[Tensor]:
        """What came out of the heads."""
        return list(recorded["heads"].values())

    def head_outputs(self, view: StudentView) -> dict[str, Tensor]:
        """This detector's head outputs for a batch that another one transformed."""
        features = self.backbone(view.images.tensors)
        return self.name_outputs({"heads": self.head(list(features.values()))})


class FasterRCNN(_RecordingDetector, detection.FasterRCNN):
    """torchvision's Faster R-CNN."""

    def __init__(self, backbone: nn.Module, **kwargs) -> None:
        super().__init__(backbone, **kwargs)
        self._record_from(
            batch=self.transform,
            rpn=self.rpn.head,
            proposals=self.roi_heads.box_roi_pool,
            roi=self.roi_heads.box_predictor,
        )

    @staticmethod
    def name_outputs(recorded: dict) -> dict[str, Tensor]:
        """The head outputs by their names: the RPN's logits (anchors, 1) and deltas (anchors, 4) with the anchors
        of all images in one dimension, the RoI head's logits (proposals, classes + 1) and deltas of each class."""
        rpn_logits, rpn_deltas = recorded["rpn"]
        rpn_cls, rpn_box = concat_box_prediction_layers(rpn_logits, rpn_deltas)
        roi_cls, roi_box = recorded["roi"]
        return {"rpn_cls": rpn_cls, "rpn_box": rpn_box, "roi_cls": roi_cls, "roi_box": roi_box}

    @staticmethod
    def head_tensors(recorded: dict) -> list[Tensor]:
        """What came out of the heads, the RPN's level by level."""
        return [*recorded["rpn"][0], *recorded["rpn"][1], *recorded["roi"]]

    def head_outputs(self, view: StudentView) -> dict[str, Tensor]:
        """This detector's head outputs for a batch and proposals of another one, on its own features."""
        features = self.backbone(view.images.tensors)
        rpn = self.rpn.head(list(features.values()))
        pooled = self.roi_heads.box_roi_pool(features, view.proposals, view.images.image_sizes)
        roi = self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))
        return self.name_outputs({"rpn": rpn, "roi": roi})


def _to_float32(output: object) -> object:
    """Head outputs in float32: a tensor, or a mapping, list or tuple of them."""
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, dict):
        return {name: _to_float32(value) for name, value in output.items()}
    return type(output)(_to_float32(value) for value in output)


def build_detector(config: DetectorConfig, pretrained: bool = False) -> RetinaNet | FasterRCNN:
    """The detector of a config, with random weights; `pretrained` gives its backbone timm's.

    Raises:
        InputError: see `TimmFPN` and `check_detector_kwargs`.
    """
    normalisation = pretrained_cfg(config.backbone)
    backbone = TimmFPN(
        config.backbone,
        strides=config.strides,
        extra_levels=config.extra_levels,
        channels=config.fpn_channels,
        norm=config.norm,
        trainable_layers=config.trainable_layers,
        model_kwargs=config.model_kwargs,
        pretrained=pretrained,
    )
    check_detector_kwargs(config)
    sizes = config.anchors()
    anchors = Float32Anchors(sizes, aspect_ratios=(ASPECT_RATIOS,) * len(sizes))
    options = {
        "min_size": config.min_size,
        "max_size": config.max_size,
        "image_mean": list(normalisation["mean"]),
        "image_std": list(normalisation["std"]),
        **config.detector_kwargs,
    }
    channels, num_classes = config.fpn_channels, len(config.classes)
    if config.detector == "retinanet":
        head = RetinaNetHead(
            channels,
            anchors.num_anchors_per_location()[0],
            num_classes,
            norm_layer=group_norm if config.norm == "gn" else None,
        )
        model = RetinaNet(backbone, num_classes=num_classes, anchor_generator=anchors, head=head, **options)
    else:
        levels = [str(k) for k in range(len(config.strides))]
        model = FasterRCNN(
            backbone,
            rpn_anchor_generator=anchors,
            box_head=TwoMLPHead(channels * 7 * 7, channels * 4),  # torchvision's 1024 features at 256 channels
            box_predictor=FastRCNNPredictor(channels * 4, num_classes + 1),
            box_roi_pool=MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
            **options,
        )
    model.config = config
    return model


def check_buildable(config: DetectorConfig) -> None:
    """Try to build the detector of a config whose classes are not known yet.

    Raises:
        InputError: it cannot be built.
    """
    build_detector(dataclasses.replace(config, classes=["any"]))


def prepare_layout(
    model: RetinaNet | FasterRCNN, *, channels_last: bool, sync_bn: bool = False
) -> RetinaNet | FasterRCNN:
    """The model with its weights in the NHWC memory format, into which the backbone then also converts its images, and
    with BatchNorm over all processes, as far as these are asked for."""
    if sync_bn:
        model = convert_sync_batchnorm(model)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        model.backbone.memory_format = torch.channels_last
    return model


def export_detector(model: RetinaNet | FasterRCNN, folder: Path) -> None:
    """Write model.safetensors and config.json into `folder`, complete or as it was before."""
    with replacing_folder(folder) as beside:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, beside / "model.safetensors")
        (beside / "config.json").write_text(json.dumps(dataclasses.asdict(model.config), indent=2))


def read_config(folder: Path) -> DetectorConfig:
    """config.json of an export.

    Raises:
        InputError: it cannot be read, or is not that of a detector.
    """
    try:
        options = json.loads((folder / "config.json").read_text())
        if "detector" not in options:
            raise InputError(f"{folder} is no detector: it holds no exported detector, but another kind of model")
        return DetectorConfig(**options)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} holds no exported detector: {on_one_line(error, limit=200)}") from None


def load_detector(path: str, trained: bool = True, **config_changes: object) -> tuple[RetinaNet | FasterRCNN, Path]:
    """The detector of a run folder or an exported folder, with its weights, and the folder where it was found.

    Args:
        path: of the folder.
        trained: whether to load the weights. Without it the detector has random ones.
        config_changes: values to replace in its config, such as min_size.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    folder = find_model(path)
    model = build_detector(dataclasses.replace(read_config(folder), **config_changes))
    if trained:
        load_weights(model, folder / "model.safetensors")
    return model, folder


def load_detector_weights(model: RetinaNet | FasterRCNN, path: str) -> None:
    """Load the weights of a run folder, an exported folder or a weights file into a detector.

    Raises:
        InputError: there are none, or they do not fit.
    """
    weights = Path(path)
    if weights.is_dir():
        folder = find_model(path)
        read_config(folder)  # says more clearly than the weights if this is no detector
        weights = folder / "model.safetensors"
    load_weights(model, weights)
