"""What a few seeds can prove: medians with censored runs, intervals and p-values of paired runs, non-inferiority.

Plain numbers go in and come out: no files, nothing of the project. Runs are paired by seed, and a speedup is the
geometric mean of the pairs' ratios, that is, the mean of differences of logarithms. The median of 3 or 5 ratios takes
only 3 or 5 values, so no interval around it can hold what it promises; the mean of logarithms is smooth, and swapping
the arms turns the speedup and both ends of its interval into their reciprocals.
"""

import math
from itertools import product
from statistics import median

import numpy as np

BOOTSTRAP_FROM = 8  # pairs; below, resamples of so few values are mostly repetitions and Student's t is the better one
RESAMPLES = 10_000
EXACT_UP_TO = 16  # pairs: 65,536 ways to flip the signs


def summarise(values: list[float]) -> dict:
    """The values of all runs with their median, minimum and maximum, as speedup.json holds them.

    Args:
        values: one number per run; infinite where the run is censored or diverged, NaN where nothing was recorded.

    Returns:
        `{"runs", "median", "min", "max"}`, in which None stands for every number that is not finite. Infinite values
        take part in the median; one NaN makes the median and both extremes None.
    """
    recorded = not any(math.isnan(value) for value in values)
    return {
        "runs": [_finite_or_none(value) for value in values],
        "median": _finite_or_none(median(values)) if recorded else None,
        "min": _finite_or_none(min(values)) if recorded else None,
        "max": _finite_or_none(max(values)) if recorded else None,
    }


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def interval(differences: list[float], level: float = 0.95, seed: int = 0) -> dict | None:
    """A two-sided interval of the mean of paired differences.

    From `BOOTSTRAP_FROM` pairs on, the paired bootstrap-t (Efron and Tibshirani 1993, section 12.5): pairs are drawn
    with replacement and each resample's mean is studentised, so that skewed differences get an unsymmetric interval.
    With fewer pairs Student's t, exact for normal differences; a percentile bootstrap of 3 pairs covers 75 %, not 95.

    Returns:
        `{"low", "high", "method"}`, or None where it is not defined: one pair, or all differences equal, as happens
        where the evaluation grid is coarser than the differences between seeds.
    """
    values = np.asarray(differences, dtype=float)
    n, mean = len(values), values.mean()
    error = values.std(ddof=1) / math.sqrt(n) if n > 1 else 0.0
    if not error > 1e-12 * max(1.0, abs(mean)):
        return None
    if n < BOOTSTRAP_FROM:
        low = high = t_quantile((1 + level) / 2, n - 1)
        method = "t"
    else:
        drawn = values[np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))]
        spreads = drawn.std(axis=1, ddof=1) / math.sqrt(n)
        usable = spreads > 1e-12  # all draws the same pair: no scale to studentise by
        scaled = np.sort((drawn.mean(axis=1)[usable] - mean) / spreads[usable])
        high, low = np.quantile(scaled, [(1 - level) / 2, (1 + level) / 2]) * [-1, 1]
        method = "bootstrap-t"
    return {"low": float(mean - low * error), "high": float(mean + high * error), "method": method}


def sign_flip_p(differences: list[float], seed: int = 0) -> float:
    """Two-sided p-value that paired differences are centred on 0: the share of sign patterns as extreme as this one.

    If the teacher did nothing, the arms of a pair could be swapped: its difference would change sign (Fisher 1935).
    All patterns are counted up to `EXACT_UP_TO` pairs, else 100,000 random ones and the observed one. With n pairs no
    p is below 2 / 2**n: 0.25 for 3 pairs, 0.0625 for 5.
    """
    values = np.asarray(differences, dtype=float)
    n = len(values)
    if n <= EXACT_UP_TO:
        signs = np.array(list(product((1, -1), repeat=n)))
    else:
        signs = np.vstack([np.ones(n), np.random.default_rng(seed).choice((1, -1), (100_000, n))])
    sums = np.abs(signs @ values)
    return float(np.mean(sums >= sums[0] * (1 - 1e-9)))  # up to rounding: equal sums are as extreme


def non_inferior(found: dict | None, margin: float) -> str:
    """The verdict on a metric's paired gain (positive is better) from its interval and a margin stated beforehand.

    Returns:
        "superior" (all of the interval above 0), "non-inferior" (above -margin), "inferior" (below -margin) or
        "undecided", also where there is no interval.
    """
    if found is None:
        return "undecided"
    if found["low"] > 0:
        return "superior"
    if found["low"] > -margin:
        return "non-inferior"
    return "inferior" if found["high"] < -margin else "undecided"


def ratio_of_pairs(before: list[float], after: list[float]) -> dict:
    """The speedup of paired runs: geometric mean of before / after, its 95 % interval, its p-value.

    Args:
        before, after: costs of the reference and of the other arm, one a pair; infinite where censored.

    Returns:
        `ratios` (None where one of the pair is censored), `geometric_mean`, `interval` [low, high] and `method`. They
        are None where a run is censored.
    """
    pairs = list(zip(before, after, strict=True))
    logs = [math.log(b / a) if 0 < a < math.inf and 0 < b < math.inf else None for b, a in pairs]
    known = bool(logs) and None not in logs
    found = interval(logs) if known else None
    return {
        "ratios": [None if x is None else math.exp(x) for x in logs],
        "geometric_mean": math.exp(math.fsum(logs) / len(logs)) if known else None,
        "interval": found and [math.exp(found["low"]), math.exp(found["high"])],
        "method": found and found["method"],
    }


def t_quantile(p: float, freedom: int) -> float:
    """The quantile of Student's t for a whole number of degrees of freedom, p above one half."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, freedom: int) -> float:
    """Abramowitz and Stegun 26.7.3 and 26.7.4: the finite sums for odd and even degrees of freedom."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for j in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * j / (j + 1)
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return (1 + inside) / 2
