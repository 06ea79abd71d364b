"""A run whose loop is someone else's: what it adds to the loss, what it writes, and what a checkpoint brings back."""

import gc
import json
import math
import weakref

import pytest
import torch
import yaml
from adapters.loops import CountingTeacher, early_phase
from helpers import read_rows, read_summary

from w2s.adapters.taught import TaughtRun
from w2s.compare.runs import read_run
from w2s.losses import kl_softmax

CPU = torch.device("cpu")
SCORES = {"switch": 60.0, "report": 58.0}


def taught(folder, **changes) -> TaughtRun:
    phase = early_phase(**changes)
    return TaughtRun(folder, metric="accuracy", targets=(70,), phase=phase, teacher=CountingTeacher(), seed=3)


def begin(run: TaughtRun, score=lambda teacher: SCORES) -> TaughtRun:
    run.begin(updates_per_epoch=10, device=CPU, score=score)
    return run


def epochs(run: TaughtRun, first: int, *switch: float) -> None:
    """Train to the end of each epoch, at which the student scores `switch`, and 10 more on the reporting split."""
    for epoch, value in enumerate(switch, start=first):
        for update in range(10 * epoch, 10 * epoch + 10):
            run.advance(update)
            run.term(torch.zeros(2, 4), torch.ones(2, 1, 4, 4))
            run.saw(2)
        run.evaluated(10 * epoch + 10, report=value + 10, switch=value, lr=0.1)


def test_the_term_is_lambda_times_the_divergence_at_t(tmp_path):
    run = begin(taught(tmp_path / "run"))
    teacher = run.distillation.teacher.model
    logits, images = torch.randn(3, 4), torch.randn(3, 1, 4, 4)
    run.advance(35)
    expected = 1.0 * kl_softmax(logits, teacher(images), run.distillation.phase.temperature(3.5))
    assert torch.equal(run.term(logits, images), expected)


def test_a_student_alone_gets_no_term_and_a_record(tmp_path):
    run = TaughtRun(tmp_path / "run", metric="accuracy", targets=(70,), seed=3)
    run.begin(updates_per_epoch=10, device=CPU)
    epochs(run, 0, 50, 60)
    assert run.term(torch.zeros(2, 4), torch.zeros(2, 1, 4, 4)) == 0.0
    run.finish()
    summary = read_summary(tmp_path / "run")
    assert summary["targets"]["70"]["first"]["epoch"] == 2 and summary["teacher"] is None
    assert read_run(tmp_path / "run").seed == 3


def test_a_student_that_is_better_twice_frees_the_teacher_and_all_is_written(tmp_path):
    run = begin(taught(tmp_path / "run"))
    model = weakref.ref(run.distillation.teacher.model)
    epochs(run, 0, 50, 61, 62, 63)
    gc.collect()
    assert model() is None and run.term(torch.zeros(2, 4), torch.zeros(2, 1, 4, 4)) == 0.0
    run.finish()
    rows, summary = read_rows(tmp_path / "run"), read_summary(tmp_path / "run")
    assert [float(row["kd_active"]) for row in rows] == [1, 1, 0, 0]
    assert [float(row["switch_accuracy"]) for row in rows] == [50, 61, 62, 63]
    assert [float(row["samples"]) for row in rows] == [20, 40, 60, 80]
    assert summary["kd_off"] == {"epoch": 3.0, "update": 30, "reason": "surpass"}
    assert summary["teacher"]["switch"] == 60.0 and summary["targets"]["70"]["first"]["update"] == 20
    options = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert options["kd_weight"] == 2.0 and options["kd_temperature"] == [4, 1]


def test_the_end_of_the_window_is_written_when_it_comes(tmp_path):
    run = begin(taught(tmp_path / "run", hold=0.5, decay=0))
    epochs(run, 0, 50)
    assert read_summary(tmp_path / "run")["kd_off"] == {"epoch": 0.5, "update": 5, "reason": "window"}


