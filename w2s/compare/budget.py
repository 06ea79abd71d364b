"""Quality against budget: runs whose whole schedule has a given length, each arm at its own best settings (--budget).

A target crossed early in a long schedule says nothing of a short schedule that was made for the target. So each arm is
trained at several lengths, and the question is turned round: how much less does the taught arm need for the quality
that the reference ends with? This is the horizontal distance of the two curves, the iso-quality speedup.
"""

import math

import numpy as np

from w2s.compare.comparable import check_comparable, check_teaching, common_settings, differing_settings
from w2s.compare.runs import RunFolder, read_teacher_runs, total_cost
from w2s.compare.speedup import final_and_best_of, gain_of_pairs, mean_ratio
from w2s.compare.stats import ratio_of_pairs

# what may differ between budgets, as it goes with the length of the schedule
LENGTH_OPTIONS = {"epochs", "updates", "warmup_epochs", "warmup_updates", "decay_epochs", "decay_updates"}
LENGTH_OPTIONS |= {"decay_milestones", "evals_per_epoch", "eval_interval", "grid", "target"}
WINDOW_OPTIONS = {"kd_warmup", "kd_hold", "kd_decay"}  # likewise, of the teacher
TUNED_OPTIONS = ("opt", "lr", "lr_base", "weight_decay")  # what an arm may choose for itself at each budget
BUDGET_AXES = ("epoch", "train_seconds", "pflops", "train_seconds_paid", "pflops_paid")  # paid: the teacher's training


def compare_budgets(
    arms: dict[str, list[RunFolder]], *, margin: float | None = None, allow: tuple[str, ...] = ()
) -> dict:
    """Final quality of each arm at each budget, and how much less budget each arm needs than the reference.

    Args:
        arms: the runs of each arm, the reference first; every arm has the same seeds at the same lengths.
        margin: how much worse a final metric may be and still count as non-inferior.
        allow: further settings in which the runs may differ.

    Returns:
        What budget.json holds: task, metric, mode, reference; `budgets[length]["final"][arm]` as `summarise` gives it,
        `["gain"][arm]`, `["cost"][arm][axis]`, `["tuned"][arm]` (the settings of its own) and
        `["speedup"][arm][axis]`: the iso-quality speedup at the quality that the reference ends with, see
        `iso_quality`. With `allow` for another device there are no seconds, and `timed` is False.

    Raises:
        ValueError: the runs may not be compared, or there are fewer than two lengths.
    """
    reference, *others = arms
    by_length = {arm: _by_length(group) for arm, group in arms.items()}
    lengths = sorted(by_length[reference])
    known = common_settings(arms[reference][0])
    tuned = tuple(name for name in TUNED_OPTIONS if name in known)
    differences = _check_budgets(arms, by_length, tuned=tuned, allow=allow)
    facts = arms[reference][0].summary
    metric, mode = facts["metric"], facts["mode"]
    timed = len({common_settings(run)["device"] for group in arms.values() for run in group}) == 1
    points = {arm: _points_by_seed(by_length[arm], metric, timed=timed) for arm in arms}
    budgets = {}
    for index, length in enumerate(lengths):
        groups = {arm: by_length[arm][length] for arm in arms}
        final = {arm: final_and_best_of(group, metric, mode)["final"] for arm, group in groups.items()}
        pairs = {arm: list(zip(final[reference]["runs"], final[arm]["runs"], strict=True)) for arm in others}
        budgets[f"{length:g}"] = {
            "final": final,
            "gain": {arm: gain_of_pairs(pairs[arm], mode, margin) for arm in others},
            "cost": {arm: {axis: _mean_cost(points[arm], index, axis) for axis in BUDGET_AXES} for arm in arms},
            "tuned": {arm: {name: group[0].options.get(name) for name in tuned} for arm, group in groups.items()},
            "speedup": {
                arm: {axis: iso_quality(points[reference], points[arm], index, axis, mode) for axis in BUDGET_AXES}
                for arm in others
            },
        }
    return {
        "task": facts["task"],
        "metric": metric,
        "mode": mode,
        "reference": reference,
        "arms": {arm: [run.summary["name"] for run in group] for arm, group in arms.items()},
        "differences": differences,
        "timed": timed,
        "margin": margin,
        "budgets": budgets,
    }


def iso_quality(before: dict, after: dict, index: int, axis: str, mode: str) -> dict:
    """How much less of `axis` an arm needs for the quality that the reference ends with at one of its budgets.

    Each seed gives one curve of quality against the logarithm of the cost, interpolated linearly. It is made monotone:
    a quality is the best up to there, and a cost is the least that bought it, at this budget or at a longer one (where
    seconds are disturbed, a longer run may be the cheaper one). Where the quality lies below the arm's first point the
    speedup is known from below only, where it lies above the last one it is known from above only.

    Args:
        before, after: of the reference and of the arm, `{seed: {"quality": [...], axis: [...]}}` by rising budget.
        index: which budget of the reference.
        axis: one of BUDGET_AXES.
        mode: "max" or "min".

    Returns:
        `ratios` (None where only bounded), `geometric_mean`, `interval`, `method` as `ratio_of_pairs` gives them;
        `at_least`: the geometric mean with each bound from below in its place, None where a pair is bounded from above
        or not recorded; `at_most` likewise.
    """
    costs, needed, low, high = [], [], [], []
    for seed, reference in before.items():
        quality = reference["quality"][index]
        cost = None if None in reference[axis] else min(reference[axis][index:])
        position = _cost_of(quality, after[seed]["quality"], after[seed][axis], mode)
        if cost is None:
            position = dict.fromkeys(position)
        costs.append(math.inf if cost is None else cost)
        needed.append(position["cost"])
        low.append(position["at_most"])
        high.append(position["at_least"])
    finite = ratio_of_pairs(costs, [math.inf if cost is None else cost for cost in needed])
    return finite | {"at_least": _mean_bound(costs, low), "at_most": _mean_bound(costs, high)}


