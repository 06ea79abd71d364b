"""Quality against budget: the horizontal distance of curves worked out by hand, what may differ, and the files."""

import json
import math
from pathlib import Path

import pytest
from compare.folders import ENVIRONMENT, TEACHER, write_run

from w2s.compare.__main__ import main
from w2s.compare.budget import iso_quality


def curve(quality: list[float], cost: list[float] = (2, 4, 8)) -> dict:
    return {0: {"quality": quality, "epoch": list(cost)}}


def speedup(before: list[float], after: list[float], index: int, mode: str = "max") -> dict:
    return iso_quality(curve(before), curve(after), index, "epoch", mode)


def test_equal_curves_need_the_same_budget():
    assert speedup([50, 60, 70], [50, 60, 70], index=1)["geometric_mean"] == 1.0


def test_a_curve_that_is_there_one_budget_earlier_needs_half():
    assert speedup([40, 50, 60], [50, 60, 70], index=2)["geometric_mean"] == 2.0


def test_between_two_budgets_the_logarithm_of_the_cost_is_interpolated():
    assert speedup([40, 50, 65], [50, 60, 70], index=2)["geometric_mean"] == pytest.approx(8 / math.sqrt(4 * 8))


def test_a_curve_that_falls_counts_as_flat():
    assert speedup([40, 50, 60], [60, 55, 70], index=2)["geometric_mean"] == 4.0


def test_a_longer_run_that_was_cheaper_bounds_the_cost():
    after = curve([50, 60, 70], [9, 6, 12])
    assert iso_quality(curve([40, 55, 65]), after, 1, "epoch", "max")["geometric_mean"] == pytest.approx(4 / 6)
    assert iso_quality(curve([40, 55, 65]), after, 2, "epoch", "max")["geometric_mean"] == pytest.approx(8 / 72**0.5)
    assert iso_quality(curve([40, 55, 65]), after, 0, "epoch", "max")["at_least"] == pytest.approx(2 / 6)
    assert iso_quality(after, curve([50, 60, 70]), 0, "epoch", "max")["geometric_mean"] == pytest.approx(6 / 2)


def test_a_lower_metric_may_be_the_better_one():
    assert speedup([90, 60, 40], [60, 40, 30], index=2, mode="min")["geometric_mean"] == 2.0


def test_quality_below_the_curve_bounds_the_speedup_from_below():
    result = speedup([40, 50, 60], [55, 60, 70], index=1)
    assert (result["geometric_mean"], result["at_least"], result["at_most"]) == (None, 2.0, None)


def test_quality_above_the_curve_bounds_the_speedup_from_above():
    result = speedup([40, 50, 90], [50, 60, 70], index=2)
    assert (result["geometric_mean"], result["at_least"], result["at_most"]) == (None, None, 1.0)


def test_a_cost_that_was_not_recorded_gives_no_speedup():
    result = iso_quality(curve([40, 50, 60]), curve([50, 60, 70], [None, 4, 8]), 1, "epoch", "max")
    assert (result["geometric_mean"], result["at_least"], result["at_most"]) == (None, None, None)
    result = iso_quality(curve([40, 50, 60], [None, 4, 8]), curve([45, 60, 70]), 0, "epoch", "max")
    assert (result["geometric_mean"], result["at_least"], result["at_most"]) == (None, None, None)


# --- run folders -----------------------------------------------------------------------------------------------------


def write_arm(folder: Path, finals: dict[int, list[float]], rate: float = 0.1, **facts: object) -> str:
    """Runs of an arm, one per length and seed, that end at `finals[epochs][seed]`; a pattern that matches them."""
    for epochs, values in finals.items():
        for seed, value in enumerate(values):
            curve, options = [10.0] * (epochs - 1) + [value], {"epochs": epochs, "lr": rate * epochs}
            write_run(folder / f"{epochs}-seed{seed}", curve, options=options, seed=seed, **facts)
    return f"{folder}/*"


def compare(tmp_path: Path, *more: str) -> int:
    arms = ("--arm", f"alone={tmp_path}/alone/*", "--arm", f"taught={tmp_path}/taught/*")
    return main([*arms, "--budget", "--out", str(tmp_path / "out"), *more])


