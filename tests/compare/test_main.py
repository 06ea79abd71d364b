"""The command: its arms, its files, what it prints, and how it ends."""

import json
import subprocess
import sys

import pytest
from compare.folders import FILES, TREATED, check_refused, command, core, result_of, spoil_summary, table, write_runs
from helpers import ROOT

from w2s.compare.__main__ import main


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


def test_a_second_comparison_takes_the_place_of_the_first(tmp_path, arms):
    result_of(tmp_path, *arms)
    result_of(tmp_path, *arms, "--target", 62)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert "first@60" not in (tmp_path / "out" / "report.md").read_text()


def test_without_matplotlib_the_extra_is_named_and_nothing_is_written(tmp_path, arms, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = command(*arms, tmp_path / "out")
    check_refused(tmp_path, capsys, words, "matplotlib is not installed; pip install 'w2s[compare]'")


def test_the_command_exits_with_2_and_one_line(tmp_path, arms):
    spoil_summary(arms[1][2], status="running")
    words = [sys.executable, "-m", "w2s.compare", *command(*arms, tmp_path / "out")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {arms[1][2]} is not a finished run: its status is 'running'\n"
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file_is_refused(tmp_path, arms, capsys):
    (tmp_path / "file").write_text("mine")
    check_refused(tmp_path, capsys, command(*arms, tmp_path / "file"), "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_out_that_is_a_run_is_refused(tmp_path, arms, capsys):
    before = sorted(arms[1][0].iterdir())
    check_refused(tmp_path, capsys, command(*arms, arms[1][0]), "--out", "is the folder of a run")
    assert sorted(arms[1][0].iterdir()) == before


def test_runs_without_the_name_of_their_arm_are_refused_with_it(tmp_path, arms, capsys):
    words = ["python", *map(str, (arms[0][0], arms[1][0])), "--out", str(tmp_path / "out")]
    check_refused(tmp_path, capsys, words[1:], "belongs to no option", "--baseline and --treated")


def test_a_folder_that_is_missing_or_given_twice_is_refused(tmp_path, arms, capsys):
    base, treated = arms
    check_refused(
        tmp_path, capsys, command([*base, tmp_path / "gone"], treated, tmp_path / "out"), "gone: no such folder"
    )
    other_spelling = base[1].parent / "base-0" / ".." / "base-1"
    check_refused(tmp_path, capsys, command(base, [other_spelling], tmp_path / "out"), "base-1 is given twice")
    check_refused(tmp_path, capsys, command([base[0], base[0]], treated, tmp_path / "out"), "base-0 is given twice")


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


def test_arms_that_cannot_be_told_apart_or_found_are_refused(tmp_path, arms, capsys):
    out = ["--out", str(tmp_path / "out")]
    for words, message in (
        (["--baseline", str(arms[0][0])], "give --baseline RUN... and --treated RUN..., or --arm"),
        ([f"--arm=a={tmp_path}/base-*"], "one arm alone"),
        ([f"--arm=a={tmp_path}/base-*", f"--arm=b={tmp_path}/none-*"], "none-*: no such folder"),
        ([f"--arm=a={tmp_path}/base-*", f"--arm=speedup={tmp_path}/w2s-*"], "speedup is not a free name"),
        ([f"--arm=a={tmp_path}/base-*", f"--arm=b={tmp_path}/base-0"], "base-0 is given twice"),
        (["--arm", "w2s-*"], "takes NAME=GLOB"),
        ([f"--arm=a={tmp_path}/base-*", f"--arm=b={tmp_path}/w2s-*", "--margin", "nan"], "--margin nan: give a finite"),
        ([f"--arm=a={tmp_path}/base-*", f"--arm=b={tmp_path}/w2s-*", "--margin", "-1"], "--margin -1: give a finite"),
    ):
        check_refused(tmp_path, capsys, [*words, *out], message)


def test_baseline_and_treated_take_patterns(tmp_path, arms):
    words = command([tmp_path / "base-[01]", arms[0][2]], [tmp_path / "w2s-*"], tmp_path / "out")
    assert main(words) == 0
    result = json.loads((tmp_path / "out" / "speedup.json").read_text())
    assert result["arms"]["baseline"] == [{"run": f"base-{i}", "seed": i} for i in range(3)]
    assert result["arms"]["treated"] == [{"run": f"w2s-{i}", "seed": i} for i in range(3)]


def test_a_pattern_that_matches_nothing_is_refused(tmp_path, arms, capsys):
    words = command([tmp_path / "none-*"], arms[1], tmp_path / "out")
    check_refused(tmp_path, capsys, words, "--baseline ", "none-*: no such folder")


def test_an_interrupt_ends_quietly_and_leaves_no_file(tmp_path, arms, capsys, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("w2s.compare.__main__.draw_curves", interrupt)
    assert main(command(*arms, tmp_path / "out")) == 130
    assert capsys.readouterr() == ("", "")
    assert list((tmp_path / "out").iterdir()) == []


def test_slow_libraries_are_not_imported_for_a_refusal():
    code = (
        "import sys; from w2s.compare.__main__ import main; main(['--out', 'x']); "
        "print({'scipy', 'matplotlib', 'wandb'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
