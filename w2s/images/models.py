"""timm models: building them, a stem for small images, loading weights, and exports that timm reads back.

Importing this module registers `small_stem` with timm. After that, an export of such a model loads with
`timm.create_model("local-dir:FOLDER", pretrained=True)` like any other.
"""

import copy
import json
from pathlib import Path

import timm
import torch
from timm.models import load_pretrained, register_model, save_for_hf
from torch import nn

from w2s.engine.errors import InputError, did_you_mean, first_line, last_line
from w2s.engine.files import replacing_folder
from w2s.engine.plan import count_flops
from w2s.images.checkpoints import read_weights


def create_model(
    name: str,
    num_classes: int,
    in_chans: int = 3,
    *,
    img_size: int | None = None,
    small_stem: bool = False,
    pretrained: bool = False,
    model_kwargs: dict | None = None,
) -> nn.Module:
    """Build a timm model.

    Args:
        name: a timm model, with a pretrained tag or without.
        num_classes: outputs of the classifier.
        in_chans: channels of the images.
        img_size: height and width of the images. Only architectures whose weights depend on it (ViT, Swin, ...) get it.
        small_stem: replace the stem by that of `small_stem`.
        pretrained: load timm's weights.
        model_kwargs: further arguments of the architecture.

    Raises:
        InputError: an unknown name, an argument that the architecture does not take, weights that cannot be loaded, or
            a model without a stem that `small_stem` could replace.
    """
    kwargs = {"in_chans": in_chans, **(model_kwargs or {})}
    if ":" not in name and pretrained_cfg(name).get("fixed_input_size") and img_size:
        kwargs.setdefault("img_size", img_size)
    if small_stem:
        kwargs["base"], name = name, "small_stem"
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    except InputError:
        raise
    except Exception as error:  # timm raises whatever its constructors and the hub raise
        what = f"cannot load pretrained weights of '{name}'" if pretrained else f"cannot build model '{name}'"
        what += f" with {', '.join(f'{k}={v!r}' for k, v in model_kwargs.items())}" if model_kwargs else ""
        raise InputError(f"{what}: {type(error).__name__}: {first_line(error)}") from None
    model.timm_kwargs = {k: v for k, v in kwargs.items() if k != "in_chans" or v != 3}  # for `export`
    return model


