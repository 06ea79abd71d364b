"""Comparisons of small run folders with numbers worked out by hand; the files; every refusal."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
import yaml
from compare.folders import (
    BASELINE,
    FILES,
    KD_OFF,
    NAN,
    TEACHER,
    TREATED,
    command,
    report_of,
    result_of,
    spoil_summary,
    write_run,
    write_runs,
)

from w2s.compare.__main__ import main
from w2s.compare.comparable import choose_targets
from w2s.compare.runs import read_run
from w2s.compare.speedup import compare_arms
from w2s.crossing import AXES

ROOT = Path(__file__).parents[2]


def numbers(baseline: list[Path], treated: list[Path]) -> dict:
    """The same from the library, without the drawing."""
    arms = {"baseline": [read_run(folder) for folder in baseline], "treated": [read_run(folder) for folder in treated]}
    result = compare_arms(arms, choose_targets(arms["baseline"] + arms["treated"]))
    return json.loads(json.dumps(result, allow_nan=False))


def core(summary: dict) -> dict:
    """The runs and the median of a summary."""
    return {"runs": summary["runs"], "median": summary["median"]}


def table(text: str, heading: str) -> list[list[str]]:
    """The rows of the first Markdown table under a heading or in a fold of this title, header and rule left out."""
    marks = [mark for mark in (f"## {heading}\n", f"<summary>{heading}</summary>\n") if mark in text]
    lines = text.split(marks[0])[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.fixture
def arms(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    """Three runs an arm; train seconds between evaluations 10, 8, 11 and 12, 11, 14."""
    return (
        write_runs(tmp_path, "base", BASELINE, (10.0, 8.0, 11.0)),
        write_runs(tmp_path, "w2s", TREATED, (12.0, 11.0, 14.0), teacher=TEACHER, kd_off=KD_OFF),
    )


# --- the numbers -----------------------------------------------------------------------------------------------------


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


def test_targets_that_differ_are_allowed_only_on_demand(tmp_path, capsys):
    base = write_runs(tmp_path, "base", [[50, 60]], targets=(55.0, 60.0))
    treated = write_runs(tmp_path, "w2s", [[60, 62]], targets=(52.5, 60.0))
    words = command(base, treated, tmp_path / "out")
    check_refused(tmp_path, capsys, words, "differ in target: [55.0, 60.0] in ", "--allow target")
    assert list(result_of(tmp_path, base, treated, "--allow", "target")["targets"]) == ["52.5", "55", "60"]
    assert "Differs by leave of --allow: target: [55.0, 60.0]" in report_of(tmp_path)


def test_target_overrides_and_the_report_says_so(tmp_path, arms):
    result = result_of(tmp_path, *arms, "--target", "62.0", "60", "60.0")
    assert list(result["targets"]) == ["60", "62"]
    assert result["targets"]["62"]["baseline"]["epoch"]["runs"] == [4, 5, 4]
    titles = re.findall("<summary>(first@.*)</summary>", report_of(tmp_path))
    assert titles == ["first@60", "first@62 (not among the targets of every run)"]


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


# --- the files -------------------------------------------------------------------------------------------------------


def test_the_command_writes_its_files_and_prints_the_verdict_and_one_table(tmp_path, arms):
    words = [sys.executable, "-m", "w2s.compare", *command(*arms, tmp_path / "deep" / "out")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "deep" / "out"
    assert sorted(path.name for path in out.iterdir()) == FILES
    report = (out / "report.md").read_text()
    said, headline, paths = done.stdout.strip().split("\n\n")
    assert report.split("\n\n")[1:3] == [f"**{said}**", "![curves](curves.png)"]
    assert headline in report
    assert table(report, "Speedup") == [
        ["60", "4", "2", "1.71x (0.75 to 3.92)", "1.34x (0.66 to 2.69)", "1.71x (0.75 to 3.92)", "n/a"]
    ]
    assert paths.splitlines() == [
        str(out / name) for name in ("speedup.json", "report.md", "report.html", "curves.png")
    ]
    assert table(report, "first@60") == [
        ["first, epochs", "baseline", "3, 5, 4", "4", "3 to 5"],
        ["first, epochs", "treated", "2, 2, 3", "2", "2 to 3"],
        ["confirmed, epochs", "baseline", "3, > 5, 4", "4", "3 to > 5"],
        ["confirmed, epochs", "treated", "2, 4, 3", "3", "2 to 4"],
        ["first, train seconds", "baseline", "30, 40, 44", "40", "30 to 44"],
        ["first, train seconds", "treated", "24, 22, 42", "24", "22 to 42"],
        ["confirmed, train seconds", "baseline", "30, > 40, 44", "44", "30 to > 40"],
        ["confirmed, train seconds", "treated", "24, 44, 42", "42", "24 to 44"],
    ]
    assert table(report, "Final and best top1") == [
        ["final", "baseline", "61, 65, 64", "64", "61 to 65"],
        ["final", "treated", "63, 67, 62", "63", "62 to 67"],
        ["best", "baseline", "62, 65, 64", "64", "62 to 65"],
        ["best", "treated", "63, 70, 64", "64", "63 to 70"],
    ]
    assert "Speedup: 2.00x in epochs, 2.00x in updates, 2.00x in samples, 1.67x in train seconds" in report


def test_the_report_states_rule_and_conditions(tmp_path, arms):
    result_of(tmp_path, *arms)
    report = report_of(tmp_path)
    for text in (
        "first evaluation with top1 >= tau",
        "- baseline: 3 runs, seeds 0, 1, 2\n",
        "- Grid: 5 evaluations a run; step, and so resolution: 1 epochs\n",
        "- Hardware and software: torch 2.11.0, device cpu, 2 cores, processes 1\n",
        "- w2s-1: teacher resnet10t, 4922416 parameters, top1 68.25 on the switch split and 67.5 on the reporting "
        "split; 10.0% of train seconds; switched off at epoch 2 (surpass); an update with the teacher took 1.11x of "
        "one without\n",
    ):
        assert text in report
    assert report.count("switched off") == 3


def test_the_report_names_hardware_that_differs_and_a_teacher_that_stays(tmp_path, capsys):
    base = write_runs(tmp_path, "base", [[50, 60]], environment={"device": "H200"})
    treated = write_runs(tmp_path, "w2s", [[60, 60]], teacher=TEACHER, environment=None)
    check_refused(tmp_path, capsys, command(base, treated, tmp_path / "out"), "device: 'H200' in ", "None in ")
    result_of(tmp_path, base, treated, "--allow", "device")
    report = report_of(tmp_path)
    assert "- Hardware and software, not the same for all runs: device H200; hardware not recorded\n" in report
    assert "never switched off" in report


def near(image: np.ndarray, colour: str) -> np.ndarray:
    """Which pixels of an image (height, width, channels in 0-1) have a colour, given as #RRGGBB."""
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return (np.abs(image[..., :3] - wanted) < 0.02).all(axis=-1)


