"""The method as one object, without any script: when the teacher speaks, when it falls silent, what is kept of it."""

import weakref

import pytest
import torch
from torch import nn

from w2s.controls import Control
from w2s.distillation import Distillation
from w2s.running import RunningScores
from w2s.schedule import EarlyPhase
from w2s.teacher import Teacher

SCORE = {"model": "linear", "switch": 60.0, "report": 59.0, "params": 6, "checkpoint": "somewhere"}


def distillation(
    control: str | None = None, unit: str = "epoch", running: RunningScores | None = None, **options
) -> Distillation:
    """Ten updates an epoch; lambda 2 held for 4 units and gone after 6, unless `options` say otherwise."""
    phase = EarlyPhase(**{"weight": 2.0, "hold": 4.0, "decay": 2.0, "patience": 2, **options})
    made = Control(kind=control, seed_of=lambda update, micro: 100 * update + micro) if control else None
    kd = Distillation(phase, control=made, unit=unit, updates_per_epoch=10, running=running)
    kd.teacher = Teacher(nn.Linear(2, 3), name="linear", source="somewhere", device="cpu")
    kd.score = dict(SCORE)
    return kd


def hits(outputs, labels):
    return 100.0 * (outputs.argmax(-1) == labels)


def test_running_scores_decide_without_a_switch_split():
    """The student is right in 3 of 4, the teacher in 2 of 4; at the second evaluation in a row it is passed."""
    kd = distillation(running=RunningScores())
    kd.score["switch"] = None
    labels, eye = torch.tensor([0, 1, 2, 2]), torch.eye(3)
    for update in (0, 1):
        kd.advance(update)
        kd.compare(hits, eye[[0, 1, 2, 0]], eye[[0, 1, 0, 0]], labels)
        assert kd.count_update()
    assert kd.needs_split is False and "off (running): 2 evaluations in a row" in kd.describe()
    kd.observe(None, update=2)
    assert kd.active and kd.take_evaluation()["running"] == pytest.approx((75.0, 50.0))
    kd.observe(None, update=3)
    assert kd.off == {"epoch": 0.3, "update": 3, "reason": "surpass"} and kd.teacher is None


def test_a_student_alone_has_an_object_that_does_nothing():
    kd = Distillation()
    kd.advance(0)
    assert (kd.active, kd.weight, kd.off, kd.score, kd.describe(), kd.needs_forward) == (
        False,
        0.0,
        None,
        None,
        None,
        False,
    )
    assert kd.count_update() is False and kd.updates == 0
    assert kd.take_seconds() == 0.0
    assert kd.take_evaluation() == {"kd_weight": 0.0, "kd_active": 0}
    assert kd.state_dict() == {"phase": None, "teacher": None, "kd_updates": 0, "balance": None, "running": None}
    kd.restart_timer()
    kd.compile("eager")


@pytest.mark.parametrize(("unit", "update", "weight"), [("epoch", 39, 2.0), ("epoch", 50, 1.0), ("update", 5, 1.0)])
def test_weight_and_temperature_are_those_of_the_phase_at_the_update(unit, update, weight):
    kd = distillation(unit=unit)
    kd.advance(update)
    assert kd.weight == weight
    assert kd.temperature == kd.phase.temperature(update / 10 if unit == "epoch" else update)


def test_the_teacher_answers_without_gradient_and_is_counted():
    kd = distillation()
    kd.advance(0)
    inputs = torch.ones(4, 2, requires_grad=True)
    outputs = kd.teach(inputs)
    assert torch.equal(outputs, kd.teacher.model(inputs)) and not outputs.requires_grad
    assert kd.teacher.calls == 1
    assert kd.count_update() is True and kd.updates == 1


def test_each_micro_batch_of_an_update_is_shuffled_in_its_own_way():
    kd = distillation(control="shuffled")
    inputs = torch.arange(64.0).view(32, 2)
    kd.advance(3)
    first, second = kd.teach(inputs), kd.teach(inputs)
    kd.advance(3)
    assert torch.equal(kd.teach(inputs), first) and not torch.equal(first, second)


def test_a_control_that_asks_no_teacher_needs_no_forward():
    assert distillation().needs_forward and distillation(control="labels").needs_forward
    assert not distillation(control="uniform").needs_forward


def test_the_end_of_the_window_frees_the_teacher():
    kd = distillation()
    model = weakref.ref(kd.teacher.model)
    kd.advance(59)
    assert kd.active and kd.off is None
    kd.advance(60)
    assert kd.teacher is None and model() is None
    assert (kd.active, kd.weight) == (False, 0.0)
    assert kd.off == {"epoch": 6.0, "update": 60, "reason": "window"}


