"""Classifiers as teachers: found, built, and fitted to the student's images."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2s.engine.errors import InputError, first_line
from w2s.images.models import WEIGHT_FILES, create_model, find_model, load_folder, load_weights, read_weights
from w2s.teacher import Teacher


def load_teacher(
    spec: str,
    *,
    model_name: str | None,
    model_kwargs: dict,
    num_classes: int,
    data_config: dict,
    trained: bool = True,
) -> tuple[nn.Module, str]:
    """The model that `--teacher` means, and where its weights come from.

    Args:
        spec: a run folder (whose model/ is taken) or another exported folder, a weights file, the name of a timm model
            with pretrained weights, `hf-hub:NAME` or `local-dir:FOLDER`.
        model_name, model_kwargs: the architecture of a weights file, and arguments of it.
        num_classes: of the data.
        data_config: timm's data config of the student: input_size, mean, std. A weights file says nothing of its
            images, so they are taken to be the student's.
        trained: whether to load the weights. Without it the model has random ones.

    Raises:
        InputError: nothing of that kind is there, it cannot be read, or it does not fit the data.
    """
    in_chans, _, img_size = data_config["input_size"]
    path = Path(spec.removeprefix("local-dir:"))
    if path.suffix in WEIGHT_FILES and not path.is_dir():
        if not model_name:
            raise InputError(f"--teacher {spec} is a weights file: name its architecture with --teacher-model")
        model = create_model(model_name, num_classes, in_chans, img_size=img_size, model_kwargs=model_kwargs)
        if trained:
            state = read_weights(path)
            _check_weights_fit(model, state, num_classes=num_classes, in_chans=in_chans, spec=spec)
            load_weights(model, path, state)
        if "pretrained_cfg_overlay" not in model_kwargs:
            images = {"mean": data_config["mean"], "std": data_config["std"]}
            model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (in_chans, img_size, img_size), **images}
    elif model_name or model_kwargs:
        raise InputError(f"--teacher-model and --teacher-kwargs go with a weights file, but --teacher {spec} is none")
    elif path.is_dir():
        path = find_model(str(path))
        model = load_folder(path, trained)
    elif spec.startswith("hf-hub:") or ("/" not in spec and timm.is_model(spec.partition(".")[0])):
        model, path = _load_pretrained(spec, trained), spec
    else:
        raise InputError(f"--teacher {spec}: no such run folder or file, and no timm model of that name")
    channels = model.in_chans if hasattr(model, "in_chans") else model.pretrained_cfg["input_size"][0]
    _check_fit(classes=model.num_classes, num_classes=num_classes, channels=channels, in_chans=in_chans, spec=spec)
    return model, str(path)


def _check_fit(*, classes: int, num_classes: int, channels: int, in_chans: int, spec: str) -> None:
    """Refuse a teacher of other `classes` or `channels` than the data and the student have."""
    if classes != num_classes:
        raise InputError(f"the teacher has {classes} classes, the data {num_classes}: {spec} does not fit")
    if channels != in_chans:
        raise InputError(f"the teacher takes {channels} channels, the student {in_chans}: {spec} does not fit")


def _check_weights_fit(
    model: nn.Module, state: dict[str, Tensor], *, num_classes: int, in_chans: int, spec: str
) -> None:
    """Check classes and channels of a weights file, as far as the shapes of its first and last layer show them."""
    own, config = model.state_dict(), model.pretrained_cfg

    def sizes(layer: object, dimension: int) -> tuple[int, int] | None:
        """The size of a layer's weight in the file and in the model, None where either lacks it."""
        name = layer[0] if isinstance(layer, tuple | list) and layer else layer
        tensors = [weights.get(f"{name}.weight") if hasattr(weights, "get") else None for weights in (state, own)]
        if all(torch.is_tensor(tensor) and tensor.ndim > dimension for tensor in tensors):
            return tensors[0].shape[dimension], tensors[1].shape[dimension]
        return None

    classes, _ = sizes(config.get("classifier"), 0) or (num_classes, num_classes)
    in_file, in_model = sizes(config.get("first_conv"), 1) or (1, 1)
    # a stem may fold patches into channels: then both are the same multiple of the image's
    channels = in_file * in_chans // in_model if in_file * in_chans % in_model == 0 else in_chans
    _check_fit(classes=classes, num_classes=num_classes, channels=channels, in_chans=in_chans, spec=spec)


def _load_pretrained(name: str, trained: bool) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=trained)
    except Exception as error:  # the hub raises many kinds
        reason = f"{type(error).__name__}: {first_line(error, limit=200)}"
        raise InputError(f"cannot load pretrained teacher '{name}': {reason}") from None


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
    """A timm classifier that gives logits for batches that are normalised and sized for the student.

    Args:
        model: a timm model with weights; its `pretrained_cfg` says which images it takes.
        source, device, autocast, channels_last, rebuild: see `Teacher`.
        mean, std: how the student's batches are normalised, one number a channel.
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

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) for a batch (B, C, H, W) that is normalised for the student."""
        if not self.same_range:
            images = images * self.scale + self.shift
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return self.model(images)

    def release(self) -> None:
        """See `Teacher.release`."""
        self.scale = self.shift = None
        super().release()


def build_image_teacher(
    spec: str,
    *,
    model_name: str | None,
    model_kwargs: dict,
    num_classes: int,
    data_config: dict,
    device: torch.device | str,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    channels_last: bool = False,
) -> ImageTeacher:
    """The frozen teacher that `--teacher` means, fitted to the student's batches.

    Args:
        spec, model_name, model_kwargs, num_classes, data_config: see `load_teacher`.
        device, autocast, channels_last: see `Teacher`.

    Raises:
        InputError: see `load_teacher`.
    """
    load = partial(
        load_teacher,
        spec,
        model_name=model_name,
        model_kwargs=model_kwargs,
        num_classes=num_classes,
        data_config=data_config,
    )
    model, source = load()
    return ImageTeacher(
        model,
        source=source,
        device=device,
        autocast=autocast,
        mean=data_config["mean"],
        std=data_config["std"],
        channels_last=channels_last,
        rebuild=lambda: load(trained=False)[0],
    )
