"""Checkpoints that are complete or absent, and that are checked before they are used.

Its tensors are written into a folder beside, state.json comes last with the size of every file, everything is synced to
disk, and a rename makes it a checkpoint. Only then are old ones deleted.
"""

import dataclasses
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import accelerate
import yaml
from torch.distributed.checkpoint import CheckpointException

from w2s.engine.errors import Finished, InputError, last_line
from w2s.engine.files import LOCK, check_writable, drop_folder, put_in_place
from w2s.engine.launch import refuse_together
from w2s.engine.tensors import Trained, read_tensors, write_tensors
from w2s.record import BOOKKEEPING_OPTIONS, replacing

# options that may change when a run is resumed: they do not change what it computes, except `workers` the order in
# which a stream is read
FREE_OPTIONS = (*BOOKKEEPING_OPTIONS, "workers")
READ_PATIENCE = 10.0  # seconds that a process waits for a checkpoint to appear on a shared disk


def locate(
    folder: Path, *, options: dict, resume: str | None, precision: str, log: Callable[[str], None]
) -> tuple[Path | None, dict | None, dict]:
    """The checkpoint that a run in `folder` continues from, if any.

    Args:
        folder: the run folder, perhaps not there yet.
        options: the resolved options as `plain` gives them.
        resume: None, "auto" or the path of a checkpoint.
        precision: of this launch, which must be that of the checkpoint.
        log: told about damaged checkpoints.

    Returns:
        The checkpoint's path, its state and the options, in which `--cache auto` has become what the run had settled
        on. Path and state are None for a new run.

    Raises:
        InputError: the folder cannot be written or holds something else, or there is nothing to resume.
        Finished: the run is already complete.
    """
    checkpoint = state = None
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another --name or --output")
    if resume and resume != "auto":
        checkpoint = Path(resume)
        state = read_state(checkpoint)
        options = _settled(options, state["args"])
        _check_same_options(options, state["args"], str(checkpoint))
        own = checkpoint.resolve().parent == (folder / "checkpoints").resolve()
        if not own and _is_occupied(folder):
            raise InputError(f"{folder} holds a run of its own, not that of {resume}; choose another --name")
    elif _is_occupied(folder) and not _came_to_nothing(folder):
        if not (folder / "args.yaml").is_file():
            raise InputError(f"{folder} is not empty and holds no run; choose another --name or --output")
        if not resume:
            raise InputError(f"{folder} holds a run: go on with --resume auto, or choose another --name")
        before = _read_options(folder / "args.yaml")
        options = _settled(options, before)
        _check_same_options(options, before, str(folder))
        if _read_json(folder / "summary.json").get("status") == "finished":
            raise Finished(f"{folder} is already finished")
        checkpoint, state = newest_state(folder / "checkpoints", log)
    if state and state["mixed_precision"] != precision:
        before = state["mixed_precision"]
        raise InputError(
            f"{checkpoint} was written in precision {before} and this launch has {precision}: resume it with "
            f"ACCELERATE_MIXED_PRECISION={before} in the environment, or accelerate launch --mixed_precision {before}"
        )
    check_writable(folder)
    return checkpoint, state, options


def plain(options: dict) -> dict:
    """Options as types that YAML and JSON know."""

    def simple(value: object) -> object:
        if isinstance(value, tuple | list):
            return [simple(v) for v in value]
        if isinstance(value, dict):
            return {str(k): simple(v) for k, v in value.items()}
        if dataclasses.is_dataclass(value) or isinstance(value, Path):
            return str(value)
        return value

    return {key: simple(value) for key, value in options.items() if key != "config"}


