"""Fixtures of all tests. What the tests call by name is in helpers.py."""

import logging
import multiprocessing
from pathlib import Path

import pytest
from helpers import DIGITS, TEACHER, call_script  # first: it sets the environment


def pytest_collection_finish() -> None:
    """pytest keeps what is logged, and torch.distributed.checkpoint, which by now is imported, logs every tensor."""
    logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)


def pytest_sessionfinish() -> None:
    """Loader workers ignore a gentle signal: one that a failed test holds on to would keep pytest from ending."""
    for worker in multiprocessing.active_children():
        worker.kill()


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> Path:
    """A finished run of train_cls.py on the digits, small enough to be anyone's weak teacher."""
    import train_cls

    output = tmp_path_factory.mktemp("teacher")
    call_script(train_cls.main, DIGITS, TEACHER, "--seed 7 --epochs 1 --name teacher --output", output)
    return output / "teacher"


@pytest.fixture(scope="session")
def digits_det(tmp_path_factory) -> Path:
    """A little of the built-in detection data, in COCO's layout."""
    from w2s.detection.digits import write_digits

    folder = tmp_path_factory.mktemp("digits") / "det"
    write_digits(folder, train=36, val=7, size=64, digits=3)
    return folder
