"""The model that `--teacher` means: found, built, and with the student's classes in the student's order."""

from pathlib import Path

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.layers import to_2tuple
from torch import Tensor, nn

from w2s.engine.errors import InputError, first_line
from w2s.images.checkpoints import WEIGHT_FILES, read_checkpoint
from w2s.images.classes import Classes, ClassMap, MappedLogits, match_classes
from w2s.images.foreign import (
    TORCHVISION,
    TRANSFORMERS,
    is_torchvision,
    is_transformers_folder,
    load_transformers,
    torchvision_model,
)
from w2s.images.models import create_model, find_model, load_folder, load_weights

DETECTOR_WEIGHTS = ("backbone.body.", "backbone.fpn.", "rpn.", "roi_heads.")  # how their names begin


def load_teacher(
    spec: str,
    *,
    model_name: str | None,
    model_kwargs: dict,
    classes: Classes,
    data_config: dict,
    map_file: str | None = None,
    trained: bool = True,
) -> tuple[nn.Module, str, ClassMap | None]:
    """The model that `--teacher` means, with the student's classes in the student's order; where its weights come from;
    and which of its own classes stand for the student's, None where they are the same.

    Args:
        spec: a run folder (whose model/ is taken) or another exported folder, a folder of transformers, a weights file,
            the name of a timm model with pretrained weights, `torchvision/NAME`, `hf-hub:NAME`, `transformers:NAME` or
            `local-dir:FOLDER`.
        model_name, model_kwargs: the architecture of a weights file, and arguments of it. Without a name it is the one
            that the file itself names.
        classes: of the data.
        data_config: timm's data config of the student: input_size, mean, std. A weights file says nothing of its
            images, so they are taken to be the student's.
        map_file: --teacher-classes.
        trained: whether to load the weights. Without it the model has random ones.

    Raises:
        InputError: nothing of that kind is there, it cannot be read, or it does not fit the data.
    """
    path, in_chans = Path(spec.removeprefix("local-dir:")), data_config["input_size"][0]
    if path.suffix in WEIGHT_FILES and not path.is_dir():
        if path.name == "model.safetensors" and (path.parent / "config.json").is_file():
            raise InputError(f"--teacher {path} is a part of an exported model: give its folder, {path.parent}")
        model = _load_file(
            path,
            name=model_name,
            model_kwargs=model_kwargs,
            num_classes=classes.count,
            data_config=data_config,
            trained=trained,
        )
        source = str(path)
    elif model_name or model_kwargs:
        raise InputError(f"--teacher-model and --teacher-kwargs go with a weights file, but --teacher {spec} is none")
    else:
        model, source = _load_named(spec, path, trained)
        channels = model.in_chans if hasattr(model, "in_chans") else model.pretrained_cfg["input_size"][0]
        _check_channels(channels, in_chans, spec)
    class_map = match_classes(classes, classes_of(model), map_file=map_file, spec=spec, least=2)
    if class_map.is_identity(model.num_classes):
        return model, source, None
    mapped = MappedLogits(model, class_map.columns)
    mapped.pretrained_cfg = model.pretrained_cfg
    return mapped, source, class_map


def _load_named(spec: str, path: Path, trained: bool) -> tuple[nn.Module, str]:
    """The model of a folder or of a name, and where its weights come from."""
    if path.is_dir():
        if is_transformers_folder(path):
            return load_transformers(str(path), trained), str(path)
        path = find_model(str(path))
        return load_folder(path, trained), str(path)
    if spec.startswith(TRANSFORMERS):
        return load_transformers(spec.removeprefix(TRANSFORMERS), trained), spec
    if spec.startswith(TORCHVISION):
        return torchvision_model(spec, model_kwargs={}, pretrained=True, trained=trained), spec
    if spec.startswith("hf-hub:") or ("/" not in spec and timm.is_model(spec.partition(".")[0])):
        return _load_pretrained(spec, trained), spec
    raise InputError(
        f"--teacher {spec}: no such run folder or file, and no timm model of that name; models of other libraries are "
        "torchvision/NAME and transformers:NAME"
    )


