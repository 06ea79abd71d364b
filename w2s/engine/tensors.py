"""The tensors of a checkpoint, by torch.distributed.checkpoint: each process writes what it alone holds.

They can be read by another number of processes, and by one that shards them (FSDP2) as by one that does not. Random
states are not among them: all randomness of a run is a function of its seed, see `w2s.engine.randomness`.
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import gather_object
from torch import Tensor, distributed, nn
from torch.distributed import tensor as dtensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # dcp says so in every run of one process
REST = "rest.pt"  # what of the optimiser and the gradient scaler is no tensor, or a single number as its steps are


class Trained(NamedTuple):
    """What a checkpoint brings back.

    Attributes:
        student: the bare module.
        ema: its moving average, or None.
        optimizer: of the student's parameters.
        scaler: of the gradients (fp16), or None.
    """

    student: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None


def write_tensors(folder: Path, trained: Trained, rank: int) -> dict[str, int]:
    """Write all of it into a folder; called by all processes. Returns the sizes of the files, on all of them.

    Of what all processes hold, such as the statistics of BatchNorm, those of the first one are written.
    """
    tensors = _module_tensors(trained)
    scaler = trained.scaler.state_dict() if trained.scaler else None
    rest = {"optimizer": _take_tensors(trained.optimizer.state_dict(), "optimizer", tensors), "scaler": scaler}
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    dcp.save(tensors, checkpoint_id=folder, planner=planner, no_dist=not distributed.is_initialized())
    own = list(folder.glob(f"__{rank}_*.distcp"))
    if rank == 0:
        torch.save(rest, folder / REST)
        own += [folder / REST, folder / ".metadata"]
    # each process says what it wrote: another machine may not see it on a shared disk yet
    return dict(gather_object([(path.name, path.stat().st_size) for path in own]))


def read_tensors(folder: Path, trained: Trained) -> None:
    """Bring all of it to what a folder holds; called by all processes.

    Raises:
        ValueError, OSError, and what torch raises for a damaged file: the folder does not fit, or cannot be read.
    """
    rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
    stored = {name: entry for name, entry in _entries(folder).items() if _is_tensor(entry)}
    tensors = _module_tensors(trained)
    _check_fit(tensors, {name: entry for name, entry in stored.items() if not name.startswith("optimizer.")})
    parameters = [p for group in trained.optimizer.param_groups for p in group["params"]]
    for name in stored.keys() - tensors.keys():
        tensors[name] = _room_for(name, stored[name], parameters)
    dcp.load(tensors, checkpoint_id=folder, no_dist=not distributed.is_initialized())
    trained.optimizer.load_state_dict(_put_tensors(rest["optimizer"], "optimizer", tensors))
    if trained.scaler:
        trained.scaler.load_state_dict(rest["scaler"])


def read_part(folder: Path, part: str) -> dict[str, Tensor]:
    """The whole tensors of a part, student or ema, by their names in its module; none where there is no such part."""
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in _entries(folder).items()
        if name.startswith(f"{part}.")
    }
    if found:
        dcp.load(found, checkpoint_id=folder, no_dist=True)
    return {name.removeprefix(f"{part}."): tensor for name, tensor in found.items()}


def tensor_names(folder: Path) -> set[str]:
    """The names of all tensors in a folder: student.*, ema.* and optimizer.*."""
    return set(_entries(folder))


def _entries(folder: Path) -> dict[str, object]:
    """What a folder holds under each name, without reading it."""
    return dcp.FileSystemReader(folder).read_metadata().state_dict_metadata


def _is_tensor(entry: object) -> bool:
    return isinstance(entry, TensorStorageMetadata)


def _module_tensors(trained: Trained) -> dict[str, Tensor]:
    """The parameters and buffers of student and moving average, by name."""
    parts = {"student": trained.student, "ema": trained.ema}
    return {f"{part}.{k}": v for part, module in parts.items() if module for k, v in module.state_dict().items()}


def _check_fit(tensors: dict[str, Tensor], stored: dict[str, TensorStorageMetadata]) -> None:
    ours = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    theirs = {name: tuple(entry.size) for name, entry in stored.items()}
    if different := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        name = different[0]
        raise ValueError(f"{name} is {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here")


def _take_tensors(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """`value` with None in the place of each tensor of several numbers, which goes into `tensors` under its path."""
    if isinstance(value, Tensor) and value.ndim > 0:
        tensors[name] = value
        return None
    if isinstance(value, dict):
        return {key: _take_tensors(part, f"{name}.{key}", tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_take_tensors(part, f"{name}.{k}", tensors) for k, part in enumerate(value)])
    return value


def _put_tensors(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """`value` with the tensors back in their places."""
    if name in tensors:
        return tensors[name]
    if isinstance(value, dict):
        return {key: _put_tensors(part, f"{name}.{key}", tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_put_tensors(part, f"{name}.{k}", tensors) for k, part in enumerate(value)])
    return value


def _room_for(name: str, entry: TensorStorageMetadata, parameters: list[nn.Parameter]) -> Tensor:
    """A tensor to read one of the optimiser into: laid out and sharded as its parameter, if it has that one's shape.

    A fused optimiser goes through both in the order of their memory, which may be NHWC.
    """
    dtype, (_, kind, index, *_) = entry.properties.dtype, name.split(".")
    parameter = parameters[int(index)] if kind == "state" and index.isdigit() else None
    if parameter is None or parameter.shape != entry.size:
        return torch.empty(entry.size, dtype=dtype)
    if isinstance(parameter, dtensor.DTensor):
        layout = {"device_mesh": parameter.device_mesh, "placements": parameter.placements}
        return dtensor.empty(*entry.size, dtype=dtype, **layout)
    return torch.empty_like(parameter, dtype=dtype, device="cpu", requires_grad=False)
