"""Files and folders that are whole or not there."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from w2s.engine.errors import InputError


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` once the block is done and all is on disk."""
    beside, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "old"))
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    for file in beside.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def fsync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path, option: str = "--output") -> None:
    """Fail now rather than after an hour; leaves nothing behind.

    Raises:
        InputError: nothing can be written there; `option` chooses another place.
    """
    nearest = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    probe = nearest / f".w2s-probe-{uuid.uuid4().hex}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {nearest}: {error.strerror}; choose another {option}") from None