def save_checkpoint(
    root: Path, update: int, state: dict, accelerator: accelerate.Accelerator, trained: Trained, keep: int
) -> None:
    """Write `root/update-N` and keep the newest `keep`; called by all processes.

    Args:
        root: the run's checkpoints/ folder.
        update: N, updates done.
        state: what state.json holds, JSON types only.
        accelerator: gives the processes.
        trained: what is saved beside it.
        keep: --checkpoint-hist.
    """
    final, beside = root / f"update-{update:08d}", root / f".update-{update:08d}.partial"
    if accelerator.is_main_process:
        for unfinished in root.glob(".update-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        beside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    files = write_tensors(beside, trained, rank=accelerator.process_index)
    if accelerator.is_main_process:
        (beside / "state.json").write_text(json.dumps({**state, "update": update, "files": files}))
        put_in_place(beside, final)
        paths = sorted(root.glob("update-*"))
        newer = paths.index(final) + 1
        # checkpoints of later updates are there where the run was taken up again from before them
        for path in paths[: max(newer - keep, 0)] + paths[newer:]:
            drop_folder(path)
    accelerator.wait_for_everyone()


def rewrite_state(root: Path, update: int, state: dict, accelerator: accelerate.Accelerator) -> None:
    """Put another `state` into the checkpoint `root/update-N`, whose weights stand; called by all processes."""
    if accelerator.is_main_process:
        path = root / f"update-{update:08d}" / "state.json"
        files = json.loads(path.read_text())["files"]
        with replacing(path) as file:
            json.dump({**state, "update": update, "files": files}, file)
    accelerator.wait_for_everyone()


def load_checkpoint(path: Path, trained: Trained) -> None:
    """Bring what is trained to a checkpoint; called by all processes.

    Raises:
        InputError: it does not fit this model or cannot be read.
    """
    try:
        read_tensors(path, trained)
    except (Exception, CheckpointException) as error:  # torch and pickle raise many kinds for a damaged file
        reason = last_line(error, limit=200)
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


def check_readable(path: Path, state: dict) -> None:
    """Make sure that all processes can read the checkpoint that the main process has chosen; all of them call this.

    A file server may show a new folder to other machines a little later, so this waits for it.

    Raises:
        InputError: on all processes, if one of them cannot read it or finds another one there.
    """
    problem, end = None, time.monotonic() + READ_PATIENCE
    while True:
        try:
            problem = None if _same(read_state(path), state) else "a different checkpoint is there"
        except InputError as error:
            problem = str(error)
        if problem is None or time.monotonic() > end:
            break
        time.sleep(0.5)
    where = f"process {os.environ.get('RANK', 0)} on {socket.gethostname()}"
    refuse_together(
        problem and f"{where} cannot read {path}: {problem}; --output must be on a disk that all machines share"
    )


def newest_state(root: Path, warn: Callable[[str], None]) -> tuple[Path | None, dict | None]:
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


def _same(state: dict, other: dict) -> bool:
    """Whether two states are equal, where NaN equals NaN."""
    return json.dumps(state, sort_keys=True) == json.dumps(other, sort_keys=True)


def _settled(options: dict, before: dict) -> dict:
    """The options with `--cache auto` settled as the run had settled it, whose options were `before`."""
    return {**options, "cache": before.get("cache")} if options.get("cache") == "auto" else options


def _check_same_options(options: dict, before: dict, where: str) -> None:
    different = [k for k in options if k not in FREE_OPTIONS and options[k] != before.get(k)]
    if different:
        k = different[0]
        more = f" ({len(different)} options differ)" if len(different) > 1 else ""
        raise InputError(
            f"{where} holds a different run: --{k.replace('_', '-')} is {before.get(k)!r} there and "
            f"{options[k]!r} here{more}"
        )


def _is_occupied(folder: Path) -> bool:
    """Whether a folder holds more than a lock and a file that a kill left half-written."""
    return folder.exists() and any(path.suffix != ".partial" and path.name != LOCK for path in folder.iterdir())


def _came_to_nothing(folder: Path) -> bool:
    """Whether a folder holds a run that failed before its first checkpoint, or that was killed before it had written
    its options; its name may be used again."""
    failed = _read_json(folder / "summary.json").get("status") == "failed"
    killed = (folder / LOCK).is_file() and not (folder / "args.yaml").exists()
    return (failed or killed) and not any((folder / "checkpoints").glob("update-*"))


def _read_options(path: Path) -> dict:
    try:
        options = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        options = None
    if not isinstance(options, dict):
        raise InputError(f"{path} is damaged; resume one of the run's checkpoints with --resume PATH")
    return options


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
