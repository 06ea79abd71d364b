"""The frozen teacher: no gradients, always in eval mode, timed, and really gone when it is released."""

import gc
import time
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from w2s.teacher import Teacher


def model_of(seed: int = 0) -> nn.Module:
    """A small classifier whose logits differ between training and evaluation."""
    torch.manual_seed(seed)
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *pooled, nn.Linear(8, 10))


def teacher_of(model: nn.Module, **options: object) -> Teacher:
    return Teacher(model, name="net", source="here", **{"device": "cpu", **options})


def pixels(batch: int = 4) -> torch.Tensor:
    """Images in 0-1."""
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.eval()(images)


# --- frozen ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def teacher() -> Teacher:
    return teacher_of(model_of())


def test_a_teacher_gives_and_takes_no_gradient(teacher):
    images = pixels().requires_grad_()
    given = teacher(images)
    assert not given.requires_grad
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_logits_of_a_teacher_may_enter_a_loss_that_is_differentiated(teacher):
    student = model_of(seed=3)
    F.mse_loss(student(pixels()), teacher(pixels())).backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.model.parameters())


def test_a_teacher_stays_in_eval_mode_while_the_student_trains(teacher):
    student, before = model_of(seed=3), {k: v.clone() for k, v in teacher.model.state_dict().items()}
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for _ in range(2):
        student.train()
        F.mse_loss(student(pixels()), teacher(pixels())).backward()
        optimizer.step()
    assert not any(module.training for module in teacher.model.modules())
    assert all(torch.equal(v, before[k]) for k, v in teacher.model.state_dict().items())


def test_a_teacher_given_in_training_mode_is_put_in_eval_mode():
    model, images = model_of().train(), pixels()
    assert torch.equal(teacher_of(model)(images), logits(model_of(), images))


def test_a_teacher_runs_in_the_precision_that_it_is_given():
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    assert teacher_of(model_of(), autocast=autocast)(pixels()).dtype == torch.bfloat16
    assert teacher_of(model_of())(pixels()).dtype == torch.float32
    with autocast():  # a training loop under its own autocast
        assert teacher_of(model_of())(pixels()).dtype == torch.bfloat16


def test_a_teacher_says_what_it_is(teacher):
    assert (teacher.name, teacher.source) == ("net", "here")
    assert teacher.params == sum(p.numel() for p in model_of().parameters())


def test_a_teacher_gives_the_record_its_scores_with_what_it_is(teacher):
    facts = teacher.facts(switch=61.5, report=60.0)
    assert facts == {
        "model": "net",
        "switch": 61.5,
        "report": 60.0,
        "params": teacher.params,
        "checkpoint": "here",
    }


def test_calls_are_counted(teacher):
    assert teacher.calls == 0
    for _ in range(3):
        teacher(pixels(1))
    assert teacher.calls == 3


# --- timed -----------------------------------------------------------------------------------------------------------


class Slow(nn.Module):
    """A model that takes some time in those of its calls that are asked for."""

    def __init__(self, seconds: float, calls: set[int]) -> None:
        super().__init__()
        self.seconds, self.slow_calls, self.count = seconds, calls, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.count in self.slow_calls:
            time.sleep(self.seconds)
        self.count += 1
        return images.mean((2, 3))


def slow_teacher(seconds: float, calls: set[int]) -> Teacher:
    return teacher_of(Slow(seconds, calls))


@pytest.mark.parametrize("calls", [1, 10, 25])
def test_seconds_are_extrapolated_from_every_tenth_call_to_all_of_them(calls):
    teacher = slow_teacher(0.02, set(range(0, 100, Teacher.TIMING_INTERVAL)))
    for _ in range(calls):
        teacher(pixels(1))
    assert teacher.take_seconds() >= 0.02 * calls


def test_seconds_of_a_real_teacher_are_positive_and_about_those_that_passed(teacher):
    teacher(pixels())
    teacher.restart_timer()
    begin = time.perf_counter()
    for _ in range(20):
        teacher(pixels())
    passed = time.perf_counter() - begin
    assert 0 < teacher.take_seconds() < 20 * passed


def test_seconds_are_taken_once():
    teacher = slow_teacher(0.02, {0})
    teacher(pixels(1))
    assert teacher.take_seconds() > 0
    assert teacher.take_seconds() == 0.0


def test_no_calls_take_no_time(teacher):
    assert teacher.take_seconds() == 0.0


def test_calls_before_a_restart_of_the_timer_are_forgotten():
    teacher = slow_teacher(0.2, {0, 1, 2})
    for _ in range(3):
        teacher(pixels(1))
    teacher.restart_timer()
    teacher(pixels(1))
    assert 0 < teacher.take_seconds() < 0.2
    assert teacher.calls == 4


# --- released --------------------------------------------------------------------------------------------------------


def test_a_released_model_is_gone(teacher):
    teacher(pixels())
    model = weakref.ref(teacher.model)
    tensors = [weakref.ref(p) for p in teacher.model.parameters()]
    teacher.release()
    assert model() is None
    assert all(tensor() is None for tensor in tensors)


def test_the_memory_of_a_released_model_is_freed():
    def held() -> int:
        gc.collect()
        return sum(t.numel() for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter))

    before = held()
    teacher = teacher_of(model_of())
    teacher(pixels())
    assert held() >= before + teacher.params
    teacher.release()
    assert held() == before


def test_a_released_teacher_can_neither_be_called_nor_come_back(teacher):
    teacher.release()
    with pytest.raises(TypeError):
        teacher(pixels())
    assert teacher.model is None


def test_a_released_teacher_still_says_what_it_was_and_took(teacher):
    teacher(pixels())
    teacher.release()
    assert teacher.take_seconds() > 0
    assert (teacher.name, teacher.calls) == ("net", 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_teacher_is_timed_by_the_device_and_its_memory_returned():
    empty = torch.cuda.memory_allocated()
    teacher = teacher_of(model_of(), device="cuda")
    teacher(pixels().cuda())
    torch.cuda.synchronize()
    assert teacher.take_seconds() > 0
    weights = sum(p.numel() * 4 for p in teacher.model.parameters())
    held = torch.cuda.memory_allocated()
    teacher.release()
    assert torch.cuda.memory_allocated() <= held - weights
    assert empty <= held - weights


# --- another example's outputs ---------------------------------------------------------------------------------------


def test_shuffled_outputs_are_those_of_the_examples_that_the_permutation_names(teacher):
    expected = teacher(pixels())
    given = teacher.shuffled(lambda count, device: torch.arange(count, device=device).roll(1), pixels())
    assert torch.equal(given, expected.roll(1, 0))
