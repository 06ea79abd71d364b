"""When the evaluations of a run are due."""

import argparse

import pytest

from w2s.engine.parsing import rate_of_evaluations
from w2s.engine.plan import grid_point


@pytest.mark.parametrize(
    ("rate", "points"),
    [
        (1, [18, 36, 54, 72, 90]),
        (4, [4, 9, 14, 18, 22]),
        (0.5, [36, 72, 108, 144, 180]),
        (0.3333, [54, 108, 162, 216, 270]),
    ],
)
def test_evaluations_are_spread_over_an_epoch_or_lie_epochs_apart(rate, points):
    update, due = 0, []
    while len(due) < len(points):
        update = grid_point(update, 18, rate)
        due.append(update)
    assert due == points
    assert [grid_point(point - 1, 18, rate) for point in points] == points  # also from within an epoch, after a resume


def test_a_rate_of_evaluations_is_a_whole_number_or_one_by_a_whole_number():
    words = ("1", "4", "2.0", "0.5", "0.25", "0.33")
    assert [rate_of_evaluations(text) for text in words] == [1, 4, 2, 0.5, 0.25, 0.33]
    assert isinstance(rate_of_evaluations("2.0"), int)
    for text in ("0", "-1", "0.3", "1.5", "nan", "inf", "often"):
        with pytest.raises(argparse.ArgumentTypeError, match="every second epoch"):
            rate_of_evaluations(text)
