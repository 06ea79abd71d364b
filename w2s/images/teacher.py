"""Classifier teachers: found, built, and fitted to the student's inputs."""

from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from w2s.engine.errors import InputError
from w2s.images.models import WEIGHT_FILES, create_model, find_model, load_folder, load_weights, read_weights
from w2s.teacher import Teacher


def load_teacher(
    spec: str,
    model_name: str | None,
    model_kwargs: dict,
    num_classes: int,
    in_chans: int,
    img_size: int,
    trained: bool = True,
) -> tuple[nn.Module, str]:
    """The model that `--teacher` means, with its weights (random ones if not `trained`), and where they come from.

    `spec` is a run folder (its model/, or best/ named directly) or another exported folder, a weights file with
    `model_name`, the name of a timm model with pretrained weights, `hf-hub:NAME` or `local-dir:FOLDER`.

    Raises:
        InputError: nothing of that kind is there, it cannot be read, or it does not fit the data.
    """
    path = Path(spec.removeprefix("local-dir:"))
    if path.suffix in WEIGHT_FILES and not path.is_dir():
        if not model_name:
            raise InputError(f"--teacher {spec} is a weights file: name its architecture with --teacher-model")
        model = create_model(model_name, num_classes, in_chans, img_size, model_kwargs=model_kwargs)
        if trained:
            state = read_weights(path)
            _check_ends(model, state, num_classes, in_chans, spec)
            load_weights(model, path, state)
        if "pretrained_cfg_overlay" not in model_kwargs:  # a bare file says nothing of its input: the student's size
            model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (in_chans, img_size, img_size)}
    elif model_name or model_kwargs:
        raise InputError(f"--teacher-model and --teacher-kwargs go with a weights file, but --teacher {spec} is none")
    elif path.is_dir():
        path = find_model(str(path))
        model = load_folder(path, trained)
    elif spec.startswith("hf-hub:") or ("/" not in spec and timm.is_model(spec.partition(".")[0])):
        model, path = _of_timm(spec, trained), spec
    else:
        raise InputError(f"--teacher {spec}: no such run folder or file, and no timm model of that name")
    channels = model.pretrained_cfg["input_size"][0] if not hasattr(model, "in_chans") else model.in_chans
    _check_fit(model.num_classes, num_classes, channels, in_chans, spec)
    return model, str(path)


def _check_fit(classes: int, num_classes: int, channels: int, in_chans: int, spec: str) -> None:
    if classes != num_classes:
        raise InputError(f"the teacher has {classes} classes, the data {num_classes}: {spec} does not fit")
    if channels != in_chans:
        raise InputError(f"the teacher takes {channels} channels, the student {in_chans}: {spec} does not fit")


def _check_ends(model: nn.Module, state: dict[str, Tensor], num_classes: int, in_chans: int, spec: str) -> None:
    """Classes and channels of a weights file, as far as the shapes of its ends show them."""

    def sizes(layer: object, dimension: int) -> tuple[int, int] | None:
        """Of the file's tensor and the model's."""
        layer = layer[0] if isinstance(layer, tuple | list) and layer else layer
        both = [tensors.get(f"{layer}.weight") if hasattr(tensors, "get") else None for tensors in (state, own)]
        if all(torch.is_tensor(tensor) and tensor.ndim > dimension for tensor in both):
            return both[0].shape[dimension], both[1].shape[dimension]
        return None

    own, config = model.state_dict(), model.pretrained_cfg
    classes, _ = sizes(config.get("classifier"), 0) or (num_classes, num_classes)
    theirs, ours = sizes(config.get("first_conv"), 1) or (1, 1)
    # a stem may fold patches into channels: then both are the same multiple of the image's
    channels = theirs * in_chans // ours if theirs * in_chans % ours == 0 else in_chans
    _check_fit(classes, num_classes, channels, in_chans, spec)


def _of_timm(name: str, trained: bool) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=trained)
    except Exception as error:  # the hub raises many kinds
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise InputError(f"cannot load pretrained teacher '{name}': {type(error).__name__}: {reason}") from None


class ImageTeacher(Teacher):
    """A timm classifier that gives logits for batches normalised and sized for the student.

    Args:
        model: a timm model with weights; its `pretrained_cfg` says how it wants its input.
        source, accelerator, channels_last, rebuild: see `Teacher`.
        mean, std: how the student's batches are normalised, one number a channel.
    """

    def __init__(
        self,
        model: nn.Module,
        source: str,
        accelerator: Accelerator,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        channels_last: bool = False,
        rebuild: Callable[[], nn.Module] | None = None,
    ) -> None:
        config = model.pretrained_cfg
        super().__init__(
            model,
            name=config.get("architecture"),
            source=source,
            accelerator=accelerator,
            channels_last=channels_last,
            rebuild=rebuild,
        )
        self.size = tuple(config["input_size"][-2:])
        own_mean, own_std = _channels(config["mean"], len(mean)), _channels(config["std"], len(std))
        # one affine map from the student's normalisation to the teacher's
        scale = torch.tensor(std) / own_std
        shift = (torch.tensor(mean) - own_mean) / own_std
        self.same_range = bool(torch.allclose(scale, torch.ones(()))) and bool(torch.allclose(shift, torch.zeros(())))
        self.scale, self.shift = (t.view(1, -1, 1, 1).to(accelerator.device) for t in (scale, shift))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) for a batch (B, C, H, W) normalised for the student; both see the same pixels."""
        if not self.same_range:
            images = images * self.scale + self.shift
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return self.model(images)

    def release(self) -> None:
        """See `Teacher.release`."""
        self.scale = self.shift = None
        super().release()


def _channels(values: tuple[float, ...], channels: int) -> Tensor:
    """mean or std of a config for so many channels: RGB statistics averaged for grey input."""
    tensor = torch.tensor(values)
    return tensor if len(values) == channels else tensor.mean().expand(channels)
