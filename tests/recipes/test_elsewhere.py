"""The loops of other libraries: each example runs alone and taught, is resumed, and is read by one comparison."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import accelerate
import pytest
import torch
from helpers import ROOT, TIMEOUT, read_rows, read_summary, timeless

from w2s.compare.__main__ import main as compare

ELSEWHERE = ROOT / "recipes" / "elsewhere"
EXAMPLES = ["plain", "hf_trainer", "lightning_loop", "timm_train"]
EPOCHS = 2


def run_example(name: str, folder: Path, *options: str) -> None:
    """Run an example as `python recipes/elsewhere/NAME.py` would, in this process."""
    accelerate.state.AcceleratorState._reset_state(True)
    argv, path = sys.argv, list(sys.path)
    sys.argv, sys.path[:0] = [f"{name}.py", str(folder), *options], [str(ELSEWHERE)]
    try:
        runpy.run_path(str(ELSEWHERE / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path
        accelerate.state.AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """All examples, alone and taught."""
    output = tmp_path_factory.mktemp("elsewhere")
    for name in EXAMPLES:
        for arm, options in (("alone", []), ("taught", ["--taught"])):
            run_example(name, output / name / arm, "--epochs", str(EPOCHS), *options)
    return output


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_leaves_a_run_folder(runs, name):
    assert (ELSEWHERE / f"{name}.py").read_text().count("\n") < 60
    alone, taught = (read_rows(runs / name / arm) for arm in ("alone", "taught"))
    assert [row["epoch"] for row in taught] == [row["epoch"] for row in alone]
    assert [row["samples"] for row in taught] == [row["samples"] for row in alone]
    assert all(float(row["kd_weight"]) == 3 for row in taught) and all(float(row["kd_weight"]) == 0 for row in alone)
    assert read_summary(runs / name / "taught")["teacher"]["switch"] > 30
    assert read_summary(runs / name / "alone")["teacher"] is None
    assert sum(float(row["train_seconds"]) > 0 for row in taught) == EPOCHS


@pytest.mark.parametrize("name", EXAMPLES)
def test_alone_and_taught_differ_in_nothing_but_the_teacher(runs, name, tmp_path, capsys):
    folders = ["--baseline", str(runs / name / "alone"), "--treated", str(runs / name / "taught")]
    assert compare([*folders, "--target", "20", "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    assert "20" in json.loads((tmp_path / "speedup.json").read_text())["targets"]


def test_one_comparison_reads_what_all_four_write(runs, tmp_path, capsys):
    arms = [f"{name}-{arm}={runs / name / arm}" for name in EXAMPLES for arm in ("alone", "taught")]
    words = [word for arm in arms for word in ("--arm", arm)] + ["--target", "20", "--out", str(tmp_path)]
    assert compare(words) == 2  # four libraries have other options
    allow = re.search(r"--allow (.*) compares", capsys.readouterr().err).group(1).split()
    assert compare([*words, "--allow", *allow]) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "speedup.json").read_text())["targets"]["20"]
    assert all(len(found[arm.partition("=")[0]]["epoch"]["runs"]) == 1 for arm in arms)


def has_checkpoint(name: str, folder: Path, epochs: int) -> bool:
    """Whether the checkpoint of so many epochs is whole."""
    try:
        if name == "hf_trainer":
            state = folder / "checkpoints" / f"checkpoint-{17 * epochs}" / "trainer_state.json"
            return json.loads(state.read_text())["global_step"] == 17 * epochs
        checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        return checkpoint["global_step"] >= 17 * epochs
    except (OSError, ValueError, RuntimeError, EOFError):
        return False


@pytest.mark.parametrize("name", ["hf_trainer", "lightning_loop"])
def test_an_example_that_is_killed_goes_on_where_it_was(runs, tmp_path, name):
    options = [str(tmp_path / "run"), "--taught", "--epochs", str(EPOCHS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, str(ELSEWHERE / f"{name}.py"), *options], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + TIMEOUT
    while not has_checkpoint(name, tmp_path / "run", 1) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert read_summary(tmp_path / "run")["status"] == "running"
    run_example(name, *map(Path, options[:1]), *options[1:], "--resume")
    summary, whole = read_summary(tmp_path / "run"), read_summary(runs / name / "taught")
    assert summary["status"] == "finished"
    assert summary["kd_off"] == whole["kd_off"] and summary["teacher"] == whole["teacher"]
    rows, expected = timeless(tmp_path / "run"), timeless(runs / name / "taught")
    if name == "lightning_loop":  # which does not bring back the random numbers that order its batches
        rows, expected = (
            [{k: v for k, v in row.items() if "top1" not in k} for row in each] for each in (rows, expected)
        )
    assert rows == expected
