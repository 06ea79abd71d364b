"""How numbers are written."""

import pytest

from w2s.compare.text import bound_or_ratio_text, bounds_text, median_text, paired_text, run_cells


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ([1.25, 2.0], "1.25x to 2.00x"),
        ([0.0, 2.0], "up to 2.00x"),
        ([1.25, None], "1.25x or more"),
        ([0.0, None], "not bounded"),
        (None, "n/a"),
    ],
)
def test_bounds_leave_out_an_end_that_is_no_bound(bounds, text):
    assert bounds_text(bounds) == text


def test_a_censored_run_is_written_with_its_last_evaluation():
    summary = {"runs": [3, None, None], "median": None}
    assert run_cells(summary, [5, 5, 6]) == ["3, > 5, > 6", "> 5", "3 to > 6"]
    assert run_cells(summary, [None] * 3) == ["3, n/a, n/a", "n/a", "3"]
    assert median_text({"runs": [3, 4, None], "median": 4}, [5, 5, 6]) == "4"


def test_a_speedup_is_a_ratio_or_a_bound_with_its_interval():
    assert bound_or_ratio_text(1.5, 1.2) == "1.50x"
    assert bound_or_ratio_text(None, 1.2) == "> 1.20x"
    assert bound_or_ratio_text(None, None) == "n/a"
    versus = {"geometric_mean": 1.5, "geometric_mean_lower_bound": None, "interval": [1.2, 1.875]}
    assert paired_text(versus) == "1.50x (1.20 to 1.88)"