def test_an_update_is_evaluated_once(tmp_path):
    run = begin(taught(tmp_path / "run"))
    epochs(run, 0, 61)
    run.evaluated(10, report=71, switch=61)
    assert run.distillation.active and len(run.record.rows) == 1


@pytest.mark.parametrize("before", [1, 3])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path, before):
    scores = (50.0, 61.0, 62.0, 63.0)
    whole, first = begin(taught(tmp_path / "whole")), begin(taught(tmp_path / "cut"))
    epochs(whole, 0, *scores)
    epochs(first, 0, *scores[:before])
    state = json.loads(json.dumps(first.state_dict()))  # as the Trainer keeps it
    epochs(first, before, *scores[before:3])  # what was done after the checkpoint is lost

    again = taught(tmp_path / "cut")
    teacher = again._model
    again.load_state_dict(state)
    begin(again, score=None)  # nothing may measure the teacher again
    if before == 3:
        assert again.distillation.teacher is None and again.term(torch.zeros(2, 4), torch.zeros(2, 1, 4, 4)) == 0.0
    epochs(again, before, *scores[before:])
    assert teacher.calls == (0 if before == 3 else 20)
    assert again.distillation.off == whole.distillation.off
    times = ("train_seconds", "total_seconds", "teacher_seconds")
    kept = [[{k: v for k, v in row.items() if k not in times} for row in read_rows(tmp_path / name)]
            for name in ("whole", "cut")]  # fmt: skip
    assert kept[0] == kept[1]


def test_a_finished_run_is_not_written_over(tmp_path):
    run = begin(taught(tmp_path / "run"))
    epochs(run, 0, 50)
    run.finish()
    with pytest.raises(ValueError, match="finished run"):
        begin(taught(tmp_path / "run"))


def test_an_interrupted_run_is_not_written_over(tmp_path):
    epochs(begin(taught(tmp_path / "run")), 0, 50)
    with pytest.raises(ValueError, match="interrupted after update 10: resume it"):
        begin(taught(tmp_path / "run"))
    assert len(read_rows(tmp_path / "run")) == 1


def test_the_micro_batches_of_an_update_are_one_update(tmp_path):
    run = begin(taught(tmp_path / "run"))
    for update in (35, 35, 36, 36):
        run.advance(update)
    assert run.distillation.updates == 2


def test_the_clock_goes_on_after_a_validation_within_an_update(tmp_path):
    run = begin(taught(tmp_path / "run"))
    run.advance(5)
    run.clock.pause()
    run.advance(5)
    assert run.clock.running


def test_a_window_that_ends_with_the_run_is_its_end(tmp_path):
    run = begin(taught(tmp_path / "run"))
    epochs(run, 0, 40, 40, 40, 40)
    run.finish()
    assert read_summary(tmp_path / "run")["kd_off"] == {"epoch": 4.0, "update": 40, "reason": "window"}
    assert [row["kd_active"] for row in read_rows(tmp_path / "run")] == ["1", "1", "1", "0"]
    assert run.state_dict()["phase"]["kd_off"] is not None


def test_options_that_yaml_cannot_hold_are_written_as_text(tmp_path):
    run = TaughtRun(tmp_path / "run", metric="accuracy", options={"folder": tmp_path, "sizes": (1, 2)})
    run.begin(updates_per_epoch=10, device=CPU, options={"loss": math.sqrt})
    options = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert options == {"folder": str(tmp_path), "sizes": [1, 2], "loss": str(math.sqrt)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"phase": early_phase()}, "a phase needs a teacher"),
        ({"teacher": CountingTeacher()}, "a teacher a phase"),
        ({"phase": early_phase(mode="min"), "teacher": CountingTeacher()}, "min"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        TaughtRun(tmp_path / "run", metric="accuracy", **arguments)
    assert not (tmp_path / "run").exists()


def test_a_teacher_whose_score_is_not_finite_could_never_be_passed(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        begin(taught(tmp_path / "run"), score=lambda teacher: {"switch": math.nan, "report": 1.0})
    assert not (tmp_path / "run").exists()