def test_two_arms_at_three_budgets(tmp_path, capsys):
    write_arm(tmp_path / "alone", {2: [40, 42], 4: [50, 52], 8: [60, 62]})
    write_arm(tmp_path / "taught", {2: [50, 52], 4: [60, 62], 8: [70, 70]}, rate=0.05, teacher=TEACHER)
    assert compare(tmp_path, "--margin", "0.5") == 0
    result = json.loads((tmp_path / "out" / "budget.json").read_text())
    eight = result["budgets"]["8"]
    assert eight["speedup"]["taught"]["epoch"]["geometric_mean"] == pytest.approx(2.0)
    assert eight["speedup"]["taught"]["train_seconds"]["ratios"] == pytest.approx([2.0, 2.0])
    assert (eight["gain"]["taught"]["mean"], eight["final"]["alone"]["median"]) == (9.0, 61.0)
    assert [eight["tuned"][arm]["lr"] for arm in ("alone", "taught")] == [0.8, 0.4]
    assert result["budgets"]["2"]["speedup"]["taught"]["epoch"]["at_least"] == 1.0  # 40 lies below the taught curve
    assert eight["speedup"]["taught"]["train_seconds_paid"]["geometric_mean"] is None  # the teacher's run is not there
    assert (tmp_path / "out" / "budget.png").read_bytes().startswith(b"\x89PNG")
    sentence = "Iso-quality speedup of taught over alone at its final top1: with 2 epochs, > 1.00x in epochs"
    assert sentence in (tmp_path / "out" / "budget.md").read_text()
    assert sentence in capsys.readouterr().out


def test_the_teachers_training_is_paid_at_every_budget(tmp_path):
    write_run(tmp_path / "taught-teacher", [60.0, 67.5])  # 20 train seconds
    write_arm(tmp_path / "alone", {2: [40], 4: [50], 8: [60]})  # 20, 40 and 80 train seconds
    teacher = TEACHER | {"checkpoint": str(tmp_path / "taught-teacher")}
    write_arm(tmp_path / "taught", {2: [50], 4: [60], 8: [70]}, teacher=teacher)
    assert compare(tmp_path) == 0
    speedup = json.loads((tmp_path / "out" / "budget.json").read_text())["budgets"]["8"]["speedup"]["taught"]
    assert speedup["train_seconds"]["geometric_mean"] == pytest.approx(2.0)
    assert speedup["train_seconds_paid"]["geometric_mean"] == pytest.approx(80 / 60)


def test_a_reference_whose_costs_are_not_known_gives_no_figure(tmp_path):
    for arm, end in (("alone", 0), ("taught", 10)):
        empty = {"teacher": TEACHER, "empty": ("pflops",)}
        write_arm(tmp_path / arm, {2: [40 + end], 4: [50 + end], 8: [60 + end]}, **empty)
    assert compare(tmp_path) == 0
    speedup = json.loads((tmp_path / "out" / "budget.json").read_text())["budgets"]["8"]["speedup"]["taught"]
    assert speedup["train_seconds"]["geometric_mean"] == pytest.approx(2.0)
    for axis in ("pflops", "train_seconds_paid"):
        assert (speedup[axis]["geometric_mean"], speedup[axis]["at_least"]) == (None, None)


def test_seconds_of_two_kinds_of_devices_are_left_out(tmp_path, capsys):
    write_arm(tmp_path / "alone", {2: [40], 4: [50]})
    write_arm(tmp_path / "taught", {2: [50], 4: [60]}, teacher=TEACHER)
    other = ENVIRONMENT | {"device": "Xeon, 2 cores"}
    for arm, end in (("alone", 60), ("taught", 70)):
        write_arm(tmp_path / arm, {8: [end]}, environment=other, teacher=TEACHER if arm == "taught" else None)
    assert compare(tmp_path) == 2
    assert "device: 'cpu, 2 cores'" in capsys.readouterr().err
    assert compare(tmp_path, "--allow", "device") == 0
    result = json.loads((tmp_path / "out" / "budget.json").read_text())
    speedup = result["budgets"]["8"]["speedup"]["taught"]
    assert speedup["epoch"]["geometric_mean"] == speedup["pflops"]["geometric_mean"] == pytest.approx(2.0)
    assert not result["timed"] and speedup["train_seconds"]["geometric_mean"] is None
    report = (tmp_path / "out" / "budget.md").read_text()
    assert "with 8 epochs, 2.00x in epochs and 2.00x in PFLOPs." in report and "in train seconds" not in report
    assert "Seconds are left out" in report


