"""The drawings: curves, and speedup against the strength of the teacher."""

import json

import matplotlib.image
import numpy as np
import pytest
from compare.folders import BASELINE, KD_OFF, NAN, TEACHER, TREATED, result_of, write_runs

from w2s.compare.__main__ import main


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