def test_a_student_that_is_strictly_better_twice_in_a_row_frees_the_teacher():
    kd = distillation()
    model = weakref.ref(kd.teacher.model)
    for update, student in ((10, 60.5), (20, 60.0), (30, 60.1)):  # equal is not better
        kd.observe(student, update=update)
        assert kd.active
    kd.observe(60.1, update=40)
    assert kd.teacher is None and model() is None
    assert kd.off == {"epoch": 4.0, "update": 40, "reason": "surpass"}
    kd.advance(40)
    assert kd.weight == 0.0


def test_lower_is_better_where_the_metric_says_so():
    kd = distillation(mode="min", patience=1, unit="update")
    kd.observe(60.5, update=2)
    assert kd.active
    kd.observe(59.5, update=3)
    assert kd.off == {"epoch": 0.3, "update": 3, "reason": "surpass"}


def test_an_evaluation_is_told_once_with_the_weight_before_the_decision():
    kd = distillation(patience=1)
    kd.observe(50.0, update=50)
    assert kd.take_evaluation() == {
        "kd_weight": 1.0,
        "kd_temperature": kd.phase.temperature(5.0),
        "switch": 50.0,
        "kd_active": 1,
    }
    kd.observe(70.0, update=50)
    assert kd.take_evaluation()["kd_weight"] == 1.0 and not kd.active
    assert kd.take_evaluation() == {"kd_weight": 0.0, "kd_active": 0}


def test_an_evaluation_without_a_comparison_is_an_error_while_the_teacher_is_active():
    with pytest.raises(ValueError, match="observe"):
        distillation().take_evaluation()


def test_silence_ends_it_whatever_the_metrics_say():
    kd = distillation(off="never")
    kd.silence(update=7, reason="surpass")
    assert kd.teacher is None and kd.off == {"epoch": 0.7, "update": 7, "reason": "surpass"}


def test_the_first_end_is_the_one_that_counts():
    kd = distillation()
    kd.advance(60)
    kd.silence(update=70, reason="surpass")
    assert kd.off == {"epoch": 6.0, "update": 60, "reason": "window"}


def test_the_seconds_of_a_released_teacher_are_not_lost():
    kd = distillation()
    kd.restart_timer()
    for _ in range(3):
        kd.teach(torch.ones(1, 2))
    kd.silence(update=3, reason="window")
    assert kd.take_seconds() > 0
    assert kd.take_seconds() == 0.0


def test_a_checkpoint_brings_back_wins_score_and_count_but_no_weights():
    kd = distillation()
    kd.advance(0)
    kd.count_update()
    kd.observe(61.0, update=10)
    state = kd.state_dict()
    assert set(state) == {"phase", "teacher", "kd_updates", "balance", "running"} and state["teacher"] == SCORE
    again = distillation()
    again.load_state_dict(state)
    assert (again.updates, again.score) == (1, SCORE)
    again.observe(61.0, update=20)  # the second win in a row
    assert again.off["reason"] == "surpass"


def test_a_teacher_that_was_off_stays_off_after_a_resume():
    kd = distillation()
    kd.silence(update=12, reason="surpass")
    again = distillation()
    again.load_state_dict(kd.state_dict())
    assert not again.active and again.off == kd.off
    again.advance(13)
    assert again.weight == 0.0
    assert "the teacher is not loaded" in again.describe()
    assert "update 12 (surpass)" in again.describe_off()


def test_the_first_lines_say_what_will_happen():
    line = distillation(control="labels", temperature=(5, 2)).describe()
    for words in (
        "lambda 2",
        "hold 4",
        "decay 2 epochs",
        "T 5 to 2",
        "2 evaluations in a row",
        "60",
        "--kd-control labels",
    ):
        assert words in line


def test_one_evaluation_is_not_several_in_a_row():
    assert "1 evaluation better than 60" in distillation(patience=1).describe()


@pytest.mark.parametrize(
    ("off", "words"),
    [
        ("surpass", ["fading with its lead", "2 evaluations in a row better than 60"]),
        ("never", ["; never off"]),
        (3.0, ["off at epoch 3, whoever is better"]),
    ],
)
def test_the_first_lines_promise_no_comparison_and_no_fade_where_there_is_none(off, words):
    line = distillation(off=off, fade=True).describe()
    assert all(word in line for word in words)
    assert ("in a row" in line) == ("fading" in line) == (off == "surpass")
