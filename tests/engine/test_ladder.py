"""Teachers that hand over to one another: when, with what begun anew, and what is written down of each."""

import copy
import gc
import json
import weakref

import pytest
import torch
from helpers import refused
from torch import nn

from train_cls import build_parser, resolve
from w2s.controls import Control
from w2s.engine.ladder import PASSED, Ladder
from w2s.engine.teaching import early_phase
from w2s.running import GradientBalance, RunningScores
from w2s.schedule import EarlyPhase
from w2s.teacher import Teacher


@pytest.fixture(scope="module", autouse=True)
def quick_release():
    """Each release collects garbage: what the imports have made need not be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


SCORES = {"weak": 50.0, "mid": 60.0, "strong": 70.0}
FLOPS = {"weak": 10, "mid": 100, "strong": 1000}


class Loader:
    """Makes linear teachers by name, and knows which of their models are alive."""

    def __init__(self) -> None:
        self.models: list[tuple[str, weakref.ref]] = []

    def __call__(self, spec: str) -> Teacher:
        assert not self.alive, "one teacher in memory at a time"
        teacher = Teacher(nn.Linear(2, 3), name=f"linear-{spec}", source=spec, device="cpu")
        self.models.append((spec, weakref.ref(teacher.model)))
        return teacher

    @property
    def alive(self) -> list[str]:
        return [spec for spec, model in self.models if model() is not None]


def ladder(
    specs=("weak", "mid", "strong"), *, measured=0.0, control: str | None = None, measures=lambda: {}, **options
) -> Ladder:
    """Ten updates an epoch; lambda 2 held for 4 epochs and gone after 6, T from 6 to 1, patience 1. `measured` is what
    the student scores on the switch split at a hand-over."""
    phase = EarlyPhase(**{"weight": 2.0, "hold": 4.0, "decay": 2.0, "patience": 1, **options})
    load, lines = Loader(), []

    def renew(last: bool) -> dict:
        renewed = copy.copy(phase)
        if phase.off == "never" and not last:
            renewed.off = "surpass"
        return {"phase": renewed, **measures()}

    def introduce(spec: str, score: dict | None) -> tuple[Teacher, dict]:
        teacher = load(spec)
        teacher(torch.ones(1, 2))  # as its score is measured
        return teacher, score or teacher.facts(switch=SCORES[spec], report=SCORES[spec] - 1)

    made = Control(kind=control, seed_of=lambda update, micro: 0) if control else None
    common = {"control": made, "unit": "epoch", "updates_per_epoch": 10}
    kd = Ladder(
        list(specs), renew=renew, introduce=introduce, measure=lambda model: measured, log=lines.append, **common
    )
    kd.load, kd.lines = load, lines
    return kd


def started(*args, **options) -> Ladder:
    kd = ladder(*args, **options)
    kd.start(kd.load, count=lambda teacher: FLOPS[teacher.source])
    return kd


def train(kd: Ladder, since: int, stop: int) -> None:
    for update in range(since, stop):
        kd.advance(update)
        if kd.weight > 0:
            kd.teach(torch.ones(4, 2))
        kd.count_update()
    kd.advance(stop)


def passed(kd: Ladder, update: int, student: float) -> None:
    """An evaluation at which the student has this score, and what follows from it."""
    kd.observe(student, update=update)
    kd.take_evaluation()
    kd.take_seconds()
    kd.hand_over(update, student=lambda: pytest.fail("it was just evaluated"))


def test_every_teacher_is_looked_at_before_the_first_update_and_only_the_first_one_stays():
    kd = started()
    assert [spec for spec, _ in kd.load.models] == ["weak", "mid", "strong", "weak"] and kd.load.alive == ["weak"]
    assert kd.forwards == [10, 100, 1000] and kd.score["switch"] == 50.0
    assert "better than 50; each with such a window of its own, then: mid, strong" in kd.describe()


def test_a_passed_teacher_hands_over_and_the_phase_begins_anew():
    kd = started()
    train(kd, 0, 20)
    assert kd.temperature < 6
    passed(kd, 20, student=55.0)
    assert kd.load.alive == ["mid"] and kd.active and kd.off is None and not kd.handing_over
    kd.advance(20)
    assert (kd.weight, kd.temperature, kd.since, kd.progress(30)) == (2.0, 6.0, 20, 1.0)
    kd.advance(20 + 50)
    assert kd.weight == pytest.approx(1.0), "in the middle of its own decay"
    assert kd.lines == ["epoch 2, update 20: weak (surpass) hands over to mid"]


def test_the_end_of_the_window_hands_over_too_and_the_end_of_the_last_one_is_for_good():
    kd = started(["weak", "mid"])
    train(kd, 0, 60)
    assert kd.handing_over and kd.off is None and kd.load.alive == []
    assert "weak (window) is to hand over to mid" in kd.describe()
    kd.hand_over(60, student=object)
    train(kd, 60, 120)
    assert kd.off == {"epoch": 12.0, "update": 120, "reason": "window"} and not kd.handing_over
    assert kd.load.alive == [] and kd.weight == 0.0


def test_a_teacher_that_the_student_has_passed_is_skipped():
    kd = started()
    train(kd, 0, 10)
    passed(kd, 10, student=65.0)
    assert kd.load.alive == ["strong"] and kd.active
    weak, mid, strong = kd.facts()["teachers"]
    assert mid["off"] == {"epoch": 1.0, "update": 10, "reason": PASSED} and mid["updates"] == 0
    assert weak["off"]["reason"] == "surpass" and strong["off"] is None
    assert any("mid is skipped" in line and "65" in line for line in kd.lines)


def test_where_all_others_are_passed_the_teaching_is_over():
    kd = started()
    train(kd, 0, 10)
    passed(kd, 10, student=90.0)
    assert kd.off == {"epoch": 1.0, "update": 10, "reason": PASSED} and kd.load.alive == []


@pytest.mark.parametrize(("measured", "skipped"), [(60.0, False), (60.1, True)])
def test_after_a_window_the_student_is_measured_anew(measured, skipped):
    kd = started(["weak", "mid"], measured=measured)
    train(kd, 0, 20)
    kd.observe(40.0, update=20)
    train(kd, 20, 60)
    kd.hand_over(60, student=object)
    assert (kd.load.alive == []) == skipped


def test_a_fixed_end_is_counted_from_each_hand_over_whoever_is_better():
    kd = started(["weak", "mid"], off=3, measured=99.0)
    train(kd, 0, 30)
    kd.hand_over(30, student=object)
    train(kd, 30, 60)
    assert kd.off == {"epoch": 6.0, "update": 60, "reason": "fixed"}


def test_never_holds_for_the_last_teacher_only():
    kd = started(["weak", "mid"], off="never")
    train(kd, 0, 10)
    passed(kd, 10, student=90.0)
    assert kd.load.alive == ["mid"], "the last one is not skipped"
    kd.advance(500)
    again = ladder(["weak", "mid"], off="never")
    again.load_state_dict(json.loads(json.dumps(kd.state_dict())))
    for one in (kd, again):
        one.observe(99.0, update=500)
        one.advance(500)
        assert one.active and one.weight == 2.0


def test_a_weaker_teacher_after_a_stronger_one_is_warned_of():
    kd = started(["mid", "weak"])
    train(kd, 0, 60)
    kd.hand_over(60, student=object)
    assert any(line.startswith("warning: weak is weaker on the switch split") for line in kd.lines)


def test_lower_is_better_where_the_metric_says_so():
    kd = started(["strong", "weak"], mode="min")
    train(kd, 0, 10)
    passed(kd, 10, student=65.0)
    assert kd.active and not any("warning" in line for line in kd.lines)


def test_what_is_measured_in_training_begins_anew():
    kd = started(["weak", "mid"], measures=lambda: {"balance": GradientBalance(), "running": RunningScores()})
    first = kd.gradients, kd.running
    kd.advance(0)
    outputs = torch.ones(1, requires_grad=True)
    kd.balance(outputs.sum(), 3 * outputs.sum(), outputs=[outputs])
    kd.compare(lambda score: score, torch.tensor([100.0]), torch.tensor([0.0]))
    kd.count_update()
    assert kd.ratio != 1
    kd.observe(None, update=1)
    kd.hand_over(1, student=lambda: pytest.fail("nothing is compared on a split"))
    assert kd.gradients not in first and kd.running not in first
    assert kd.gradients.means is kd.running.sums is None and kd.ratio == kd.scale == 1
    assert kd.active, "only the batches of training tell whether it is passed"


def test_the_fade_begins_anew():
    kd = started(["weak", "mid"], fade=True)
    kd.observe(10.0, update=1)
    kd.observe(30.0, update=2)
    assert kd.phase.weight(0.2) == 1.0
    train(kd, 2, 60)
    kd.hand_over(60, student=object)
    kd.advance(60)
    assert kd.weight == 2.0 and kd.phase.first_lead is None


def test_each_teacher_has_a_bill_of_its_own():
    kd = started(["weak", "mid"])
    kd.restart_timer()
    train(kd, 0, 10)
    passed(kd, 10, student=55.0)
    assert kd.take_seconds() == 0, "to measure its score is not to teach"
    train(kd, 10, 13)
    kd.take_seconds()
    weak, mid = kd.facts()["teachers"]
    assert (weak["updates"], mid["updates"]) == (10, 3) and min(weak["seconds"], mid["seconds"]) > 0
    assert (weak["pflops"], mid["pflops"]) == (100 / 1e15, 300 / 1e15)
    assert kd.taught_flops(10) == 400 and kd.updates == 13
    assert mid["since"] == {"epoch": 1.0, "update": 10} and mid["model"] == "linear-mid"
    assert kd.facts()["teacher"]["checkpoint"] == "mid"


def test_those_that_take_over_are_compiled_as_the_first_one_is(monkeypatch):
    kd, compiled = started(["weak", "mid"]), []
    monkeypatch.setattr(Teacher, "compile", lambda self, backend: compiled.append((self.source, backend)))
    kd.compile("eager")
    passed(kd, 10, student=55.0)
    assert compiled == [("weak", "eager"), ("mid", "eager")]


@pytest.mark.parametrize("where", ["first", "waiting", "second", "over"])
def test_a_checkpoint_brings_it_back_wherever_it_stands(where):
    kd = started(["weak", "mid"], fade=True, measured=55.0)
    train(kd, 0, 60 if where != "first" else 20)
    if where in ("second", "over"):
        kd.hand_over(60, student=object)
        train(kd, 60, 120 if where == "over" else 70)
    again = ladder(["weak", "mid"], fade=True, measured=55.0)
    again.load_state_dict(json.loads(json.dumps(kd.state_dict())))
    again.start(again.load, count=lambda teacher: pytest.fail("its cost is known"))
    assert again.facts() == kd.facts() and again.describe() == kd.describe() and again.off == kd.off
    assert again.load.alive == kd.load.alive == {"first": ["weak"], "second": ["mid"]}.get(where, [])
    loaded = {"first": ["mid", "weak"], "waiting": ["mid"], "second": ["mid"], "over": []}[where]
    assert [spec for spec, _ in again.load.models] == loaded, "those that are passed may be gone"
    for one in (kd, again):
        if one.handing_over:
            one.hand_over(60, student=object)
        one.advance(75)
    assert (again.weight, again.temperature) == (kd.weight, kd.temperature)


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        ("--teacher-score 3", "--teacher-score is the score of one teacher"),
        ("--kd-term nd", "--kd-term has parts that are made for one teacher"),
        ("--kd-target taid", "--kd-target moves to one teacher"),
    ],
)
def test_what_several_teachers_cannot_share_is_refused(words, needed):
    for teachers in ("a", "a b"):
        command = f"--dataset digits --model resnet10t --epochs 10 {words} --teacher {teachers}"
        args = build_parser().parse_recipe(command.split())
        resolve(args)
        if teachers == "a":
            assert args.teacher == "a" and early_phase(args, length=10, mode="max")
        else:
            with refused(needed, "give one --teacher"):
                early_phase(args, length=10, mode="max")


def test_a_recipe_takes_a_list_and_one_value_stays_a_name(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for text, taken in (("[a, b]", ["a", "b"]), ("[a]", "a"), ("a", "a")):
        recipe.write_text(f"teacher: {text}\n")
        assert build_parser().parse_recipe(["-c", str(recipe)]).teacher == taken
    assert build_parser().parse_recipe(["-c", str(recipe), "--teacher", "x", "y"]).teacher == ["x", "y"]
    with refused("more than once", "several teachers follow one"):
        build_parser().parse_recipe(["--teacher", "x", "--teacher=y"])
