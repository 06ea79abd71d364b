"""Comparisons of small run folders with numbers worked out by hand."""

import math
import shutil

import numpy as np
import pytest
import scipy.stats
from compare.folders import (
    KD_OFF,
    NAN,
    TEACHER,
    core,
    numbers,
    report_of,
    result_of,
    set_option,
    spoil_summary,
    table,
    write_run,
    write_runs,
)

from w2s.compare.runs import read_run
from w2s.compare.speedup import compare_arms
from w2s.crossing import AXES


def test_speedup_json_holds_crossings_medians_and_ratios(tmp_path, arms):
    result = result_of(tmp_path, *arms)
    assert {key: result[key] for key in ("task", "metric", "mode")} == {
        "task": "classification",
        "metric": "top1",
        "mode": "max",
    }
    assert result["arms"]["treated"] == [{"run": f"w2s-{i}", "seed": i} for i in range(3)]
    entry = result["targets"]["60"]
    assert list(result["targets"]) == ["60"]
    assert list(entry["baseline"]) == list(entry["treated"]) == list(entry["speedup"]) == list(AXES)
    assert core(entry["baseline"]["epoch"]) == {"runs": [3, 5, 4], "median": 4}
    assert core(entry["treated"]["epoch"]) == {"runs": [2, 2, 3], "median": 2}
    # the median run in epochs (the third, 4 epochs of 11 s) is not the median in seconds (the second, 5 of 8 s)
    assert core(entry["baseline"]["train_seconds"]) == {"runs": [30, 40, 44], "median": 40}
    assert core(entry["treated"]["train_seconds"]) == {"runs": [24, 22, 42], "median": 24}
    assert entry["baseline"]["update"]["runs"] == [30, 50, 40]
    assert entry["baseline"]["samples"]["median"] == 400
    assert entry["baseline"]["total_seconds"]["runs"] == [36, 60, 48]
    assert entry["baseline"]["pflops"]["runs"] == [0.75, 1.25, 1.0]
    assert entry["speedup"]["epoch"] == entry["speedup"]["update"] == entry["speedup"]["pflops"] == 2
    assert entry["speedup"]["train_seconds"] == pytest.approx(40 / 24)
    assert entry["lower_bound"] == dict.fromkeys(AXES)


def test_confirmed_needs_two_evaluations_in_a_row(arms):
    confirmed = numbers(*arms)["targets"]["60"]["confirmed"]
    assert core(confirmed["baseline"]["epoch"]) == {
        "runs": [3, None, 4],
        "median": 4,
    }  # the second reaches it at the very end
    assert core(confirmed["treated"]["epoch"]) == {"runs": [2, 4, 3], "median": 3}  # the second falls back


def test_final_and_best(arms):
    result = numbers(*arms)
    assert {arm: core(summary) for arm, summary in result["final"].items()} == {
        "baseline": {"runs": [61, 65, 64], "median": 64},
        "treated": {"runs": [63, 67, 62], "median": 63},
    }
    assert core(result["best"]["baseline"]) == {"runs": [62, 65, 64], "median": 64}
    assert core(result["best"]["treated"]) == {"runs": [63, 70, 64], "median": 64}


def test_a_run_that_never_crosses_counts_as_infinite(tmp_path):
    base = write_runs(tmp_path, "base", [[50, 60, 60], [50, 55, 59], [61, 61, 61]])
    treated = write_runs(tmp_path, "w2s", [[60, 60, 60], [50, 60, 61], [50, 50, 50]])
    entry = numbers(base, treated)["targets"]["60"]
    assert core(entry["baseline"]["epoch"]) == {"runs": [2, None, 1], "median": 2}  # 1, 2, infinity
    assert core(entry["treated"]["epoch"]) == {"runs": [1, 2, None], "median": 2}
    assert entry["speedup"]["epoch"] == 1
    assert entry["lower_bound"]["epoch"] is None


def test_a_censored_baseline_median_gives_a_lower_bound(tmp_path):
    base = write_runs(tmp_path, "base", [[50, 55, 59, 60], [50, 55, 59, 59], [1, 2, 3, 4]], (10.0, 10.0, 20.0))
    treated = write_runs(tmp_path, "w2s", [[60, 60, 60, 60], [50, 60, 61, 61], [50, 61, 61, 61]], (15.0, 15.0, 15.0))
    entry = result_of(tmp_path, base, treated)["targets"]["60"]
    assert core(entry["baseline"]["epoch"]) == {"runs": [4, None, None], "median": None}
    assert entry["speedup"] == dict.fromkeys(AXES)
    assert entry["lower_bound"]["epoch"] == 2  # last evaluation 4, treated median 2
    assert entry["lower_bound"]["train_seconds"] == pytest.approx(40 / 30)  # ends at 40, 40, 80; treated 15, 30, 30
    report = report_of(tmp_path)
    assert "Speedup: > 2.00x in epochs" in report
    assert "> 1.33x in train seconds" in report
    rows = table(report, "first@60")
    assert rows[0] == ["first, epochs", "baseline", "4, > 4, > 4", "> 4", "4 to > 4"]
    assert rows[4] == ["first, train seconds", "baseline", "40, > 40, > 80", "> 40", "40 to > 80"]


