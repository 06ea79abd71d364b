"""What a few seeds can prove: medians with censored runs, intervals and p-values of paired runs, non-inferiority.

Plain numbers go in and come out: no files, nothing of the project. Runs are paired by seed, and a speedup is the
geometric mean of the pairs' ratios, that is, the mean of differences of logarithms. The median of 3 or 5 ratios takes
only 3 or 5 values, so no interval around it can have the coverage that it promises; the mean of logarithms is smooth,
and swapping the arms turns the speedup and both ends of its interval into their reciprocals.
"""

import math
from itertools import product
from statistics import median

import numpy as np

LEVEL = 0.95  # the coverage of intervals
BOOTSTRAP_FROM = 8  # pairs; resamples of fewer values are mostly repetitions, and Student's t covers better
RESAMPLES = 10_000
EXACT_UP_TO = 16  # pairs: 65,536 ways to flip the signs
RANDOM_SIGN_PATTERNS = 100_000  # above that


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


def interval(differences: list[float], seed: int = 0) -> dict | None:
    """A two-sided 95 % confidence interval for the mean of paired differences.

    From `BOOTSTRAP_FROM` pairs on this is the paired bootstrap-t (Efron and Tibshirani 1993, section 12.5): pairs are
    drawn with replacement and the mean of each resample is studentised, so that skewed differences get an asymmetric
    interval. With fewer pairs it is Student's t, exact for normal differences; a percentile bootstrap of 3 pairs
    covers 75 %, not 95 %.

    Args:
        differences: one number per pair.
        seed: of the resampling.

    Returns:
        `{"low", "high", "method"}`, or None where an interval is not defined: for a single pair, and where all
        differences are equal, as happens if the evaluation grid is coarser than the differences between seeds.
    """
    from scipy import stats  # takes a second to import: not for --help

    values = np.asarray(differences, dtype=float)
    n, mean = len(values), values.mean()
    standard_error = values.std(ddof=1) / math.sqrt(n) if n > 1 else 0.0
    if not standard_error > 1e-12 * max(1.0, abs(mean)):
        return None
    if n < BOOTSTRAP_FROM:
        quantile = stats.t.ppf((1 + LEVEL) / 2, n - 1)
        low, high, method = mean - quantile * standard_error, mean + quantile * standard_error, "t"
    else:
        resamples = values[np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))]
        errors = resamples.std(axis=1, ddof=1) / math.sqrt(n)
        usable = errors > 1e-12  # a resample of one pair repeated has no scale to studentise by
        studentised = np.sort((resamples.mean(axis=1)[usable] - mean) / errors[usable])
        lower, upper = np.quantile(studentised, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        low, high, method = mean - upper * standard_error, mean - lower * standard_error, "bootstrap-t"
    return {"low": float(low), "high": float(high), "method": method}


def sign_flip_p(differences: list[float], seed: int = 0) -> float:
    """The two-sided p-value of the hypothesis that paired differences are centred on 0.

    If the teacher made no difference, the arms of a pair could be swapped, which flips the sign of its difference
    (Fisher 1935). The p-value is the share of sign patterns whose sum is at least as extreme as the observed one: of
    all patterns up to `EXACT_UP_TO` pairs, above that of random ones together with the observed one. With n pairs it
    is never below 2 / 2**n: 0.25 for 3 pairs, 0.0625 for 5.

    `scipy.stats.permutation_test(permutation_type="samples")` gives the same exact p-values, but it refuses a single
    pair, and where it draws patterns at random it counts the observed one in both tails, which doubles a small p.
    """
    values = np.asarray(differences, dtype=float)
    n = len(values)
    if n <= EXACT_UP_TO:
        signs = np.array(list(product((1, -1), repeat=n)))  # the observed pattern, all signs kept, comes first
    else:
        random_signs = np.random.default_rng(seed).choice((1, -1), (RANDOM_SIGN_PATTERNS, n))
        signs = np.vstack([np.ones(n), random_signs])
    sums = np.abs(signs @ values)
    return float(np.mean(sums >= sums[0] * (1 - 1e-9)))  # sums that differ only by rounding are equally extreme


def non_inferiority(gain_interval: dict | None, margin: float) -> str:
    """The verdict on a metric's paired gain (positive is better), given a margin that was fixed beforehand.

    Args:
        gain_interval: as `interval` returns it.
        margin: how much worse the metric may be.

    Returns:
        "superior" (the whole interval is above 0), "non-inferior" (above -margin), "inferior" (below -margin) or
        "undecided", also where there is no interval.
    """
    if gain_interval is None:
        return "undecided"
    if gain_interval["low"] > 0:
        return "superior"
    if gain_interval["low"] > -margin:
        return "non-inferior"
    return "inferior" if gain_interval["high"] < -margin else "undecided"


def ratio_of_pairs(before: list[float], after: list[float]) -> dict:
    """The speedup of paired runs: the geometric mean of before / after and its 95 % interval.

    Args:
        before, after: the costs of the reference and of the other arm, one per pair; infinite where censored.

    Returns:
        `ratios`, None where a run of the pair is censored; `geometric_mean`, `interval` as [low, high] and its
        `method`, which are None where any run is censored.
    """
    logs = []
    for reference, other in zip(before, after, strict=True):
        crossed = 0 < reference < math.inf and 0 < other < math.inf
        logs.append(math.log(reference / other) if crossed else None)
    complete = bool(logs) and None not in logs
    log_interval = interval(logs) if complete else None
    return {
        "ratios": [None if log is None else math.exp(log) for log in logs],
        "geometric_mean": math.exp(math.fsum(logs) / len(logs)) if complete else None,
        "interval": log_interval and [math.exp(log_interval["low"]), math.exp(log_interval["high"])],
        "method": log_interval and log_interval["method"],
    }
