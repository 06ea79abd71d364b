"""The files of offline W&B runs, read back."""

import contextlib
import struct
import time
from pathlib import Path

from google.protobuf.message import DecodeError
from helpers import TIMEOUT


def records(path: Path):
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes, protobuf inside."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:  # the rest of a block that is too short for a header
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def complete_records(path: Path) -> list:
    """All records of a run that has ended; W&B's own process may still be writing the last of them."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        with contextlib.suppress(struct.error, DecodeError):  # cut within a record
            found = list(records(path))  # none at all before W&B has written its first
            if found and found[-1].WhichOneof("record_type") == "exit":
                return found
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")