def test_the_curves_are_drawn(tmp_path, arms, drawing):
    result_of(tmp_path, *arms)
    image = matplotlib.image.imread(tmp_path / "out" / "curves.png")
    height, width = image.shape[:2]
    assert width >= 1200
    assert height >= 500
    for colour in ("#0072B2", "#D55E00"):
        drawn = near(image, colour)
        assert drawn[:, : width // 2].sum() > 500  # over epochs
        assert drawn[:, width // 2 :].sum() > 500  # over train seconds


def test_curves_with_gaps_and_of_a_single_evaluation_are_drawn(tmp_path, drawing):
    base = write_runs(tmp_path, "base", [[NAN]], empty=("train_seconds", "teacher_seconds"))
    treated = write_runs(tmp_path, "w2s", [[61]], teacher=TEACHER, kd_off=KD_OFF | {"epoch": 0.5, "reason": "window"})
    result_of(tmp_path, base, treated)
    image = matplotlib.image.imread(tmp_path / "out" / "curves.png")
    assert near(image, "#D55E00").sum() > 50


def test_a_second_comparison_takes_the_place_of_the_first(tmp_path, arms):
    result_of(tmp_path, *arms)
    result_of(tmp_path, *arms, "--target", 62)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert "first@60" not in (tmp_path / "out" / "report.md").read_text()


# --- refusals --------------------------------------------------------------------------------------------------------


def set_option(folder: Path, **options: object) -> None:
    known = yaml.safe_load((folder / "args.yaml").read_text())
    (folder / "args.yaml").write_text(yaml.safe_dump(known | options))


def drop_rows(folder: Path, keep: int) -> None:
    lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    (folder / "metrics.csv").write_text("".join(lines[: keep + 1]))


def in_csv(old: str, new: str):
    def change(folder: Path) -> None:
        text = (folder / "metrics.csv").read_text()
        assert old in text
        (folder / "metrics.csv").write_text(text.replace(old, new, 1))

    return change


REFUSALS = {
    "no metrics": (lambda run: (run / "metrics.csv").unlink(), "metrics.csv does not exist"),
    "no summary": (lambda run: (run / "summary.json").unlink(), "summary.json does not exist"),
    "bad json": (
        lambda run: (run / "summary.json").write_text('{"task": '),
        "summary.json is not JSON: Expecting value",
    ),
    "json list": (lambda run: (run / "summary.json").write_text("[]"), "summary.json: 'task' is missing or malformed"),
    "no key": (lambda run: spoil_summary(run, targets=None), "summary.json: 'targets' is missing or malformed"),
    "bad teacher": (lambda run: spoil_summary(run, teacher="r18"), "summary.json: 'teacher' is missing or malformed"),
    "bad mode": (lambda run: spoil_summary(run, mode="most"), "'mode' is neither max nor min"),
    "unfinished": (
        lambda run: spoil_summary(run, status="preempted"),
        "is not a finished run: its status is 'preempted'",
    ),
    "bad cell": (in_csv("62", "sixty"), "metrics.csv line 5: could not convert string to float: 'sixty'"),
    "cut line": (in_csv("5.0,50,", "5.0\n"), "metrics.csv line 6: 1 cells where the header has 16"),
    "binary": (lambda run: (run / "metrics.csv").write_bytes(b"\x89PNG\xff"), "metrics.csv is no CSV file"),
    "no rows": (lambda run: drop_rows(run, 0), "metrics.csv has no rows"),
    "empty file": (lambda run: (run / "metrics.csv").write_text(""), "metrics.csv is empty"),
    "no column": (in_csv("top1", "top5"), "metrics.csv has no column 'top1'"),
    "no epoch": (in_csv("5.0,50,", ",50,"), "metrics.csv has a row without epoch or update"),
    "task": (lambda run: spoil_summary(run, task="detection"), "differ in task: 'detection' in "),
    "mode": (lambda run: spoil_summary(run, mode="min"), "disagree in best (50.0, 62): edited by hand?"),
    "no options": (lambda run: (run / "args.yaml").unlink(), "args.yaml does not exist"),
    "bad options": (lambda run: (run / "args.yaml").write_text("[1"), "args.yaml is no valid YAML: "),
    "options list": (lambda run: (run / "args.yaml").write_text("- 1"), "args.yaml holds no options"),
    "edited metric": (in_csv(",60,", ",59,"), "disagree in first@60 (epoch 4.0, 62.0, epoch 3.0, 60): edited by"),
    "edited time": (in_csv(",30.0,36.0,", ",20.0,36.0,"), "disagree in first@60"),
    "edited summary": (lambda run: spoil_summary(run, best=90.0), "disagree in best (62.0, 90.0): edited by hand?"),
    "seed twice": (lambda run: spoil_summary(run, seed=1), "arm baseline has seed 1 twice"),
    "no seed": (lambda run: spoil_summary(run, seed=None), "arm baseline has no seed"),
    "other lr": (lambda run: set_option(run, lr=0.2), "the runs differ in lr: 0.2 in "),
    "another option": (lambda run: set_option(run, mixup=0.2), "the runs differ in mixup: 0.2 in "),
    "other weights": (lambda run: spoil_summary(run, weights="ema"), "the runs differ in weights: 'ema' in "),
    "other data": (lambda run: spoil_summary(run, data={"train": 9}), "the runs differ in data: {'train': 9} in "),
    "within an arm": (lambda run: set_option(run, kd_weight=1.0), "runs of arm baseline differ in kd_weight: 1.0 in "),
    "shorter": (lambda run: drop_rows(run, 4), "disagree in last (62.0, 61): edited by hand?"),
    "other epochs": (in_csv("5.0,50,", "5.5,50,"), "differ in the epochs of their evaluations: "),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSALS.values(), ids=REFUSALS)
def test_bad_runs_are_refused_with_one_line(tmp_path, arms, capsys, spoil, message):
    spoil(arms[0][0])
    check_refused(tmp_path, capsys, command(*arms, tmp_path / "out"), message, "base-0")


def check_refused(tmp_path: Path, capsys, words: list[str], *parts: str) -> None:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    for part in parts:
        assert part in printed.err
    assert not (tmp_path / "out").exists()


def test_runs_with_different_metrics_are_refused(tmp_path, arms, capsys):
    other = write_run(tmp_path / "other", BASELINE[0], metric="ap50")
    check_refused(
        tmp_path, capsys, command(arms[0], [other], tmp_path / "out"), "metric: 'top1' in ", "'ap50' in ", "other"
    )


def test_a_folder_that_is_missing_or_given_twice_is_refused(tmp_path, arms, capsys):
    base, treated = arms
    check_refused(
        tmp_path, capsys, command([*base, tmp_path / "gone"], treated, tmp_path / "out"), "gone: no such folder"
    )
    other_spelling = base[1].parent / "base-0" / ".." / "base-1"
    check_refused(tmp_path, capsys, command(base, [other_spelling], tmp_path / "out"), "base-1 is given twice")
    check_refused(tmp_path, capsys, command([base[0], base[0]], treated, tmp_path / "out"), "base-0 is given twice")


def test_bad_targets_are_refused(tmp_path, arms, capsys):
    words = command(*arms, tmp_path / "out", "--target")
    check_refused(tmp_path, capsys, [*words, "60", "high"], "--target", "'high'")
    check_refused(tmp_path, capsys, [*words, "nan"], "target not finite: nan")
    for folder in (*arms[0], *arms[1]):
        spoil_summary(folder, targets={})
    check_refused(tmp_path, capsys, command(*arms, tmp_path / "out"), "no targets", "--target")


def test_an_out_that_is_a_file_is_refused(tmp_path, arms, capsys):
    (tmp_path / "file").write_text("mine")
    check_refused(tmp_path, capsys, command(*arms, tmp_path / "file"), "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_command_exits_with_2_and_one_line(tmp_path, arms):
    spoil_summary(arms[1][2], status="running")
    words = [sys.executable, "-m", "w2s.compare", *command(*arms, tmp_path / "out")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {arms[1][2]} is not a finished run: its status is 'running'\n"
    assert not (tmp_path / "out").exists()


# --- arms, pairs and doubt -------------------------------------------------------------------------------------------


def test_arms_are_named_groups_found_by_a_pattern_and_the_first_is_the_reference(tmp_path, arms):
    write_runs(tmp_path, "off", TREATED[::-1], (10.0, 10.0, 10.0))
    words = [f"--arm={name}={tmp_path}/{pattern}" for name, pattern in (("w2s", "w2s-*"), ("alone", "base-?"))]
    assert main([*words, f"--arm=shuffled={tmp_path}/off-*", "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "speedup.json").read_text())
    entry = result["targets"]["60"]
    assert list(result["arms"]) == ["w2s", "alone", "shuffled"]
    assert list(entry["versus"]) == list(result["gain"]) == ["alone", "shuffled"]
    assert core(entry["shuffled"]["epoch"]) == {"runs": [3, 2, 2], "median": 2}
    assert entry["versus"]["alone"]["epoch"]["speedup"] == entry["speedup"]["epoch"] == 0.5
    assert entry["versus"]["shuffled"]["epoch"]["ratios"] == pytest.approx([2 / 3, 1, 3 / 2])


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


def test_a_teacher_that_is_not_at_hand_leaves_the_bill_open(arms, tmp_path):
    result = result_of(tmp_path, *arms)
    assert result["costs"]["treated"]["teacher_training"] is None
    assert "speedup_with_teacher" not in result["targets"]["60"]["versus"]["treated"]["train_seconds"]
    assert "not in the bill: its run folder is not at hand" in report_of(tmp_path)


def test_missing_seeds_are_refused_or_allowed(tmp_path, arms, capsys):
    words = command(arms[0], arms[1][:2], tmp_path / "out")
    check_refused(tmp_path, capsys, words, "the runs differ in seeds: treated has no run of seed 2", "--allow seeds")
    assert main([*words, "--allow", "seeds"]) == 0
    entry = json.loads((tmp_path / "out" / "speedup.json").read_text())["targets"]["60"]
    assert entry["baseline"]["epoch"]["runs"] == [3, 5, 4]  # medians over all
    assert entry["versus"]["treated"]["epoch"]["ratios"] == pytest.approx([3 / 2, 5 / 2])  # pairs of those in common


def test_what_differs_is_named_and_allowed_by_name_only(tmp_path, arms, capsys):
    for folder in arms[1]:
        set_option(folder, lr=0.2, batch_size=20)
    words = command(*arms, tmp_path / "out")
    check_refused(
        tmp_path, capsys, words, "differ in batch_size: 10 in ", "20 in ", "(and in lr)", "--allow batch_size"
    )
    check_refused(tmp_path, capsys, [*words, "--allow", "lr"], "differ in batch_size")
    check_refused(tmp_path, capsys, [*words, "--allow", "metric"], "--allow metric: not a setting that may differ")
    check_refused(tmp_path, capsys, [*words, "--allow", "batch-sizes"], "may differ, try batch_size")
    assert main([*words, "--allow", "lr", "batch-size"]) == 0
    report = report_of(tmp_path)
    assert "- Differs by leave of --allow: batch_size: 10 in " in report
    assert "- Differs by leave of --allow: lr: 0.1 in " in report


def test_another_schedule_length_needs_leave_for_its_grid_too(tmp_path, capsys):
    long = write_runs(tmp_path, "long", [[1, 2, 3, 60]] * 2)
    short = write_runs(tmp_path, "short", [[2, 60]] * 2, options={"epochs": 2})
    words = command(long, short, tmp_path / "out")
    check_refused(tmp_path, capsys, words, "differ in epochs: 5 in ", "(and in grid)", "--allow epochs grid")
    assert main([*words, "--allow", "epochs", "grid"]) == 0


def test_arms_that_cannot_be_told_apart_or_found_are_refused(tmp_path, arms, capsys):
    out = ["--out", str(tmp_path / "out")]
    for words, message in (
        (["--baseline", str(arms[0][0])], "give --baseline RUN... and --treated RUN..., or --arm"),
        ([f"--arm=a={tmp_path}/base-*"], "one arm alone"),
        ([f"--arm=a={tmp_path}/base-*", f"--arm=b={tmp_path}/none-*"], "none-*: no such folder"),
        ([f"--arm=a={tmp_path}/base-*", f"--arm=speedup={tmp_path}/w2s-*"], "speedup is not a free name"),
        ([f"--arm=a={tmp_path}/base-*", f"--arm=b={tmp_path}/base-0"], "base-0 is given twice"),
        (["--arm", "w2s-*"], "takes NAME=GLOB"),
    ):
        check_refused(tmp_path, capsys, [*words, *out], message)


def test_the_comparison_is_logged_as_a_run_of_its_own(tmp_path, arms, drawing):
    result_of(tmp_path, *arms, "--log-with", "wandb", "--group", "digits-group")
    logged = b"".join(path.read_bytes() for path in (tmp_path / "out").glob("wandb/offline-run-*/run-*.wandb"))
    for text in (b"speedup@60/treated/epoch", b"digits-group", b"curves", b"report", b"speedups"):
        assert text in logged


def test_speedup_against_the_strength_of_the_teacher(tmp_path, drawing, capsys):
    """The reference ends at 62 in the median; teachers of 67.5 and 55; the weaker one helps less."""
    alone = write_runs(tmp_path, "alone", BASELINE)
    for name, curves, report in (("strong", TREATED, 67.5), ("weak", BASELINE, 55.0)):
        write_runs(tmp_path, name, curves, teacher=TEACHER | {"report": report})
    middle = sorted(curve[-1] for curve in BASELINE)[1]
    words = [f"--arm={name}={tmp_path}/{name}-*" for name in ("alone", "strong", "weak")]
    assert main([*words, "--strength", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "speedup.json").read_text())
    assert [(point["arm"], point["gap"]) for point in found["strength"]] == [
        ("strong", middle - 67.5),
        ("weak", middle - 55.0),
    ]
    for point in found["strength"]:
        versus = found["targets"]["60"]["versus"][point["arm"]]["epoch"]
        assert point["speedup"]["60"]["epoch"]["value"] == versus["geometric_mean"]
        assert point["speedup"]["60"]["epoch"]["interval"] == versus["interval"]
    assert found["strength"][1]["speedup"]["60"]["epoch"]["value"] == pytest.approx(1)
    image = matplotlib.image.imread(tmp_path / "out" / "strength.png")
    assert near(image, "#1f77b4").any()  # matplotlib's first colour
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Speedup against the teacher's strength" in text and "![strength](strength.png)" in text
    assert "strength" in (tmp_path / "out" / "report.html").read_text()

    capsys.readouterr()
    check_one = [*words[:2], "--strength", "--out", str(tmp_path / "other")]
    assert main(check_one) == 2
    assert "at least two arms with a teacher" in capsys.readouterr().err
    assert len(alone) == 3 and not (tmp_path / "other").exists()


def test_arms_may_differ_in_their_control_but_an_arm_may_not(tmp_path, arms, capsys):
    for folder in arms[1][1:]:  # the first is as a run from before there were controls
        set_option(folder, kd_control="shuffled")
    message = "the runs of arm treated differ in kd_control: None in "
    check_refused(tmp_path, capsys, command(*arms, tmp_path / "out"), message)
    set_option(arms[1][0], kd_control="shuffled")
    assert main(command(*arms, tmp_path / "out")) == 0
    assert re.search(r"\| kd_control +\| none +\| shuffled +\|", report_of(tmp_path))
