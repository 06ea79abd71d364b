"""Folders that appear complete or not at all, and their lock. `w2s.record.replacing` writes single files."""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from w2s.engine.errors import InputError

LOCK = ".w2s.lock"  # a file in a folder that one process at a time may write
LOCK_PATIENCE = 120  # seconds: a file server keeps the locks of a crashed machine for as long as that


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


def lock_folder(folder: Path, log: Callable[[str], None]) -> TextIO:
    """Lock a folder for this process; the lock is held until the file returned is closed or the process ends.

    It is a POSIX lock: the kernel releases it after a kill, worker processes do not inherit it, and NFS and most
    parallel file systems know it on all machines.

    Args:
        folder: an existing folder.
        log: told if this has to wait or the file system knows no locks.

    Raises:
        InputError: another process holds the lock, or the folder cannot be written.
    """
    try:
        file = open(folder / LOCK, "a+")  # noqa: SIM115 - closing it would release the lock
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another --output") from None
    me, waiting_since = f"process {os.getpid()} on {socket.gethostname()}", None
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log(f"warning: no lock on {folder} ({error.strerror}): make sure that no other run writes there")
                break
        file.seek(0)
        owner = file.read().strip() or "another process"
        waiting_since = waiting_since or time.monotonic()
        here = owner.rpartition(" ")[2] == socket.gethostname()
        if here or time.monotonic() - waiting_since > LOCK_PATIENCE:
            file.close()
            raise InputError(f"{folder} is in use by {owner}: wait for that run to end, or choose another --name")
        log(f"waiting for {owner}, which writes to {folder}")
        time.sleep(10)
    file.truncate(0)
    file.write(me)
    file.flush()
    return file
