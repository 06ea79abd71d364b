"""What may differ between the runs of a comparison, and what may not."""

import json
import re

import pytest
from compare.folders import (
    BASELINE,
    TEACHER,
    check_refused,
    command,
    numbers,
    report_of,
    result_of,
    set_option,
    spoil_summary,
    write_run,
    write_runs,
)

from w2s.compare.__main__ import main


def test_runs_with_different_metrics_are_refused(tmp_path, arms, capsys):
    other = write_run(tmp_path / "other", BASELINE[0], metric="ap50")
    check_refused(
        tmp_path, capsys, command(arms[0], [other], tmp_path / "out"), "metric: 'top1' in ", "'ap50' in ", "other"
    )


def test_targets_that_differ_are_allowed_only_on_demand(tmp_path, capsys):
    base = write_runs(tmp_path, "base", [[50, 60]], targets=(55.0, 60.0))
    treated = write_runs(tmp_path, "w2s", [[60, 62]], targets=(52.5, 60.0))
    words = command(base, treated, tmp_path / "out")
    check_refused(tmp_path, capsys, words, "differ in target: [55.0, 60.0] in ", "--allow target")
    assert list(result_of(tmp_path, base, treated, "--allow", "target")["targets"]) == ["52.5", "55", "60"]
    assert "Differs by leave of --allow: target: [55.0, 60.0]" in report_of(tmp_path)


def test_bad_targets_are_refused(tmp_path, arms, capsys):
    words = command(*arms, tmp_path / "out", "--target")
    check_refused(tmp_path, capsys, [*words, "60", "high"], "--target", "'high'")
    check_refused(tmp_path, capsys, [*words, "nan"], "target not finite: nan")
    check_refused(tmp_path, capsys, [*words, "0.6"], "0.6 percent? Write 60")
    for folder in (*arms[0], *arms[1]):
        spoil_summary(folder, targets={})
    check_refused(tmp_path, capsys, command(*arms, tmp_path / "out"), "no targets", "--target")


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


def test_arms_may_differ_in_their_control_but_an_arm_may_not(tmp_path, arms, capsys):
    for folder in arms[1][1:]:  # the first is as a run from before there were controls
        set_option(folder, kd_control="shuffled")
    message = "the runs of arm treated differ in kd_control: None in "
    check_refused(tmp_path, capsys, command(*arms, tmp_path / "out"), message)
    set_option(arms[1][0], kd_control="shuffled")
    assert main(command(*arms, tmp_path / "out")) == 0
    assert re.search(r"\| kd_control +\| none +\| shuffled +\|", report_of(tmp_path))


def test_options_of_a_teacher_that_is_not_there_may_differ(tmp_path, arms):
    set_option(arms[0][0], kd_weight=1.0)
    assert result_of(tmp_path, *arms)["arms"]


def test_samples_are_judged_on_the_same_features_wherever_they_lie(tmp_path, arms, capsys):
    for arm, folders in zip("ab", arms, strict=True):
        for folder in folders:
            set_option(folder, fd_features=f"{arm}/features")
            spoil_summary(folder, features={"name": "fd512", "digest": "12ab", "samples": 512})
    assert numbers(*arms)["arms"]
    for folder in arms[1]:
        spoil_summary(folder, features={"name": "fd512", "digest": "34cd", "samples": 512})
    words = command(*arms, tmp_path / "refused")
    check_refused(tmp_path, capsys, words, "the runs differ in features: '12ab' in ", "--allow features")


@pytest.mark.parametrize("what", ["teacher_score", "teacher weights"])
def test_an_arm_has_one_teacher_with_one_score(what, tmp_path, arms, capsys):
    for number, folder in enumerate(arms[1]):
        if what == "teacher_score":
            set_option(folder, teacher_score=50.0 + number)
        else:
            spoil_summary(folder, teacher=TEACHER | {"checkpoint": f"old/{'best' if number else 'model'}"})
    check_refused(tmp_path, capsys, command(*arms, tmp_path / "out"), f"the runs of arm treated differ in {what}: ")
