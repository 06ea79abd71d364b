"""Run folders that are not what they should be: each refused in one line."""

from pathlib import Path

import pytest
from compare.folders import check_refused, command, drop_rows, set_option, spoil_summary


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
    "shorter": (lambda run: drop_rows(run, 4), "disagree in last (62.0, 61): edited by hand?"),
    "update twice": (in_csv("5.0,50,", "5.0,40,"), "metrics.csv is malformed: update 40 comes after update 40"),
    "update back": (in_csv("5.0,50,", "5.0,30,"), "metrics.csv is malformed: update 30 comes after update 40"),
    "other epochs": (in_csv("5.0,50,", "5.5,50,"), "differ in the epochs of their evaluations: "),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSALS.values(), ids=REFUSALS)
def test_bad_runs_are_refused_with_one_line(tmp_path, arms, capsys, spoil, message):
    spoil(arms[0][0])
    check_refused(tmp_path, capsys, command(*arms, tmp_path / "out"), message, "base-0")