def test_the_lower_bound_of_two_runs_counts_the_one_that_crossed(tmp_path):
    """One baseline run crosses at 2, one not within 10: the median is at least (2 + 10) / 2 = 6, not 10."""
    base = write_runs(tmp_path, "base", [[50, 60] + [61] * 8, [50] * 10])
    treated = write_runs(tmp_path, "w2s", [[50, 60] + [61] * 8, [50, 50, 50, 60] + [61] * 6])
    entry = numbers(base, treated)["targets"]["60"]
    assert core(entry["baseline"]["epoch"]) == {"runs": [2, None], "median": None}
    assert entry["treated"]["epoch"]["median"] == 3
    assert entry["lower_bound"]["epoch"] == 2


def test_nothing_is_claimed_where_the_treated_runs_do_not_cross(tmp_path):
    base = write_runs(tmp_path, "base", [[50, 60]])
    treated = write_runs(tmp_path, "w2s", [[50, 59]])
    result = result_of(tmp_path, base, treated, "--target", 60, 70)  # at 70 neither does
    for tau in ("60", "70"):
        assert core(result["targets"][tau]["treated"]["epoch"]) == {"runs": [None], "median": None}
        assert result["targets"][tau]["speedup"] == result["targets"][tau]["lower_bound"] == dict.fromkeys(AXES)
    assert report_of(tmp_path).count("Speedup: not defined.") == 2


def test_lower_is_better(tmp_path):
    facts = {"mode": "min", "metric": "fd512", "targets": (15.0, 8.0), "step": 0.25}
    base = write_runs(tmp_path, "base", [[60, 15, 9, 8.5], [50, 16, 14, 8], [70, 14, 12, 7]], **facts)
    treated = write_runs(tmp_path, "w2s", [[15, 9, 8, 9], [14, 8, 7, 6], [13, 12, 8, 7]], **facts)
    result = result_of(tmp_path, base, treated)
    assert list(result["targets"]) == ["15", "8"]  # the easier one first
    assert core(result["targets"]["15"]["baseline"]["epoch"]) == {"runs": [0.5, 0.75, 0.5], "median": 0.5}
    assert result["targets"]["15"]["treated"]["epoch"]["runs"] == [0.25, 0.25, 0.25]
    assert result["targets"]["15"]["speedup"]["epoch"] == 2
    assert core(result["targets"]["8"]["baseline"]["epoch"]) == {"runs": [None, 1, 1], "median": 1}
    assert core(result["targets"]["8"]["treated"]["epoch"]) == {"runs": [0.75, 0.5, 0.75], "median": 0.75}
    assert core(result["best"]["treated"]) == {"runs": [8, 6, 7], "median": 7}
    assert result["final"]["baseline"]["median"] == 8
    assert "first evaluation with fd512 <= tau" in report_of(tmp_path)


@pytest.mark.parametrize(("mode", "values"), [("max", [60, 61, 70]), ("min", [60, 59, 50])])
def test_a_diverged_run_is_the_worst_not_absent(tmp_path, mode, values):
    curves = [[50 if mode == "max" else 70, value] for value in values]
    base = write_runs(tmp_path, "base", curves, mode=mode)
    treated = write_runs(tmp_path, "w2s", [*curves[:2], [NAN, NAN]], mode=mode)
    result = numbers(base, treated)
    assert result["final"]["baseline"]["median"] == values[1]
    assert core(result["final"]["treated"]) == {"runs": [values[0], values[1], None], "median": values[0]}
    assert core(result["best"]["treated"]) == {"runs": [values[0], values[1], None], "median": values[0]}


def test_an_axis_that_was_not_recorded_is_null_and_gives_no_ratio(tmp_path):
    base = write_runs(tmp_path, "base", [[50, 60]], empty=("pflops",))
    treated = write_runs(tmp_path, "w2s", [[60, 60]])
    entry = numbers(base, treated)["targets"]["60"]
    assert core(entry["baseline"]["pflops"]) == {"runs": [None], "median": None}
    assert core(entry["treated"]["pflops"]) == {"runs": [0.25], "median": 0.25}
    assert entry["speedup"]["epoch"] == 2
    assert entry["speedup"]["pflops"] is None
    assert entry["lower_bound"]["pflops"] is None


