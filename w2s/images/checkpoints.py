"""Weights files: the tensors of a checkpoint by name, whichever training loop wrote it."""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from w2s.engine.errors import InputError, first_line

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
# where a checkpoint keeps its weights; a moving average comes before the weights that it averages
PARTS = ("state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema", "state_dict", "model_state_dict")
PARTS += ("params", "model", "module", "net", "weights")
PREFIXES = ("module.", "model.")  # of DistributedDataParallel and of AveragedModel, and of a Lightning module's model
LFS = b"version https://git-lfs"  # how the pointer begins that a clone has in place of a file


class Checkpoint(NamedTuple):
    """What a weights file holds.

    Attributes:
        weights: the tensors by name, without the prefixes of wrappers.
        arch: the architecture that the file names, None if it names none.
        model_kwargs: further arguments of the architecture, as timm's train.py keeps them.
    """

    weights: dict[str, Tensor]
    arch: str | None
    model_kwargs: dict


def read_checkpoint(path: Path) -> Checkpoint:
    """The content of a weights file: a bare state_dict, or a checkpoint of timm, torchvision, Lightning or the like.

    Raises:
        InputError: the file is missing, truncated, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise InputError(f"no weights file {path}")
    if path.stat().st_size == 0:
        raise InputError(f"cannot read weights {path}: the file is empty")
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise InputError(f"cannot read weights {path}: Git LFS keeps them elsewhere; run git lfs pull there")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm and torchvision keep their options
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated zip, bad header, pickled code: torch and safetensors raise many kinds
        reason = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, pickle.UnpicklingError | KeyError):  # the latter of a text
            reason = "it holds more than tensors, or is no weights file; save the state_dict alone, as .safetensors"
        raise InputError(f"cannot read weights {path}: {reason}") from None
    weights = _find_weights(content)
    if weights is None:
        holds = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise InputError(
            f"cannot read weights {path}: it holds no state_dict, that is, no tensors by name, but {holds}"
        )
    weights = _without_prefixes(weights, is_lightning="pytorch-lightning_version" in content)
    if broken := [name for name, tensor in weights.items() if _holds_nan(tensor)]:
        raise InputError(f"{path} holds NaN in {len(broken)} of {len(weights)} tensors (first: {broken[0]})")
    options = content.get("args")
    options = vars(options) if isinstance(options, argparse.Namespace) else {}
    arch, model_kwargs = content.get("arch"), options.get("model_kwargs")
    return Checkpoint(
        weights=weights,
        arch=arch if isinstance(arch, str) else None,
        model_kwargs=model_kwargs if isinstance(model_kwargs, dict) else {},
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name; the moving average of the weights where a checkpoint has one.

    Raises:
        InputError: see `read_checkpoint`.
    """
    return read_checkpoint(path).weights


def _find_weights(content: object) -> Mapping[str, Tensor] | None:
    """The state_dict in a checkpoint, or the checkpoint itself if it is one; None if there is none."""
    if not isinstance(content, Mapping):
        return None
    for part in PARTS:
        if isinstance(content.get(part), Mapping):
            return _find_weights(content[part])
    is_weights = all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in content.items())
    return content if is_weights else None


def _holds_nan(tensor: Tensor) -> bool:
    """Whether a tensor of ordinary floats holds a NaN; infinity is no fault, as in a mask."""
    plain = tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta
    return plain and bool(tensor.isnan().any())


def _without_prefixes(weights: Mapping[str, Tensor], is_lightning: bool) -> dict[str, Tensor]:
    """Weights under the names that they have in the bare model.

    A prefix is taken off where all names have it. A Lightning module may hold more than its model, such as metrics:
    there, what is outside `model.` is left out.
    """
    cleaned = {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}  # of torch.compile
    if "n_averaged" in cleaned and all(name.startswith("module.") for name in cleaned if name != "n_averaged"):
        del cleaned["n_averaged"]  # AveragedModel counts its updates
    for prefix in PREFIXES * 2:  # wrappers may lie in either order
        inside = {name.removeprefix(prefix): tensor for name, tensor in cleaned.items() if name.startswith(prefix)}
        if inside and (len(inside) == len(cleaned) or (is_lightning and prefix == "model.")):
            cleaned, is_lightning = inside, is_lightning and prefix != "model."
    return cleaned