def _load_file(
    path: Path, *, name: str | None, model_kwargs: dict, num_classes: int, data_config: dict, trained: bool
) -> nn.Module:
    """The model of a weights file. It has as many classes as the file, or `num_classes` if that does not show."""
    in_chans, _, img_size = data_config["input_size"]
    weights, arch, file_kwargs = read_checkpoint(path)
    if any(tensor.startswith(DETECTOR_WEIGHTS) for tensor in weights):
        raise InputError(f"--teacher {path} holds the weights of a detector, not of a classifier")
    names = [name] if name else [candidate for candidate in (arch, f"{TORCHVISION}{arch}") if _is_known(candidate)]
    if not names:
        named = f"names the unknown architecture '{arch}'" if arch else "is a weights file"
        raise InputError(f"--teacher {path} {named}: name its architecture with --teacher-model")
    if not name:
        model_kwargs = {**file_kwargs, **model_kwargs}

    def build(name: str, classes: int) -> nn.Module:
        if name.startswith(TORCHVISION):
            return torchvision_model(name, model_kwargs=model_kwargs, num_classes=classes)
        return create_model(name, classes, in_chans, img_size=img_size, model_kwargs=model_kwargs)

    models = [build(candidate, num_classes) for candidate in names]  # timm and torchvision share some names
    fitting = [k for k, model in enumerate(models) if model.state_dict().keys() == weights.keys()] or [0]
    name, model = names[fitting[0]], models[fitting[0]]
    classes, channels = _shape_of_file(model, weights, in_chans)
    _check_channels(channels, in_chans, str(path))
    if classes not in (None, model.num_classes):
        model = build(name, classes)
    if trained:
        load_weights(model, path, weights)
    size = to_2tuple(model_kwargs.get("img_size", img_size))
    if name.startswith(TORCHVISION):
        size = to_2tuple(getattr(model, "image_size", img_size))
    images = {"input_size": (in_chans, *size), "mean": data_config["mean"], "std": data_config["std"]}
    if name.startswith(TORCHVISION):
        model.pretrained_cfg = {**images, **model.pretrained_cfg}  # a tag of torchvision's weights says more
    elif "pretrained_cfg_overlay" not in model_kwargs:
        model.pretrained_cfg = {**model.pretrained_cfg, **images}
    return model


def _is_known(name: str | None) -> bool:
    """Whether timm, or torchvision with its prefix, has a model of that name."""
    return bool(name) and (timm.is_model(name.partition(".")[0]) or is_torchvision(name))


def _shape_of_file(model: nn.Module, weights: dict[str, Tensor], in_chans: int) -> tuple[int | None, int]:
    """Classes and channels of a weights file, as far as the shapes of its first and last layer show them.

    Args:
        model: of the file's architecture, for images of `in_chans` channels.
        weights: what the file holds.
    """
    own, config = model.state_dict(), model.pretrained_cfg

    def sizes(layer: object, dimension: int) -> tuple[int, int] | None:
        """The size of a layer's weight in the file and in the model, None where either lacks it."""
        name = layer[0] if isinstance(layer, tuple | list) and layer else layer
        tensors = [state.get(f"{name}.weight") for state in (weights, own)]
        if all(torch.is_tensor(tensor) and tensor.ndim > dimension for tensor in tensors):
            return tensors[0].shape[dimension], tensors[1].shape[dimension]
        return None

    classes, _ = sizes(config.get("classifier"), 0) or (None, None)
    in_file, in_model = sizes(config.get("first_conv"), 1) or (1, 1)
    # a stem may fold patches into channels: then both are the same multiple of the image's
    return classes, in_file * in_chans // in_model if in_file * in_chans % in_model == 0 else in_chans


def _check_channels(channels: int, in_chans: int, spec: str) -> None:
    if channels != in_chans:
        raise InputError(f"the teacher takes {channels} channels, the student {in_chans}: {spec} does not fit")


def classes_of(model: nn.Module) -> Classes:
    """The classes of a classifier: named as its config does, and by the synsets of ImageNet where their number is that
    of one of ImageNet's label sets."""
    count, names = model.num_classes, model.pretrained_cfg.get("label_names") or ()
    if isinstance(names, dict):
        names = [names.get(label, names.get(str(label))) for label in range(count)]
    namings = [tuple(names)] if len(names) == count else []
    if subset := infer_imagenet_subset({"num_classes": count}):
        namings.append(tuple(ImageNetInfo(subset).label_names()))
    return Classes(count, tuple(namings))


def _load_pretrained(name: str, trained: bool) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=trained)
    except Exception as error:  # the hub raises many kinds
        reason = f"{type(error).__name__}: {first_line(error, limit=200)}"
        raise InputError(f"cannot load pretrained teacher '{name}': {reason}") from None
