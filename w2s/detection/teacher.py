"""The detector's early teacher: the distillation terms, and a teacher that lines up anchor by anchor."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from w2s.detection.models import DetectorConfig, FasterRCNN, RetinaNet, Seen, build_detector, load_detector
from w2s.engine.errors import InputError
from w2s.images.models import WEIGHT_FILES, load_weights, read_weights
from w2s.teacher import Teacher

# how raw outputs become detections: attributes of RetinaNet, or of Faster R-CNN's RPN and RoI head
POST_PROCESSING = ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates")
POST_PROCESSING += ("_pre_nms_top_n", "_post_nms_top_n")


class DetectorTeacher(Teacher):
    """A frozen detector: head outputs for what a student has `Seen`, detections for a list of images.

    Raises:
        InputError: it does not line up with the student.
    """

    def __init__(
        self,
        model: RetinaNet | FasterRCNN,
        source: str,
        accelerator: Accelerator,
        student: RetinaNet | FasterRCNN,
        channels_last: bool = False,
    ) -> None:
        check_lined_up(student.config, model.config, source)
        if channels_last:
            model.backbone.memory_format = torch.channels_last
        super().__init__(
            model,
            name=f"{model.config.detector}_{model.config.backbone}",
            source=source,
            accelerator=accelerator,
            channels_last=channels_last,
            rebuild=partial(build_detector, model.config),
        )
        # it is scored as the student is: on images of the student's size, as it sees them in training, and with its
        # thresholds
        model.transform.min_size, model.transform.max_size = student.transform.min_size, student.transform.max_size
        for own, other in zip(_detecting(model), _detecting(student), strict=True):
            for name in POST_PROCESSING:
                if hasattr(other, name):
                    setattr(own, name, getattr(other, name))
        # one affine map from the student's normalisation to the teacher's
        mean, std, own_mean, own_std = (
            torch.tensor(values, device=accelerator.device).view(-1, 1, 1)
            for transform in (student.transform, model.transform)
            for values in (transform.image_mean, transform.image_std)
        )
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std
        self.same_range = bool((self.scale == 1).all()) and bool((self.shift == 0).all())

    def forward(self, seen: Seen | list[Tensor]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Both see the batch as the student resized and padded it."""
        if isinstance(seen, list):
            return self.model(seen)
        return self.model.look(seen if self.same_range else seen._replace(images=self._renormalised(seen.images)))

    def shuffled(self, permutation: Callable[[int], Tensor], seen: Seen) -> dict[str, Tensor]:
        """For `--kd-control shuffled`: the images of the batch are exchanged; proposals stay where they are."""
        images = seen.images
        order = permutation(len(images.tensors))
        sizes = [images.image_sizes[row] for row in order.tolist()]
        return self(seen._replace(images=ImageList(images.tensors[order.to(images.tensors.device)], sizes)))

    def compile(self, backend: str) -> None:
        """Compile the backbone, which is the part that --torchcompile means."""
        self.model.backbone.compile(backend=backend)

    def _renormalised(self, images: ImageList) -> ImageList:
        tensors = images.tensors * self.scale + self.shift
        for tensor, (height, width) in zip(tensors, images.image_sizes, strict=True):
            tensor[:, height:], tensor[:, :, width:] = 0, 0  # the padding is 0 in either normalisation
        return ImageList(tensors, images.image_sizes)


def _detecting(model: RetinaNet | FasterRCNN) -> list[nn.Module]:
    """The parts that have POST_PROCESSING."""
    return [model] if isinstance(model, RetinaNet) else [model.rpn, model.roi_heads]


def load_detector_teacher(
    spec: str, backbone: str | None, model_kwargs: dict, student: DetectorConfig
) -> tuple[RetinaNet | FasterRCNN, str]:
    """The detector that `--teacher` means, and where it comes from.

    `spec` is a run folder or another exported folder, or a weights file of the student's own kind of detector with
    the timm name of its `backbone`.

    Raises:
        InputError: nothing of that kind is there, or it cannot be read.
    """
    path = Path(spec)
    if path.suffix in WEIGHT_FILES and not path.is_dir():
        if not backbone:
            raise InputError(f"--teacher {spec} is a weights file: name its timm backbone with --teacher-model")
        # the stages to train are the student's, of its backbone
        config = replace(student, backbone=backbone, model_kwargs=model_kwargs, trainable_layers=None)
        model = build_detector(replace(config, **_pyramid(read_weights(path))))
        load_weights(model, path)
        return model, spec
    if backbone or model_kwargs:
        raise InputError(f"--teacher-model and --teacher-kwargs go with a weights file, but --teacher {spec} is none")
    if not path.is_dir():
        raise InputError(f"--teacher {spec}: no such run folder or file")
    model, folder = load_detector(spec)
    return model, str(folder)


def _pyramid(weights: dict[str, Tensor]) -> dict:
    """Width and norm of a detector's weights, as DetectorConfig names them; nothing where they are no detector's."""
    first = weights.get("backbone.fpn.inner_blocks.0.0.weight")
    if first is None:
        return {}
    counted = any(name.endswith("num_batches_tracked") for name in weights)  # which a frozen BatchNorm does not
    norm = "gn" if "backbone.fpn.inner_blocks.0.1.weight" in weights else "bn" if counted else "frozen_bn"
    return {"fpn_channels": len(first), "norm": norm}


def check_lined_up(student: DetectorConfig, teacher: DetectorConfig, source: str) -> None:
    """Refuse a teacher whose heads do not speak of the same anchors and classes as the student's.

    Raises:
        InputError: another detector, other classes, other anchors, or box deltas of another scale.
    """
    for what, ours, theirs in (
        ("detector", student.detector, teacher.detector),
        ("number of classes", len(student.classes), len(teacher.classes)),
        ("strides", student.strides, teacher.strides),
        ("number of extra levels", student.extra_levels, teacher.extra_levels),
        ("anchor sides", student.anchors(), teacher.anchors()),
        ("weights of box deltas", _delta_weights(student), _delta_weights(teacher)),
    ):
        if ours != theirs:
            raise InputError(f"teacher {source} does not line up: its {what}: {theirs}, the student's: {ours}")
    for ours, theirs in zip(student.classes, teacher.classes, strict=True):
        if ours != theirs:
            raise InputError(f"teacher {source} does not line up: its class '{theirs}' is '{ours}' in the data")


def _delta_weights(config: DetectorConfig) -> tuple[float, ...]:
    """By which Faster R-CNN's RoI head multiplies its deltas; torchvision's default for None."""
    return tuple(config.detector_kwargs.get("bbox_reg_weights") or (10.0, 10.0, 5.0, 5.0))
