"""How the error of one process ends another one that waits for it."""

import threading
import time

import pytest
from helpers import free_port
from torch.distributed import TCPStore

from w2s.engine.peers import Peers


@pytest.fixture
def store(monkeypatch):
    """The store of a launch of two processes, of which this one is the main process."""
    port = free_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def joined(monkeypatch, rank: int, heard: list) -> Peers:
    monkeypatch.setenv("RANK", str(rank))
    return Peers(heard.append)


def test_an_error_reaches_the_others_within_seconds(store, monkeypatch):
    heard, own = [], []
    main, other = joined(monkeypatch, 0, heard), joined(monkeypatch, 1, own)
    assert other.tell("corrupt image a.png")
    end = time.monotonic() + 20
    while not heard and time.monotonic() < end:
        time.sleep(0.05)
    assert heard == ["process 1: corrupt image a.png"] and own == []  # the main process speaks first
    main.stop(), other.stop()


def test_a_process_that_ends_by_itself_is_left_alone(store, monkeypatch):
    heard = []
    main, other = joined(monkeypatch, 0, heard), joined(monkeypatch, 1, [])
    assert other.tell("corrupt image a.png")
    main.stop(), other.stop()
    time.sleep(1)
    assert heard == []


def test_an_error_of_the_attempt_before_is_not_heard(store, monkeypatch):
    """torchrun may start processes again on the same store."""
    other = joined(monkeypatch, 1, [])
    assert other.tell("killed")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    heard = []
    main = joined(monkeypatch, 0, heard)
    main.ending.wait(1)
    assert heard == []
    main.stop(), other.stop()


def test_a_process_alone_starts_no_thread(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = threading.active_count()
    assert not Peers(pytest.fail).several and threading.active_count() == before
