"""The statistics against scipy, simulated data and a reference of five lines."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from w2s.compare.stats import (
    interval,
    non_inferiority,
    ratio_of_pairs,
    sign_flip_p,
    summarise,
)
from w2s.crossing import crossings

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("values", "middle", "low", "high"),
    [
        ([3, 5, 4], 4, 3, 5),
        ([3, INF, 4], 4, 3, None),
        ([3, INF, INF], None, 3, None),
        ([2, INF], None, 2, None),
        ([-INF, 1, 2], 1, None, 2),
        ([2, NAN, 1], None, None, None),
    ],
)
def test_a_summary_counts_the_censored(values, middle, low, high):
    runs = [x if math.isfinite(x) else None for x in values]
    assert summarise(values) == {"runs": runs, "median": middle, "min": low, "max": high}


def test_censored_medians_are_those_of_numpy_with_infinity():
    generator = random.Random(0)
    for _ in range(500):
        values = [generator.choice([INF, generator.random()]) for _ in range(generator.randint(1, 7))]
        with np.errstate(invalid="ignore"):
            expected = np.median(values)
        assert summarise(values)["median"] == (pytest.approx(expected) if math.isfinite(expected) else None)


def test_the_interval_of_few_pairs_is_that_of_scipys_t_test():
    values = [0.3, 0.1, 0.45, 0.2, 0.22]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = interval(values)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert found["method"] == "t"


# simulations on paper: 4,000 data sets of 3 pairs and 600 of 8 stay within 2 points of 95 % by more than twice their
# own standard error (0.3 and 0.9 points)
@pytest.mark.parametrize(("pairs", "sets", "method"), [(3, 4000, "t"), (5, 4000, "t"), (8, 600, "bootstrap-t")])
def test_the_interval_covers_the_truth_95_times_in_a_hundred(monkeypatch, pairs, sets, method):
    monkeypatch.setattr("w2s.compare.stats.RESAMPLES", 1000)
    generator, hits = np.random.default_rng(3), 0
    for number in range(sets):
        found = interval(generator.normal(0.3, 0.2, pairs), seed=number)
        assert found["method"] == method
        hits += found["low"] <= 0.3 <= found["high"]
    assert abs(hits / sets - 0.95) < 0.02


def test_the_bootstrap_is_lopsided_where_the_data_are():
    values = list(np.random.default_rng(0).exponential(0.3, 20))
    found = interval(values)
    expected = stats.bootstrap((values,), np.mean, method="BCa", rng=0).confidence_interval
    assert found["high"] - np.mean(values) > np.mean(values) - found["low"]
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=0.1)


def test_there_is_no_interval_of_one_pair_or_of_pairs_all_alike():
    assert interval([0.3]) is None
    assert interval([0.1 + 0.2, 0.3, 0.3]) is None


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_p_values_are_those_of_scipy(n):
    generator = np.random.default_rng(n)
    for values in (generator.normal(0.3, 0.5, n), generator.integers(-2, 4, n).astype(float)):
        expected = stats.permutation_test(
            (values,), lambda x, axis: x.mean(axis), permutation_type="samples", vectorized=True, n_resamples=np.inf
        )
        assert sign_flip_p(list(values)) == pytest.approx(expected.pvalue)


def test_p_values_of_known_cases():
    assert sign_flip_p([1, 2, 3]) == 0.25  # 3 pairs that agree prove no more
    assert sign_flip_p([0.1, 0.2, 0.3, 0.2, 0.1]) == 0.0625
    assert sign_flip_p([0, 0, 0]) == sign_flip_p([0.4]) == 1
    assert sign_flip_p([1.0] * 20) == pytest.approx(1 / 100_001)  # sampled: only the observed pattern


def test_non_inferiority():
    assert non_inferiority({"low": 0.1, "high": 1}, 0.5) == "superior"
    assert non_inferiority({"low": -0.4, "high": 1}, 0.5) == "non-inferior"
    assert non_inferiority({"low": -0.6, "high": 1}, 0.5) == "undecided"
    assert non_inferiority({"low": -2, "high": -0.6}, 0.5) == "inferior"
    assert non_inferiority(None, 0.5) == "undecided"


def test_ratios_of_pairs_turn_over_when_the_arms_are_swapped():
    before, after = [4, 6, 5], [2, 4, 4]
    there, back = ratio_of_pairs(before, after), ratio_of_pairs(after, before)
    assert there["ratios"] == pytest.approx([2, 1.5, 1.25])
    assert there["geometric_mean"] == pytest.approx(3.75 ** (1 / 3))
    assert there["geometric_mean"] == pytest.approx(1 / back["geometric_mean"])
    assert there["interval"] == pytest.approx([1 / back["interval"][1], 1 / back["interval"][0]])


def test_a_censored_pair_has_no_ratio_and_leaves_no_mean():
    found = ratio_of_pairs([4, INF], [2, 3])
    assert found == {"ratios": [pytest.approx(2), None], "geometric_mean": None, "interval": None, "method": None}


def test_first_at_tau_of_10000_random_curves_is_that_of_five_lines():
    generator = random.Random(1)
    for _ in range(10_000):
        mode, length = generator.choice(["max", "min"]), generator.randint(1, 8)
        values = [generator.choice([None, NAN, *range(10), *range(10)]) for _ in range(length)]
        tau = generator.randint(0, 9)
        hits = [v is not None and (v >= tau if mode == "max" else v <= tau) for v in values]
        first = next((i for i in range(length) if hits[i]), None)
        confirmed = next((i for i in range(length - 1) if hits[i : i + 2] == [True, True]), None)

        rows = [{"update": i, "epoch": i, "m": value} for i, value in enumerate(values)]
        found = crossings(generator.sample(rows, length), "m", tau, mode)
        assert [point and point["epoch"] for point in found] == [first, confirmed]