def test_a_run_without_a_recorded_length_is_refused(tmp_path, capsys):
    for arm in ("alone", "taught"):
        write_arm(tmp_path / arm, {2: [40], 4: [50]})
    options = tmp_path / "taught" / "4-seed0" / "args.yaml"
    options.write_text(options.read_text().replace("epochs", "num_train_epochs"))
    assert compare(tmp_path) == 2
    assert "records no length of its schedule" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("taught", "options", "message"),
    [
        ({2: [50], 8: [70]}, {}, "alone has budgets of 2, 4 and taught of 2, 8"),
        ({2: [50], 4: [60]}, {"params": 7}, "the runs differ in params"),
        ({2: [50, 51], 4: [60, 61]}, {}, "taught at 2 has the seeds [0, 1], where others have [0]"),
        ({2: [50], 4: [60, 61]}, {}, "taught at 4 has the seeds [0, 1], where others have [0]"),
    ],
)
def test_what_cannot_be_compared_is_refused(taught, options, message, tmp_path, capsys):
    write_arm(tmp_path / "alone", {2: [40], 4: [50]})
    write_arm(tmp_path / "taught", taught, **options)
    assert compare(tmp_path) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_arm_has_one_teacher_and_one_lambda_at_all_lengths(tmp_path, capsys):
    write_arm(tmp_path / "alone", {2: [40], 4: [50]})
    write_arm(tmp_path / "taught", {2: [50], 4: [60]}, teacher=TEACHER)
    options = tmp_path / "taught" / "4-seed0" / "args.yaml"
    options.write_text(options.read_text() + "kd_hold: 3.0\n")  # the window goes with the length
    assert compare(tmp_path) == 0
    options.write_text(options.read_text().replace("kd_weight: 3.0", "kd_weight: 10.0"))
    assert compare(tmp_path) == 2
    assert "the runs of arm taught differ in kd_weight: 3.0 in " in capsys.readouterr().err


def test_a_comparison_at_one_length_points_to_budgets(tmp_path, capsys):
    for arm in ("alone", "taught"):
        write_arm(tmp_path / arm, {2: [40], 4: [50]})
    arms = ("--arm", f"alone={tmp_path}/alone/*", "--arm", f"taught={tmp_path}/taught/*")
    assert main([*arms, "--allow", "epochs", "grid", "lr", "--out", str(tmp_path / "out")]) == 2
    assert "several lengths are compared with --budget" in capsys.readouterr().err


def test_a_run_that_diverged_is_the_worst_and_gives_no_figure(tmp_path):
    write_arm(tmp_path / "alone", {2: [40, 42], 4: [50, 52]})
    write_arm(tmp_path / "taught", {2: [45, 47], 4: [55, math.nan]})
    assert compare(tmp_path) == 0
    four = json.loads((tmp_path / "out" / "budget.json").read_text())["budgets"]["4"]
    assert four["final"]["taught"]["runs"] == [55.0, None] and four["gain"]["taught"]["mean"] is None
    assert four["speedup"]["taught"]["epoch"]["geometric_mean"] is None


def test_one_length_is_no_curve(tmp_path, capsys):
    for arm in ("alone", "taught"):
        write_arm(tmp_path / arm, {4: [50]})
    assert compare(tmp_path) == 2
    assert "give at least two" in capsys.readouterr().err


def test_budgets_have_no_targets(tmp_path, capsys):
    assert compare(tmp_path, "--target", "60") == 2
    assert "--budget compares final metrics" in capsys.readouterr().err
