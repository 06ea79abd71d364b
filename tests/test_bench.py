"""The benchmark runs the real updates and counts what they cost; how long they take is not tested."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from conftest import DIGITS, RESNET, TEACHER, call_script, words

import train_cls
from w2s import bench
from w2s.options import InputError


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> tuple[dict, str, Path]:
    """What a short benchmark wrote and printed, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("bench")
    call_script(train_cls.main, DIGITS, TEACHER, "--epochs 1 --name teacher --output", folder)
    command = words(DIGITS, RESNET, "--name bench --rounds 2 --round-updates 2 --output", folder, "--json")
    with redirect_stdout(StringIO()) as printed:
        call_script(bench.main, command, folder / "b.json", "--teacher", folder / "teacher")
    return json.loads((folder / "b.json").read_text()), printed.getvalue(), folder


def test_the_bound_is_that_of_the_flops(figures):
    flops = figures[0]["flops_per_update"]
    assert flops["plain"] == flops["after"] < flops["teacher"]
    assert figures[0]["flops_bound"] == flops["teacher"] / flops["plain"]


def test_flops_are_those_of_a_run(figures):
    summary = json.loads((figures[2] / "teacher" / "summary.json").read_text())
    ratio = (figures[0]["flops_per_update"]["teacher"] - figures[0]["flops_per_update"]["plain"]) / summary["flops"][
        "student_update"
    ]
    assert ratio == pytest.approx(1 / 3, rel=0.03)  # a forward is a third of an update, but for the first layer


def test_all_that_others_read_is_there(figures):
    names = ("teacher_ratio", "after_ratio", "loader_images_per_second", "step_images_per_second")
    assert all(figures[0][name] > 0 for name in names)
    for part in ("images_per_second", "utilisation", "memory_bytes"):
        assert set(figures[0][part]) == {"plain", "teacher", "after"}
    assert "teacher / plain" in figures[1] and "loader" in figures[1]


def test_nothing_is_kept(figures):
    assert not (figures[2] / "bench").exists()


def test_a_benchmark_without_a_teacher_is_refused():
    with pytest.raises(InputError, match="--teacher"):
        call_script(bench.main, DIGITS, RESNET)
