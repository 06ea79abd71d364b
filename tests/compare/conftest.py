"""Small run folders, made at once, and the fixtures of their comparison."""

import pytest


@pytest.fixture
def drawing() -> None:
    """Asked for by the tests that look at pictures."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch) -> None:
    """Drawing takes most of a second: only tests that ask for it wait."""
    if "drawing" not in request.fixturenames:
        monkeypatch.setattr("w2s.compare.__main__.draw_curves", lambda result, arms, file: file.write(b"a picture"))