def _cost_of(quality: float, qualities: list[float], costs: list[float], mode: str) -> dict:
    """The cost at which a curve reaches a quality, or the bound for it."""
    if None in costs or not all(math.isfinite(value) for value in (quality, *qualities)):
        return {"cost": None, "at_most": None, "at_least": None}
    sign = 1 if mode == "max" else -1
    rising = np.maximum.accumulate([sign * value for value in qualities])
    costs = np.minimum.accumulate(costs[::-1])[::-1].tolist()
    goal = sign * quality
    if goal < rising[0]:
        return {"cost": None, "at_most": costs[0], "at_least": None}
    if goal > rising[-1]:
        return {"cost": None, "at_most": None, "at_least": costs[-1]}
    right = int(np.searchsorted(rising, goal))  # the first point that is good enough
    if rising[right] == goal:
        cost = costs[right]
    else:
        share = (goal - rising[right - 1]) / (rising[right] - rising[right - 1])
        cost = math.exp(math.log(costs[right - 1]) + share * math.log(costs[right] / costs[right - 1]))
    return {"cost": cost, "at_most": cost, "at_least": cost}


def _mean_bound(costs: list[float], needed: list[float | None]) -> float | None:
    if None in needed:
        return None
    return mean_ratio([math.log(cost / bound) for cost, bound in zip(costs, needed, strict=True)])


def _by_length(group: list[RunFolder]) -> dict[float, list[RunFolder]]:
    """Runs by the epochs or updates of their whole schedule, in the order of their seeds."""
    lengths: dict[float, list[RunFolder]] = {}
    for run in sorted(group, key=lambda run: (run.seed is None, run.seed)):
        length = run.options.get("epochs", run.options.get("updates"))
        if length is None:
            raise ValueError(f"{run.path} records no length of its schedule (epochs or updates), which --budget needs")
        lengths.setdefault(float(length), []).append(run)
    return lengths


def _check_budgets(
    arms: dict[str, list[RunFolder]],
    by_length: dict[str, dict[float, list[RunFolder]]],
    *,
    tuned: tuple[str, ...],
    allow: tuple[str, ...],
) -> list[str]:
    """Refuse runs that differ in more than their length and what is `tuned`; the differences that `allow` let pass."""
    _check_same_budgets(by_length)
    differences = differing_settings([run for group in arms.values() for run in group])
    if refused := [text for name, text in differences.items() if name not in {*LENGTH_OPTIONS, *tuned, *allow}]:
        raise ValueError(f"the runs differ in {refused[0]}")
    for arm, group in arms.items():
        check_teaching(arm, group, free=WINDOW_OPTIONS)
    for length in next(iter(by_length.values())):
        check_comparable({arm: by_length[arm][length] for arm in arms}, allow=(*tuned, *allow))
    return [text for name, text in differences.items() if name in allow]


def _check_same_budgets(by_length: dict[str, dict[float, list[RunFolder]]]) -> None:
    """Refuse arms of other lengths than the reference, a single length, and other seeds: each seed is a curve."""
    reference, *others = by_length
    lengths, seeds = sorted(by_length[reference]), None
    for arm in others:
        if sorted(by_length[arm]) != lengths:
            names = [", ".join(f"{length:g}" for length in sorted(by_length[name])) for name in (reference, arm)]
            raise ValueError(f"{reference} has budgets of {names[0]} and {arm} of {names[1]}: they have to be the same")
    if len(lengths) < 2:
        raise ValueError("--budget compares runs of several lengths: give at least two")
    for arm, groups in by_length.items():
        for length, group in groups.items():
            found = [run.seed for run in group]
            seeds = seeds or found
            if found != seeds:
                raise ValueError(f"{arm} at {length:g} has the seeds {found}, where others have {seeds}")


def _points_by_seed(lengths: dict[float, list[RunFolder]], metric: str, *, timed: bool) -> dict:
    """Quality and costs of each seed by rising budget, in seconds only if `timed`."""
    points: dict = {}
    for length in sorted(lengths):
        for run in lengths[length]:
            point = points.setdefault(run.seed, {name: [] for name in ("quality", *BUDGET_AXES)})
            final = run.rows[-1][metric]
            point["quality"].append(math.nan if final is None else final)
            for axis, cost in _costs(run).items():
                point[axis].append(cost if timed or "seconds" not in axis else None)
    return points


def _costs(run: RunFolder) -> dict[str, float | None]:
    """What a run cost on each axis; None where that was not recorded."""
    last, teachers = run.rows[-1], read_teacher_runs([run])
    costs = {}
    for axis in BUDGET_AXES:
        name = axis.removesuffix("_paid")
        parts = [last.get(name)]
        if name != axis and run.summary["teacher"]:
            parts.append(total_cost(teachers, name) if teachers else None)
        costs[axis] = None if None in parts else sum(parts)
    return costs


def _mean_cost(points: dict, index: int, axis: str) -> float | None:
    costs = [point[axis][index] for point in points.values()]
    return None if None in costs else sum(costs) / len(costs)
