"""Small run folders, made at once, and the fixtures of their comparison."""

from pathlib import Path

import pytest
from compare.folders import BASELINE, KD_OFF, TEACHER, TREATED, write_runs


@pytest.fixture
def drawing() -> None:
    """Asked for by the tests that look at pictures."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch) -> None:
    """Drawing takes most of a second: only tests that ask for it wait."""
    if "drawing" not in request.fixturenames:
        monkeypatch.setattr("w2s.compare.__main__.draw_curves", lambda result, arms, file: file.write(b"a picture"))


@pytest.fixture
def arms(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    """Three runs an arm; train seconds between evaluations 10, 8, 11 and 12, 11, 14."""
    return (
        write_runs(tmp_path, "base", BASELINE, (10.0, 8.0, 11.0)),
        write_runs(tmp_path, "w2s", TREATED, (12.0, 11.0, 14.0), teacher=TEACHER, kd_off=KD_OFF),
    )
