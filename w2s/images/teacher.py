"""Classifiers as teachers, fitted to the student's images."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2s.engine.errors import InputError
from w2s.images.branches import find_features
from w2s.images.classes import Classes, ClassMap, MappedLogits
from w2s.images.teacher_models import load_teacher
from w2s.teacher import Teacher


def renormalisation(
    student_mean: Sequence[float],
    student_std: Sequence[float],
    teacher_mean: Sequence[float],
    teacher_std: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """The affine map from images normalised for the student to images normalised for the teacher.

    All arguments hold one number a channel. Where the student has another number of channels (grey images), those of
    the teacher are averaged.

    Returns:
        scale and shift, (C,) float32 each: the teacher's images are `images * scale + shift`.
    """
    channels = len(student_mean)
    mean, std = _per_channel(teacher_mean, channels), _per_channel(teacher_std, channels)
    scale = torch.tensor(student_std, dtype=torch.float32) / std
    shift = (torch.tensor(student_mean, dtype=torch.float32) - mean) / std
    return scale, shift


def _per_channel(values: Sequence[float], channels: int) -> Tensor:
    tensor = torch.tensor(values, dtype=torch.float32)
    return tensor if len(values) == channels else tensor.mean().expand(channels)


class ImageTeacher(Teacher):
    """A classifier that gives logits for batches that are normalised and sized for the student.

    Args:
        model: a model with weights in timm's form; its `pretrained_cfg` says which images it takes.
        source, device, autocast, channels_last, rebuild: see `Teacher`.
        mean, std: how the student's batches are normalised, one number a channel.
        class_map: which of its own classes stand for the student's; None where they are the same.

    Attributes:
        known: labels (n,) of the student's classes that it knows, for the term; None where it knows them all. The
            others have logits of -inf.
        features: the pooled features (B, D) of its last call, once `give_features` was called.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        source: str,
        device: torch.device | str,
        mean: Sequence[float],
        std: Sequence[float],
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        channels_last: bool = False,
        rebuild: Callable[[], nn.Module] | None = None,
        class_map: ClassMap | None = None,
    ) -> None:
        config = model.pretrained_cfg
        super().__init__(
            model,
            name=config.get("architecture"),
            source=source,
            device=device,
            autocast=autocast,
            channels_last=channels_last,
            rebuild=rebuild,
        )
        self.size = tuple(config["input_size"][-2:])
        scale, shift = renormalisation(mean, std, config["mean"], config["std"])
        self.same_range = bool(torch.allclose(scale, torch.ones(()))) and bool(torch.allclose(shift, torch.zeros(())))
        self.scale = scale.view(1, -1, 1, 1).to(self.device)
        self.shift = shift.view(1, -1, 1, 1).to(self.device)
        self.known = None
        if class_map and len(class_map.known) < len(class_map.columns):
            self.known = torch.tensor(class_map.known, device=self.device)
        self.note = class_map.describe() if class_map else None
        self.features: Tensor | None = None
        self.width: int | None = None  # of its features

    def give_features(self) -> None:
        """Keep the pooled features of each call in `features`.

        Raises:
            InputError: the model is not timm's, or none whose classifier follows on pooled features.
        """
        model = self.model.model if isinstance(self.model, MappedLogits) else self.model
        found = find_features(model, (len(self.scale.flatten()), *self.size))
        if found is None:
            raise InputError(f"--kd-term: the teacher from {self.source} gives no features; --kd-term ofa needs none")
        self.width = found[0]

        def keep(_: nn.Module, inputs: tuple[Tensor]) -> None:
            self.features = inputs[0]

        model.get_classifier().register_forward_pre_hook(keep)

    def facts(self, *, switch: float, report: float) -> dict:
        """See `Teacher.facts`; with the width of the features, where they are part of the term."""
        features = {"features": self.width} if self.width else {}
        return super().facts(switch=switch, report=report) | features

    def shuffled(self, permutation: Callable[[int, torch.device], Tensor], *inputs: object) -> Tensor:
        """See `Teacher.shuffled`; the features change places with the outputs."""
        outputs = self(*inputs)
        order = permutation(len(outputs), outputs.device)
        if self.features is not None:
            self.features = self.features[order]
        return outputs[order]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) for a batch (B, C, H, W) that is normalised for the student."""
        if not self.same_range:
            images = images * self.scale + self.shift
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return self.model(images)

    def release(self) -> None:
        """See `Teacher.release`."""
        self.scale = self.shift = self.known = self.features = None
        super().release()


def build_image_teacher(
    spec: str,
    *,
    model_name: str | None,
    model_kwargs: dict,
    classes: Classes,
    data_config: dict,
    device: torch.device | str,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    map_file: str | None = None,
    channels_last: bool = False,
    features: bool = False,
) -> ImageTeacher:
    """The frozen teacher that `--teacher` means, fitted to the student's batches.

    Args:
        spec, model_name, model_kwargs, classes, data_config, map_file: see `load_teacher`.
        device, autocast, channels_last: see `Teacher`.
        features: whether the term takes its features.

    Raises:
        InputError: see `load_teacher` and `ImageTeacher.give_features`.
    """
    load = partial(
        load_teacher,
        spec,
        model_name=model_name,
        model_kwargs=model_kwargs,
        classes=classes,
        data_config=data_config,
        map_file=map_file,
    )
    model, source, class_map = load()
    teacher = ImageTeacher(
        model,
        source=source,
        device=device,
        autocast=autocast,
        mean=data_config["mean"],
        std=data_config["std"],
        channels_last=channels_last,
        rebuild=lambda: load(trained=False)[0],
        class_map=class_map,
    )
    if features:
        teacher.give_features()
    return teacher
