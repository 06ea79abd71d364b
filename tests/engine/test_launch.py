"""What the processes of a launch decide together, and what they are told of their machine."""

from pathlib import Path

import accelerate
import pytest
import torch
from helpers import on_processes, refused

from w2s.engine.errors import Finished, InputError
from w2s.engine.launch import (
    build_accelerator,
    decide_on_main,
    processes_here,
    refuse_together,
    share_batch,
    wait_for_device,
)


def rank_seen(accelerator) -> int:
    return decide_on_main(lambda: accelerator.process_index)


def finished_on_main(accelerator) -> None:
    def decide() -> None:
        raise Finished("complete")

    decide_on_main(decide)


def refused_on_the_other(accelerator) -> None:
    refuse_together("no disk" if accelerator.process_index == 1 else None)


def place(accelerator) -> tuple[int, int]:
    return processes_here()


def test_the_main_process_decides_for_all():
    assert on_processes(2, rank_seen) == [0, 0]


def test_what_ends_the_main_process_ends_all():
    assert [(type(e), str(e)) for e in on_processes(2, finished_on_main)] == [(Finished, "complete")] * 2


def test_what_one_process_finds_wrong_all_refuse():
    assert [(type(e), str(e)) for e in on_processes(2, refused_on_the_other)] == [(InputError, "no disk")] * 2


def test_the_processes_of_a_machine_know_each_other():
    assert on_processes(2, place) == [(0, 2), (1, 2)]


def test_processes_that_know_nothing_of_each_other_are_refused(accelerator, tmp_path, monkeypatch):
    """torchrun on a machine with an accelerator whose processes Accelerate cannot join, as those of MPS."""
    accelerate.state.AcceleratorState._reset_state(True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with refused("2 processes", "joins 1", "ACCELERATE_USE_CPU=true"):
        build_accelerator(tmp_path, None, timeout=60)


@pytest.mark.parametrize(("kind", "waits"), [("cpu", 0), ("cuda", 1), ("mps", 1), ("xpu", 1)])
def test_a_clock_waits_for_every_kind_of_accelerator(kind, waits, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: calls.append(kind))
    wait_for_device(torch.device(kind))()
    assert len(calls) == waits


def ddp_options(accelerator) -> tuple[bool, bool]:
    model = build_accelerator(Path("run"), None, timeout=60).prepare(torch.nn.Linear(2, 2))
    return model.broadcast_buffers, model.gradient_as_bucket_view


def test_buffers_are_not_sent_around_and_gradients_not_copied():
    assert on_processes(2, ddp_options) == [(False, True)] * 2


@pytest.mark.parametrize(
    ("images", "processes", "batch_size", "shared"),
    [
        (64, 2, 32, (32, 1)),
        (64, 1, 32, (32, 2)),  # there is memory for 32
        (64, 4, 32, (16, 1)),
        (96, 2, 32, (24, 2)),
        (36, 1, 16, (12, 3)),  # 9 micro-batches of 4 would fit, too
        (60, 2, 4, (2, 15)),  # 3 would fit, and be odd
        (7, 7, 1, (1, 1)),
        (9, 3, 1, (1, 3)),
    ],
)
def test_processes_share_an_update(images, processes, batch_size, shared):
    assert share_batch(images, processes, batch_size) == shared
    assert processes * shared[0] * shared[1] == images


@pytest.mark.parametrize(
    ("images", "processes", "batch_size", "instead"),
    [(64, 3, 32, 2), (64, 64, 32, 32), (6, 2, 2, 1), (7, 3, 1, 1)],
)
def test_an_update_that_cannot_be_shared_is_refused(images, processes, batch_size, instead):
    with refused(f"{images} images", f"{processes} processes", f"resume it with {instead}"):
        share_batch(images, processes, batch_size)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "BF16"}, ["ACCELERATE_MIXED_PRECISION=BF16", "no, bf16 or fp16"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp32"}, ["ACCELERATE_MIXED_PRECISION=fp32"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, ["fp16 needs a GPU"]),
        ({"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, ["--dynamo_backend", "--torchcompile"]),
    ],
)
def test_what_a_launch_asks_for_and_would_not_get_is_refused(variables, words, accelerator, tmp_path, monkeypatch):
    accelerate.state.AcceleratorState._reset_state(True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with refused(*words):
        build_accelerator(tmp_path, None, timeout=60)


def test_a_launcher_has_no_part_in_the_accumulation_of_gradients(accelerator, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    made, weight = build_accelerator(tmp_path, None, timeout=60), torch.ones(1, requires_grad=True)
    made.backward(weight.sum())
    assert weight.grad.item() == 1
