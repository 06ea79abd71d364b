"""The teacher of a detector: found, built, and in line with the student anchor by anchor."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from w2s.detection.config import DetectorConfig
from w2s.detection.models import FasterRCNN, RetinaNet, StudentView, build_detector, prepare_layout
from w2s.detection.teacher_models import load_detector_teacher
from w2s.engine.errors import InputError
from w2s.images.classes import ClassMap
from w2s.images.teacher import renormalisation
from w2s.teacher import Teacher

# how raw outputs become detections: attributes of RetinaNet, or of Faster R-CNN's RPN and RoI head
POST_PROCESSING = (
    *("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates"),
    *("_pre_nms_top_n", "_post_nms_top_n"),
)


class DetectorTeacher(Teacher):
    """A frozen detector: head outputs for a `StudentView`, detections for a list of images.

    Args:
        model: the detector with its weights.
        source, device, autocast, channels_last: see `Teacher`.
        student: the detector that it teaches.
        rebuild: see `Teacher`; by default from the model's config.
        class_map: which of its own classes stand for the student's; None where they are the same.

    Attributes:
        known: the student's classes (n,), from 0 up, that it knows, for the terms; None where it knows them all.

    Raises:
        InputError: its heads are not those of the student, see `check_lined_up`.
    """

    def __init__(
        self,
        model: RetinaNet | FasterRCNN,
        *,
        source: str,
        device: torch.device | str,
        student: RetinaNet | FasterRCNN,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        channels_last: bool = False,
        rebuild: Callable[[], nn.Module] | None = None,
        class_map: ClassMap | None = None,
    ) -> None:
        check_lined_up(student.config, model.config, source)
        super().__init__(
            prepare_layout(model, channels_last=channels_last),
            name=f"{model.config.detector}_{model.config.backbone}",
            source=source,
            device=device,
            autocast=autocast,
            channels_last=channels_last,
            rebuild=rebuild or partial(build_detector, model.config),
        )
        # it is scored as the student is: on images of the student's size, which it also gets in training, and with the
        # student's thresholds
        model.transform.min_size, model.transform.max_size = student.transform.min_size, student.transform.max_size
        for teacher_part, student_part in zip(_post_processing(model), _post_processing(student), strict=True):
            for name in POST_PROCESSING:
                if hasattr(student_part, name):
                    setattr(teacher_part, name, getattr(student_part, name))
        scale, shift = renormalisation(
            student.transform.image_mean,
            student.transform.image_std,
            model.transform.image_mean,
            model.transform.image_std,
        )
        self.same_normalisation = bool((scale == 1).all()) and bool((shift == 0).all())
        self.scale = scale.view(-1, 1, 1).to(self.device)
        self.shift = shift.view(-1, 1, 1).to(self.device)
        self.known = None
        if class_map and len(class_map.known) < len(class_map.columns):
            self.known = torch.tensor(class_map.known, device=self.device)
        self.note = class_map.describe() if class_map else None

    def forward(self, batch: StudentView | list[Tensor]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Head outputs for a batch as the student resized and padded it, or detections for a list of images."""
        if isinstance(batch, list):
            return self.model(batch)
        if not self.same_normalisation:
            batch = batch._replace(images=self._renormalised(batch.images))
        return self.model.head_outputs(batch)

    def shuffled(self, permutation: Callable[[int, torch.device], Tensor], view: StudentView) -> dict[str, Tensor]:
        """For `--kd-control shuffled`: the images of the batch are exchanged, the proposals stay where they are."""
        images = view.images
        order = permutation(len(images.tensors), torch.device("cpu"))  # the sizes of images are no tensors
        sizes = [images.image_sizes[row] for row in order.tolist()]
        exchanged = ImageList(images.tensors[order.to(images.tensors.device)], sizes)
        return self(view._replace(images=exchanged))

    def compile(self, backend: str) -> None:
        """Compile the backbone, which is the part that --torchcompile compiles in a detector."""
        self.model.backbone.compile(backend=backend)

    def _renormalised(self, images: ImageList) -> ImageList:
        """Images as the teacher normalises them; the padding is 0 in either normalisation."""
        tensors = images.tensors * self.scale + self.shift
        for tensor, (height, width) in zip(tensors, images.image_sizes, strict=True):
            tensor[:, height:] = 0
            tensor[:, :, width:] = 0
        return ImageList(tensors, images.image_sizes)


def _post_processing(model: RetinaNet | FasterRCNN) -> list[nn.Module]:
    """The parts of a detector that have the attributes of POST_PROCESSING."""
    return [model] if isinstance(model, RetinaNet) else [model.rpn, model.roi_heads]


def build_detector_teacher(
    spec: str,
    *,
    backbone: str | None,
    model_kwargs: dict,
    student: RetinaNet | FasterRCNN,
    map_file: str | None = None,
    **options: object,
) -> DetectorTeacher:
    """The frozen teacher that `--teacher` means, in line with the student.

    Args:
        spec, backbone, model_kwargs, map_file: see `load_detector_teacher`.
        student: the detector that it teaches.
        options: device, autocast and channels_last, see `Teacher`.

    Raises:
        InputError: see `load_detector_teacher` and `check_lined_up`.
    """
    load = partial(
        load_detector_teacher,
        spec,
        backbone=backbone,
        model_kwargs=model_kwargs,
        student=student.config,
        map_file=map_file,
    )
    model, source, class_map = load()
    return DetectorTeacher(
        model,
        source=source,
        student=student,
        rebuild=lambda: load(trained=False)[0],
        class_map=class_map,
        **options,
    )


def check_lined_up(student: DetectorConfig, teacher: DetectorConfig, source: str) -> None:
    """Refuse a teacher whose head outputs are not about the same anchors and classes as the student's.

    Args:
        student, teacher: the two configs.
        source: names the teacher in errors.

    Raises:
        InputError: another kind of detector, other classes, other anchors, or box deltas of another scale.
    """
    for what, of_student, of_teacher in (
        ("detector", student.detector, teacher.detector),
        ("number of classes", len(student.classes), len(teacher.classes)),
        ("strides", student.strides, teacher.strides),
        ("number of extra levels", student.extra_levels, teacher.extra_levels),
        ("anchor sides", student.anchors(), teacher.anchors()),
        ("weights of box deltas", _delta_weights(student), _delta_weights(teacher)),
    ):
        if of_student != of_teacher:
            raise InputError(
                f"teacher {source} does not line up: its {what}: {of_teacher}, the student's: {of_student}; a student "
                f"of {_options(teacher)} fits"
            )
    for of_student, of_teacher in zip(student.classes, teacher.classes, strict=True):
        if of_student != of_teacher:
            raise InputError(
                f"teacher {source} does not line up: its class '{of_teacher}' is '{of_student}' in the data"
            )


def _options(config: DetectorConfig) -> str:
    """The options that give a student the anchors and box deltas of a config."""
    strides = " ".join(map(str, config.strides))
    options = f"--detector {config.detector} --strides {strides} --extra-levels {config.extra_levels}"
    options += f" --anchor-scale {config.anchor_scale:g}"
    if weights := config.detector_kwargs.get("bbox_reg_weights"):
        options += f" --detector-kwargs bbox_reg_weights={tuple(weights)}".replace(" (", "(").replace(", ", ",")
    return options


def _delta_weights(config: DetectorConfig) -> tuple[float, ...]:
    """The factors of Faster R-CNN's box deltas (x, y, width, height); torchvision's defaults where none are given."""
    return tuple(config.detector_kwargs.get("bbox_reg_weights") or (10.0, 10.0, 5.0, 5.0))
