"""Signals and broken losses, and what all processes make of them."""

import math
import os
import signal
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from helpers import on_processes

from w2s.engine.errors import Preempted
from w2s.engine.stopping import Stopping


@pytest.fixture
def stopping(accelerator):
    """One that listens; the handlers are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    found = Stopping(accelerator)
    found.listen()
    yield found
    for number, handler in handlers.items():
        signal.signal(number, handler)


def watched(stopping: Stopping, *losses: float) -> bool:
    for loss in losses:
        stopping.watch(torch.tensor(loss))
    return stopping.ask(1, now=True)[1]


def test_a_loss_that_was_not_finite_is_remembered(stopping):
    assert not watched(stopping, 1.0)
    assert watched(stopping, math.inf, 2.0)


def test_under_a_gradient_scaler_only_many_in_a_row_break_a_run(accelerator):
    """The scaler skips the step and halves its scale."""
    accelerator.scaler = torch.amp.GradScaler("cpu")
    stopping = Stopping(accelerator)
    assert not watched(stopping, *[math.nan] * 9, 1.0, *[math.inf] * 9)
    assert watched(stopping, math.inf)
    assert watched(stopping, 1.0)  # it is too late


def test_a_signal_ends_an_evaluation_between_two_batches(stopping):
    seen = []
    for batch in stopping.polled(range(10)):
        seen.append(batch)
        if batch == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [0, 1, 2, 3]
    with pytest.raises(Preempted):
        stopping.end_evaluation()


def test_an_evaluation_that_has_seen_all_its_batches_counts(stopping):
    assert list(stopping.polled(range(3))) == [0, 1, 2]
    os.kill(os.getpid(), signal.SIGTERM)
    stopping.end_evaluation()
    assert stopping.ask(1) == (True, False)


def evaluate_with_signal_to_one(accelerator) -> tuple[int, int]:
    """The ranks have different numbers of batches."""
    stopping, seen = Stopping(accelerator), 0
    stopping.listen()
    for batch in stopping.polled(range(5 + accelerator.process_index)):
        seen += 1
        if batch == 1 and accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    try:
        stopping.end_evaluation()
    except Preempted:
        return seen, 75
    return seen, 0


def test_a_signal_to_one_process_ends_the_evaluation_of_all():
    assert on_processes(2, evaluate_with_signal_to_one) == [(5, 75), (2, 75)]


@pytest.mark.parametrize(("pace", "expected"), [(0.01, 10), (0.5, 4), (5.0, 1)])
def test_on_a_gpu_the_question_is_asked_every_two_seconds(accelerator, monkeypatch, pace, expected):
    """By the pace of the updates, which is the same on all processes; after ten updates at the latest."""
    now, asked = 0.0, []
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    stopping = Stopping(accelerator)

    def reduce(values: torch.Tensor, how: str) -> torch.Tensor:
        asked.append(update)
        return values

    stopping.accelerator = SimpleNamespace(device=torch.device("cuda"), num_processes=1, reduce=reduce)
    for update in range(1, 41):
        now += pace
        stopping.ask(update)
    assert {later - earlier for earlier, later in pairwise(asked)} == {expected}