def pretrained_cfg(name: str) -> dict:
    """timm's pretrained_cfg for the name of a model; empty where timm has none.

    Raises:
        InputError: timm has no such model, or the model no such pretrained tag.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise InputError(f"unknown model '{name}'{did_you_mean(architecture, timm.list_models(), most=3)}")
    try:
        config = timm.get_pretrained_cfg(name)
    except (RuntimeError, ValueError):
        known = ", ".join(model.partition(".")[2] for model in timm.list_pretrained(f"{architecture}.*"))
        raise InputError(f"model '{architecture}' has no pretrained tag '{tag}'; it has: {known or 'none'}") from None
    return config.to_dict() if config else {}


@register_model
def small_stem(pretrained: bool = False, base: str = "resnet18", **kwargs) -> nn.Module:
    """A timm model `base` whose first convolution is 3x3 with stride 1 and whose stem has no pooling.

    Raises:
        InputError: `base` does not start with a strided convolution that could be replaced.
    """
    local = (kwargs.get("pretrained_cfg") or {}).get("source") == "local-dir"
    model = timm.create_model(base, pretrained=pretrained and not local, **kwargs)
    conv_name = model.pretrained_cfg.get("first_conv")
    conv = model.get_submodule(conv_name) if isinstance(conv_name, str) else None
    if not isinstance(conv, nn.Conv2d) or conv.stride == (1, 1):
        raise InputError(f"--small-stem: {base} has no strided first convolution to replace")
    if conv.kernel_size == conv.stride:
        raise InputError(f"--small-stem: {base} starts with patches; use --model-kwargs patch_size=... instead")
    if conv.kernel_size == (3, 3):
        conv.stride = (1, 1)
    else:
        stem = nn.Conv2d(conv.in_channels, conv.out_channels, 3, 1, 1, bias=conv.bias is not None)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        model.set_submodule(conv_name, stem)
    for pool in ("maxpool", "pool0", "features.pool0", "stem.pool"):
        parent, _, leaf = pool.rpartition(".")
        if hasattr(model, parent or leaf) and hasattr(model.get_submodule(parent), leaf):
            model.set_submodule(pool, nn.Identity())
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": "small_stem"}
    if pretrained and local:
        load_pretrained(model, kwargs["pretrained_cfg"], num_classes=model.num_classes, in_chans=conv.in_channels)
    return model


def classifier_flops(
    model: nn.Module, image_shape: tuple[int, int, int], *, batch: int, train: bool, counted: int = 2
) -> int:
    """FLOPs of a forward, or if `train` of a forward and a backward, on a batch of images.

    They are counted on the meta device, where nothing is computed.

    Args:
        model: takes images and gives logits. It is copied.
        image_shape: (C, H, W).
        batch: how many images.
        train: count as in training mode, and the backward, too.
        counted: on so many images.
    """
    model = copy.deepcopy(model).to("meta").train(train)
    images = torch.empty(counted, *image_shape, device="meta")

    def step() -> None:
        logits = model(images)
        if train:
            logits.sum().backward()

    return count_flops(step) * batch // counted


def student_flops(args, model: nn.Module, image_shape: tuple[int, int, int], *, batch: int) -> int:
    """FLOPs of an update.

    Args:
        args: resolved options; this reads --batch-size and, for the error, --model.
        model: the student.
        image_shape: (C, H, W).
        batch: the images of an update.

    Raises:
        InputError: the images are too small for its strides, or not of the size it was built for, or a micro-batch of
            one is too little for BatchNorm.
    """
    try:
        return classifier_flops(model, image_shape, batch=batch, train=True, counted=min(2, args.batch_size))
    except Exception as error:  # also of wrong --model-kwargs, some of which show only here
        size = f"{image_shape[-1]} px" + (", one at a time" if args.batch_size == 1 else "")
        raise InputError(f"--model {args.model} cannot be trained on images of {size}: {first_line(error)}") from None


def checkpoint_gradients(model: nn.Module) -> None:
    """Have a model compute its activations again in the backward, instead of keeping them.

    Raises:
        InputError: timm cannot do that for this architecture.
    """
    try:
        model.set_grad_checkpointing()
    except (AssertionError, AttributeError) as error:
        raise InputError(f"--grad-checkpointing: this architecture has none ({first_line(error)})") from None


def load_weights(model: nn.Module, path: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Load a weights file into a model, every tensor of both exactly once.

    Args:
        model: takes the weights.
        path: the weights file.
        state: what the file holds, if it has been read already.

    Raises:
        InputError: see `read_weights`, or the weights are those of another architecture.
    """
    state = read_weights(path) if state is None else state
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (RuntimeError, AttributeError) as error:
        raise InputError(f"{path} does not fit the architecture: {last_line(error)}") from None
    if missing or unexpected:
        raise InputError(
            f"{path} is of another architecture: {len(missing)} tensors missing (first: {missing[:1]}), "
            f"{len(unexpected)} unexpected (first: {unexpected[:1]})"
        )


def find_model(path: str) -> Path:
    """The folder of the exported model that a path means: `model/` of a run folder, or the folder itself.

    Raises:
        InputError: neither holds an exported model.
    """
    folder = Path(path)
    if not folder.exists():
        raise InputError(f"{path} holds no exported model: no such folder; make that run first, or name another")
    for candidate in (folder / "model", folder):
        if (candidate / "config.json").is_file() and (candidate / "model.safetensors").is_file():
            return candidate
    hint = f"; {folder / 'best'} has one" if (folder / "best" / "config.json").is_file() else ""
    raise InputError(f"{path} holds no exported model (model/model.safetensors and config.json){hint}")


def load_folder(folder: Path, trained: bool = True) -> nn.Module:
    """The model of an exported folder, with its weights or, if not `trained`, with random ones.

    Raises:
        InputError: another kind of model, a broken config, an unknown architecture, or weights that are truncated or do
            not fit.
    """
    if kind := _other_kind(folder):
        raise InputError(f"{folder} is no classifier: it holds {kind}")
    try:
        model = timm.create_model(f"local-dir:{folder}")
    except Exception as error:
        raise InputError(f"cannot build the model of {folder}: {type(error).__name__}: {first_line(error)}") from None
    if trained:
        load_weights(model, folder / "model.safetensors")
    return model


def _other_kind(folder: Path) -> str | None:
    """What an exported folder holds if it is not a classifier of timm, as far as its files show it."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or "architecture" in config:
        return None
    if "detector" in config:
        return f"a detector ({config['detector']})"
    return "a denoiser" if (folder / "scheduler").is_dir() else "another kind of model"


def export(model: nn.Module, folder: Path) -> None:
    """Write model.safetensors and config.json into `folder`. If that fails, the folder stays as it was."""
    model = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)  # safetensors takes no other layout
    with replacing_folder(folder) as beside:
        save_for_hf(model, beside, model_args=getattr(model, "timm_kwargs", None), safe_serialization=True)