def test_compare_is_a_function_of_runs_and_names_its_arms_as_given(arms):
    before, after = [read_run(folder) for folder in arms[0]], [read_run(folder) for folder in arms[1]]
    result = compare_arms({"plain": before, "resnet10t": after}, [60.0])
    assert result["targets"]["60"]["plain"]["epoch"]["median"] == 4
    assert result["targets"]["60"]["speedup"]["epoch"] == 2
    back = compare_arms({"resnet10t": after, "plain": before}, [60.0])
    assert back["targets"]["60"]["speedup"]["epoch"] == 0.5  # the first arm is the reference


def test_runs_are_paired_by_seed_whatever_their_order(arms):
    base, treated = arms
    there = numbers(base, treated)["targets"]["60"]["versus"]["treated"]["epoch"]
    back = numbers(base, treated[::-1])["targets"]["60"]["versus"]["treated"]["epoch"]
    assert there["ratios"] == pytest.approx([3 / 2, 5 / 2, 4 / 3])
    assert sorted(back["ratios"]) == pytest.approx(sorted(there["ratios"]))
    assert there["geometric_mean"] == back["geometric_mean"] == pytest.approx(5 ** (1 / 3))
    low, high = scipy.stats.ttest_1samp(np.log(there["ratios"]), 0).confidence_interval(0.95)
    assert there["interval"] == pytest.approx([math.exp(low), math.exp(high)])
    assert there["p"] == 0.25  # all 3 pairs agree: 2 of 8 patterns of signs
    assert there["resolution"] == pytest.approx(
        [(2 * 4 * 3 / 2 / 2 / 3) ** (1 / 3), (3 * 5 * 4 / 1 / 1 / 2) ** (1 / 3)]
    )


def test_pairs_all_alike_have_no_interval_but_the_bounds_of_the_grid(tmp_path):
    base = write_runs(tmp_path, "base", [[1, 2, 3, 60]] * 3)
    treated = write_runs(tmp_path, "w2s", [[1, 2, 60, 60]] * 3)
    versus = result_of(tmp_path, base, treated)["targets"]["60"]["versus"]["treated"]["epoch"]
    assert (versus["geometric_mean"], versus["interval"]) == (pytest.approx(4 / 3), None)
    assert versus["resolution"] == pytest.approx([1, 2])
    assert "no interval: one pair, or all pairs alike" in report_of(tmp_path)


def test_censored_pairs_bound_the_mean_and_still_have_a_p_value(tmp_path):
    base = write_runs(tmp_path, "base", [[50, 60, 61, 61], [50, 50, 50, 50], [50, 50, 50, 60]])
    treated = write_runs(tmp_path, "w2s", [[60, 60, 60, 60], [50, 60, 60, 60], [50, 60, 60, 60]])
    versus = numbers(base, treated)["targets"]["60"]["versus"]["treated"]["epoch"]
    assert versus["ratios"] == [pytest.approx(2), None, pytest.approx(2)]
    assert versus["geometric_mean"] is versus["interval"] is versus["resolution"] is None
    assert versus["geometric_mean_lower_bound"] == pytest.approx(2)  # 2/1, more than 4/2, 4/2
    assert versus["p"] == 0.25


def test_gain_in_the_final_metric_and_its_verdict(tmp_path, arms):
    gain = result_of(tmp_path, *arms, "--margin", 6)["gain"]["treated"]
    assert gain["final"]["mean"] == pytest.approx((2 + 2 - 2) / 3)
    expected = scipy.stats.ttest_1samp([2, 2, -2], 0).confidence_interval(0.95)
    assert gain["final"]["interval"] == pytest.approx(list(expected))
    assert gain["final"]["verdict"] == "non-inferior"  # -5.1 to 6.4; a margin of 5 would leave it open
    assert gain["best"]["p"] == 0.5  # gains of 1, 5 and 0


def test_a_gain_is_positive_where_lower_is_better_and_lower(tmp_path):
    base = write_runs(tmp_path, "base", [[9], [8], [7]], mode="min", targets=(10.0,))
    treated = write_runs(tmp_path, "w2s", [[7], [7], [6]], mode="min", targets=(10.0,))
    assert numbers(base, treated)["gain"]["treated"]["final"]["mean"] == pytest.approx(4 / 3)


