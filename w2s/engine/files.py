"""Folders that appear complete or not at all. Single files are written by `w2s.record.replacing`."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from w2s.engine.errors import InputError


@contextlib.contextmanager
def replacing_folder(folder: Path, keep_existing: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` once the block is done and all of it is on disk.

    An older `folder` is dropped. With `keep_existing` it stays unless it is empty, and what was written is dropped
    instead: several processes may then write the same folder at once, and the first one to finish provides it.
    """
    if not keep_existing:
        beside = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        put_in_place(beside, folder)
        return
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")  # no other process writes there
    beside.mkdir(parents=True)
    try:
        yield beside
        _fsync_tree(beside)
        with contextlib.suppress(OSError):  # `folder` exists and is not empty
            beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def put_in_place(beside: Path, folder: Path) -> None:
    """Wait until the files in `beside` are on disk, then rename it to `folder`. An older `folder` is dropped."""
    _fsync_tree(beside)
    old = _hidden(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def drop_folder(folder: Path) -> None:
    """Delete a folder. It is renamed first, so that a kill half-way leaves no half folder under its name."""
    hidden = _hidden(folder)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.dropped")


def _fsync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        fsync(path)


def fsync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path, option: str = "--output") -> None:
    """Find out now, rather than after an hour, whether a folder can be written. Leaves nothing behind.

    Raises:
        InputError: nothing can be written there; `option` is what chooses another place.
    """
    nearest = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    probe = nearest / f".w2s-probe-{uuid.uuid4().hex}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {nearest}: {error.strerror}; choose another {option}") from None
