"""Classifiers of other libraries, transformers and torchvision, in the form that timm's have.

That form is a module from images (B, C, H, W) to logits (B, classes), with `num_classes` and a `pretrained_cfg` that
says which images it takes: input_size, mean, std. The names of its classes are in `label_names` of the latter.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models

from w2s.engine.errors import InputError, did_you_mean, first_line, on_one_line

TORCHVISION = "torchvision/"
TRANSFORMERS = "transformers:"


# ---- transformers ----


def is_transformers_folder(folder: Path) -> bool:
    """Whether a folder was written by save_pretrained of transformers, and not by timm."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config and "architecture" not in config


class TransformersClassifier(nn.Module):
    """An image classifier of transformers in timm's form.

    Args:
        model: an `AutoModelForImageClassification`.
        images: what `_image_settings` says of its images.
        name: of its architecture.
    """

    def __init__(self, model: nn.Module, images: dict, name: str) -> None:
        super().__init__()
        self.model, self.num_classes, self.bgr = model, model.config.num_labels, images["bgr"]
        channels = len(images["mean"])
        self.pretrained_cfg = {
            "architecture": name,
            "input_size": (getattr(model.config, "num_channels", channels), *images["size"]),
            "mean": images["mean"],
            "std": images["std"],
            "label_names": _label_names(model.config.id2label),
        }

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.model(pixel_values=images.flip(1) if self.bgr else images).logits


def load_transformers(name: str, trained: bool = True) -> TransformersClassifier:
    """An image classifier of transformers with its image processor's size and normalisation.

    Args:
        name: a folder written by save_pretrained, or the id of a model on the hub.
        trained: whether to load the weights. Without it the model has random ones.

    Raises:
        InputError: transformers is not installed, or there is no such image classifier.
    """
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
        from transformers.utils import logging
    except ImportError:
        raise InputError(f"--teacher {name} is a model of transformers: pip install transformers") from None
    logging.disable_progress_bar()
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except Exception as error:  # the hub and transformers raise many kinds
        hint = "; save its image processor beside it" if Path(name).is_dir() else ""
        raise InputError(
            f"cannot load the image processor (preprocessor_config.json) of teacher {name}: {_reason(error)}{hint}"
        ) from None
    try:
        if not trained:
            model, unfit = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(name)), []
        else:
            model, info = AutoModelForImageClassification.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True
            )
            unfit = [*info["missing_keys"], *info["mismatched_keys"]]
    except Exception as error:
        raise InputError(f"cannot load {name} as an image classifier of transformers: {_reason(error)}") from None
    if unfit:  # transformers would leave these at random
        raise InputError(f"teacher {name} is no trained image classifier: it has no weights for {unfit[0]}")
    return TransformersClassifier(model, _image_settings(processor, name), model.config.model_type)


def _image_settings(processor: object, name: str) -> dict:
    """size (H, W), mean, std and whether the channels are in the order BGR, from an image processor of transformers.

    Mean and std are those of pixels in 0..1, which a processor may scale otherwise before it normalises them.

    Raises:
        InputError: the processor names no size.
    """
    size = getattr(processor, "size", None)
    if getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None):
        size = processor.crop_size
    if isinstance(size, int):
        size = {"height": size, "width": size}
    size = dict(size.items()) if isinstance(size, Mapping) else dict(getattr(size, "__dict__", None) or {})
    side = size.get("shortest_edge")
    size = (size.get("height") or side, size.get("width") or side)
    if not all(size):
        raise InputError(f"the image processor of teacher {name} names no size of its images")
    scale = 255 * processor.rescale_factor if getattr(processor, "do_rescale", True) else 255.0
    offset = 1.0 if getattr(processor, "rescale_offset", False) else 0.0
    mean, std = (0.0,) * 3, (1.0,) * 3
    if getattr(processor, "do_normalize", True):
        mean, std = processor.image_mean, processor.image_std
    return {
        "size": size,
        "mean": tuple((value + offset) / scale for value in mean),
        "std": tuple(value / scale for value in std),
        "bgr": bool(getattr(processor, "do_flip_channel_order", False)),
    }


def _label_names(id2label: Mapping[int, str]) -> tuple[str, ...] | None:
    """The names of the classes in order, None where they are those that transformers makes up."""
    names = tuple(str(id2label[label]) for label in sorted(id2label))
    return None if names == tuple(f"LABEL_{label}" for label in range(len(names))) else names


# ---- torchvision ----


def is_torchvision(name: str) -> bool:
    """Whether a name is that of a classifier of torchvision, `torchvision/MODEL` with a tag or without."""
    builder = name.removeprefix(TORCHVISION).partition(".")[0]
    return name.startswith(TORCHVISION) and builder in models.list_models(module=models)


def torchvision_model(
    name: str, *, model_kwargs: dict, num_classes: int | None = None, pretrained: bool = False, trained: bool = True
) -> nn.Module:
    """A classifier of torchvision in timm's form.

    Args:
        name: `torchvision/MODEL`, or `torchvision/MODEL.TAG` for one of torchvision's own weights, such as
            IMAGENET1K_V1: with a tag, size, normalisation and classes are those of these weights.
        model_kwargs: further arguments of the model.
        num_classes: outputs of a model that is not `pretrained`.
        pretrained: take the weights of the tag, or torchvision's default weights, which are downloaded.
        trained: whether `pretrained` loads these weights. Without it the model has random ones.

    Raises:
        InputError: torchvision has no such model, weights or arguments.
    """
    builder, _, tag = name.removeprefix(TORCHVISION).partition(".")
    if not is_torchvision(name):
        hint = did_you_mean(builder, models.list_models(module=models), most=3)
        raise InputError(f"torchvision has no classification model '{builder}'{hint}")
    entries = models.get_model_weights(builder)
    if tag and tag not in entries.__members__:
        raise InputError(f"torchvision's {builder} has no weights '{tag}', it has {', '.join(entries.__members__)}")
    entry = entries[tag] if tag else entries.DEFAULT if pretrained else None
    classes = len(entry.meta["categories"]) if pretrained else num_classes
    try:
        if pretrained and trained:
            model = models.get_model(builder, weights=entry, progress=False, **model_kwargs)
        else:
            model = models.get_model(builder, weights=None, num_classes=classes, **model_kwargs)
    except Exception as error:  # constructors and the download raise many kinds
        raise InputError(f"cannot build torchvision's {builder}: {_reason(error)}") from None
    layers = [path for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    model.num_classes = classes
    config = {"architecture": f"{TORCHVISION}{builder}", "classifier": layers[-1], "first_conv": layers[0]}
    if entry:
        images = entry.transforms()
        side = images.crop_size[0]
        config |= {"input_size": (3, side, side), "mean": images.mean, "std": images.std}
        if len(entry.meta["categories"]) == classes:
            config["label_names"] = tuple(entry.meta["categories"])
    model.pretrained_cfg = config
    return model


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error, limit=200) or on_one_line(error, limit=200)}"
