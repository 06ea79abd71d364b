"""Checkpoints that are complete or absent, and are checked before they are believed.

`save_state` of Accelerate is not atomic; here it writes beside, state.json comes last with the size of every file,
everything is synced to disk, and a rename makes it a checkpoint. Only then are old ones dropped.
"""

import json
import os
import shutil
from pathlib import Path

import accelerate
from safetensors.torch import load_file, save_file
from torch import nn

from w2s.options import InputError


def save_checkpoint(
    root: Path, update: int, state: dict, accelerator: accelerate.Accelerator, ema: nn.Module | None, keep: int
) -> None:
    """Write `root/update-N` and keep the newest `keep`; called by all processes.

    Args:
        root: the run's checkpoints/ folder.
        update: N, updates done.
        state: what state.json holds, JSON types only.
        accelerator: its prepared student, optimiser and scaler are saved; the teacher was never prepared.
        ema: the averaged model, or None.
        keep: --checkpoint-hist.
    """
    final, beside = root / f"update-{update:08d}", root / f".update-{update:08d}.partial"
    if accelerator.is_main_process:
        for unfinished in root.glob(".update-*.partial"):
            shutil.rmtree(unfinished, ignore_errors=True)
        beside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(beside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if ema is not None:
            save_file({k: v.contiguous() for k, v in ema.state_dict().items()}, beside / "ema.safetensors")
        files = {str(p.relative_to(beside)): p.stat().st_size for p in beside.rglob("*") if p.is_file()}
        (beside / "state.json").write_text(json.dumps({**state, "update": update, "files": files}))
        for path in [*beside.rglob("*"), beside]:
            fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        fsync(root)
        paths = sorted(root.glob("update-*"))
        here = paths.index(final) + 1
        for old in paths[: max(here - keep, 0)] + paths[here:]:  # later ones: the run was taken up from before them
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def load_checkpoint(path: Path, accelerator: accelerate.Accelerator, ema: nn.Module | None) -> None:
    """Bring the prepared student and optimiser, and the EMA, to a checkpoint.

    Raises:
        InputError: it does not fit this model or cannot be read.
    """
    try:
        accelerator.load_state(str(path))
        if ema is not None:
            ema.load_state_dict(load_file(path / "ema.safetensors"))
    except Exception as error:  # torch, safetensors and pickle raise many kinds for a damaged file
        reason = (str(error).strip().splitlines() or [""])[-1][:200]
        raise InputError(f"cannot load checkpoint {path}: {type(error).__name__}: {reason}") from None


def read_state(path: Path) -> dict:
    """state.json of a complete checkpoint.

    Raises:
        InputError: no checkpoint, or one with a missing or truncated file.
    """
    if not (path / "state.json").is_file():
        raise InputError(f"--resume: {path} is no checkpoint (it has no state.json)")
    try:
        state = json.loads((path / "state.json").read_text())
        sizes = dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"checkpoint {path} is truncated: state.json") from None
    for name, size in sizes.items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise InputError(f"checkpoint {path} is truncated: {name}")
    return state


def newest_state(root: Path, warn) -> tuple[Path | None, dict | None]:
    """The newest complete checkpoint under `root` and its state, (None, None) if there is none yet.

    `warn` is told of damaged ones.

    Raises:
        InputError: there are checkpoints, all damaged.
    """
    paths = sorted(root.glob("update-*"), reverse=True)
    for path in paths:
        try:
            return path, read_state(path)
        except InputError as error:
            warn(f"warning: {error}; trying the one before")
    if paths:
        raise InputError(f"all checkpoints in {root} are damaged; move them away to start from the beginning")
    return None, None


def fsync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