def test_the_teachers_training_is_in_the_bill_where_its_run_is_beside(tmp_path):
    flops = {"student_update": 100, "teacher_forward": 25}
    write_run(tmp_path / "old", [40, 50], seconds=6.0)
    teacher = TEACHER | {"checkpoint": "output/old/model"}
    base = write_runs(tmp_path, "base", [[1, 2, 3, 60]], flops=flops)
    treated = write_runs(tmp_path, "w2s", [[1, 60, 60, 60]], teacher=teacher, kd_off=KD_OFF, flops=flops)
    result = result_of(tmp_path, base, treated)
    costs, versus = result["costs"]["treated"], result["targets"]["60"]["versus"]["treated"]
    assert costs["teacher_training"] == {"run": "old", "train_seconds": 12, "total_seconds": 24, "pflops": 0.5}
    assert costs["flops_bound"] == 1.25
    assert costs["overhead"] == [pytest.approx(1 / 0.9)]
    assert versus["train_seconds"]["speedup_with_teacher"] == pytest.approx(40 / (20 + 12))
    assert versus["train_seconds"]["paid_back_after"] == 1  # 12 s against 20 s saved
    assert versus["total_seconds"]["paid_back_after"] == 1
    assert "speedup_with_teacher" not in versus["epoch"]
    assert "the teacher's own training (old) took 12 train seconds" in report_of(tmp_path)


def test_the_training_of_all_teachers_that_taught_is_in_the_bill_each_once(tmp_path):
    """The middle one taught in seed 1 only, the last one in none."""
    flops = {"student_update": 100, "teacher_forward": 25}
    for name, seconds in (("weak", 1.0), ("mid", 10.0), ("strong", 100.0)):
        write_run(tmp_path / name, [40, 50], seconds=seconds)
    base = write_runs(tmp_path, "base", [[1, 2, 3, 60]] * 2, flops=flops)
    specs = ["x/weak", "x/mid", "x/strong"]
    treated = []
    for seed, updates in enumerate([(10, 0), (10, 10)]):
        rungs = []
        for spec, count in zip(specs, updates, strict=False):
            rung = TEACHER | {"checkpoint": f"{spec}/model", "since": {"epoch": 0.0, "update": 0}, "off": KD_OFF}
            rungs.append(rung | {"updates": count, "seconds": 1.0, "pflops": count * 50 / 1e15})
        facts = {"teacher": rungs[-1], "teachers": rungs, "kd_off": KD_OFF, "flops": flops, "seed": seed}
        options = {"teacher": specs}
        treated.append(write_run(tmp_path / f"w2s-{seed}", [1, 60, 60, 60], options=options, **facts))
    costs = result_of(tmp_path, base, treated)["costs"]["treated"]
    assert costs["teacher_training"] == {"run": "weak, mid", "train_seconds": 22, "total_seconds": 48, "pflops": 1.0}
    assert costs["flops_bound"] == 1.5, "of the updates that were taught"
    set_option(treated[1], teacher=["x/weak", "x/strong", "x/mid"])
    with pytest.raises(ValueError, match="arm treated differ in teachers"):
        numbers(base, treated)


def test_a_teacher_that_is_not_at_hand_leaves_the_bill_open(arms, tmp_path):
    result = result_of(tmp_path, *arms)
    assert result["costs"]["treated"]["teacher_training"] is None
    assert "speedup_with_teacher" not in result["targets"]["60"]["versus"]["treated"]["train_seconds"]
    assert "not in the bill: its run folder is not at hand" in report_of(tmp_path)


def test_the_teacher_of_the_reference_is_paid_too(tmp_path):
    teachers = {}
    for name, seconds in (("old", 6.0), ("new", 9.0)):
        write_run(tmp_path / name, [40, 50], seconds=seconds)
        teachers[name] = TEACHER | {"checkpoint": f"output/{name}/model"}
    base = write_runs(tmp_path, "base", [[1, 2, 3, 60]], teacher=teachers["old"], kd_off=KD_OFF)
    treated = write_runs(tmp_path, "w2s", [[1, 60, 60, 60]], teacher=teachers["new"], kd_off=KD_OFF)
    versus = result_of(tmp_path, base, treated)["targets"]["60"]["versus"]["treated"]["train_seconds"]
    assert versus["speedup_with_teacher"] == pytest.approx((40 + 12) / (20 + 18))
    assert versus["paid_back_after"] is None, "its training is no price for doing without the other"
    shutil.rmtree(tmp_path / "old")
    versus = numbers(base, treated)["targets"]["60"]["versus"]["treated"]["train_seconds"]
    assert versus["speedup_with_teacher"] is None


def test_a_teacher_that_was_stopped_early_is_paid_up_to_there(tmp_path):
    spoil_summary(write_run(tmp_path / "old", [40, 50], seconds=6.0), status="preempted")
    base = write_runs(tmp_path, "base", [[1, 2, 3, 60]])
    teacher = TEACHER | {"checkpoint": "output/old/best"}
    treated = write_runs(tmp_path, "w2s", [[1, 60, 60, 60]], teacher=teacher, kd_off=KD_OFF)
    assert numbers(base, treated)["costs"]["treated"]["teacher_training"]["train_seconds"] == 12
