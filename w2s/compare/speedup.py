"""Speedups, gains and costs of arms of runs as plain numbers: what speedup.json holds."""

import math

from w2s.compare.runs import Run, check_comparable, teacher_run
from w2s.compare.stats import interval, non_inferiority, ratio_of_pairs, sign_flip_p, summarise
from w2s.crossing import AXES, best_value, crossings, target_key

COST_AXES = ("train_seconds", "total_seconds", "pflops")  # what a teacher's training is paid in, too


def compare(
    arms: dict[str, list[Run]],
    targets: list[float],
    margin: float | None = None,
    allow: tuple[str, ...] = (),
) -> dict:
    """Crossings, medians, speedups and their uncertainty, final metrics and costs of arms, the reference first.

    Args:
        arms: the runs of each arm.
        targets: tau values.
        margin: how much worse the metric may end to count as non-inferior.
        allow: settings in which the runs may differ.

    Raises:
        ValueError: the runs may not be compared; see `check_comparable`.

    Returns:
        What speedup.json holds: `targets[tau][arm][axis]`, `targets[tau]["confirmed"][arm][axis]`, `final[arm]` and
        `best[arm]`, as `summarise` gives them; `targets[tau]["versus"][arm]` for each arm but the reference, and that
        of the first of them again as `targets[tau]["speedup"]` and `["lower_bound"]`; `gain[arm]["final" and "best"]`;
        `costs[arm]`; task, metric, mode; `arms[arm]`. None: censored, infinite, not recorded or not defined.
    """
    differences = check_comparable(arms, allow)
    reference, *others = arms
    metric, mode = (arms[reference][0].summary[key] for key in ("metric", "mode"))
    worst = -math.inf if mode == "max" else math.inf  # a run that ends in NaN takes part in the median
    result = {key: arms[reference][0].summary[key] for key in ("task", "metric", "mode")}
    result |= {"reference": reference, "arms": {}, "final": {}, "best": {}, "differences": differences}
    result |= {"margin": margin, "gain": {arm: {} for arm in others}, "costs": {}}
    for arm, group in arms.items():
        result["arms"][arm] = [{"run": run.summary["name"], "seed": run.seed} for run in group]
        ends = {"final": [_or(run.rows[-1][metric], worst) for run in group]}
        ends["best"] = [_or(best_value(run.rows, metric, mode), worst) for run in group]
        for kind, values in ends.items():
            result[kind][arm] = summarise(values)
            if arm != reference:
                pairs = _paired(arms, arm, *(result[kind][name]["runs"] for name in (reference, arm)))
                result["gain"][arm][kind] = _gain(pairs, mode, margin)
        result["costs"][arm] = _costs_of(group)
    return result | {"targets": {target_key(tau): _at_target(arms, tau, metric, mode, result) for tau in targets}}


def _paired(arms: dict[str, list[Run]], arm: str, before: list, after: list) -> list[tuple]:
    """The values of the reference and of `arm`, put together by the seeds of their runs."""
    group = {run.seed: value for run, value in zip(next(iter(arms.values())), before, strict=True)}
    pairs = zip(arms[arm], after, strict=True)
    return [(group[run.seed], value) for run, value in pairs if run.seed in group]


def _gain(pairs: list[tuple], mode: str, margin: float | None) -> dict:
    """How much better the metric of an arm is, positive is better: mean over pairs, its interval, p, the verdict."""
    known = [(b, a) for b, a in pairs if b is not None and a is not None]
    gains = [a - b if mode == "max" else b - a for b, a in known]
    whole = bool(gains) and len(known) == len(pairs)  # a diverged run is no number to take the mean with
    found = interval(gains) if whole else None
    return {
        "mean": math.fsum(gains) / len(gains) if whole else None,
        "interval": found and [found["low"], found["high"]],
        "p": sign_flip_p(gains) if whole else None,
        "verdict": None if margin is None else non_inferiority(found, margin),
    }


def _at_target(arms: dict[str, list[Run]], target: float, metric: str, mode: str, result: dict) -> dict:
    reference, *others = arms
    found = {arm: [_crossing_costs(run, metric, target, mode) for run in group] for arm, group in arms.items()}
    entry: dict = {"speedup": {}, "lower_bound": {}, "confirmed": {}, "versus": {}}
    for arm, runs in found.items():
        entry[arm] = {axis: summarise([run[axis]["first"] for run in runs]) for axis in AXES}
        entry["confirmed"][arm] = {axis: summarise([run[axis]["confirmed"] for run in runs]) for axis in AXES}
    for arm in others:
        teacher = result["costs"][arm]["teacher_training"]
        entry["versus"][arm] = {}
        for axis in AXES:
            before, after = ([run[axis] for run in found[name]] for name in (reference, arm))
            versus = _versus(_paired(arms, arm, before, after), before, after)
            if teacher and axis in COST_AXES:
                medians = (entry[name][axis]["median"] for name in (reference, arm))
                versus |= _with_teacher(*medians, teacher[axis])
            entry["versus"][arm][axis] = versus
    for key in ("speedup", "lower_bound"):
        entry[key] = {axis: entry["versus"][others[0]][axis][key] for axis in AXES}
    return entry


def _crossing_costs(run: Run, metric: str, target: float, mode: str) -> dict:
    """On each axis: cost of the first and of the confirmed crossing (infinite: none), of the evaluation before the
    first one (0 at the start of the run), and of the first one or else of the last evaluation: the least it can be."""
    first, confirmed = crossings(run.rows, metric, target, mode)
    place = next((i for i, row in enumerate(run.rows) if first and row["epoch"] == first["epoch"]), len(run.rows))
    costs = {}
    for axis in AXES:
        start = {axis: 0.0}
        points = {"first": first, "confirmed": confirmed, "earlier": run.rows[place - 1] if place else start}
        costs[axis] = {key: _or(point.get(axis), math.nan) if point else math.inf for key, point in points.items()}
        costs[axis]["floor"] = _or((first or run.rows[-1]).get(axis), math.nan)
    return costs


def _versus(pairs: list[tuple[dict, dict]], before: list[dict], after: list[dict]) -> dict:
    """One arm against the reference on one axis: ratio of medians over all runs, and the paired view with its doubt.

    A censored run crosses after its last evaluation, if ever: with that in place of infinity the median is below the
    true one, also where an even number of runs takes the mean of a crossed and a censored one. The p-value takes such
    a run there too, and two censored runs of a pair as equal: swapping the arms of a pair swaps these values as well.
    """
    middles = [summarise([run[key] for run in runs])["median"] for runs, key in ((before, "first"), (after, "first"))]
    floor = summarise([run["floor"] for run in before])["median"]
    late = [b["first"] == a["first"] == math.inf for b, a in pairs]
    known = all(math.isfinite(side["floor"]) and side["floor"] > 0 for pair in pairs for side in pair)
    logs = [
        0.0 if both else math.log(b["floor"] / a["floor"]) for (b, a), both in zip(pairs, late, strict=True) if known
    ]
    result = ratio_of_pairs([b["first"] for b, _ in pairs], [a["first"] for _, a in pairs])
    crossed = bool(pairs) and known and all(a["first"] < math.inf for _, a in pairs)
    ratio = result["geometric_mean"]
    return {
        "speedup": middles[0] / middles[1] if None not in middles and middles[1] else None,
        "lower_bound": floor / middles[1] if middles[0] is None and floor is not None and middles[1] else None,
        **result,
        "geometric_mean_lower_bound": _mean_ratio(logs) if ratio is None and crossed else None,
        "p": sign_flip_p(logs) if logs and not all(late) else None,
        # each crossing lies between two evaluations: what the ratio is at the least and at the most
        "resolution": [
            _mean_ratio([_log(b["earlier"], a["first"]) for b, a in pairs]),
            _mean_ratio([_log(b["first"], a["earlier"]) for b, a in pairs]),
        ]
        if ratio
        else None,
    }


def _log(one: float, other: float) -> float:
    return -math.inf if one == 0 else math.inf if other == 0 else math.log(one / other)


def _mean_ratio(logs: list[float]) -> float | None:
    """The geometric mean of ratios given as logarithms; None where it has no bound."""
    mean = sum(logs) / len(logs)
    return math.exp(mean) if mean < math.inf else None


def _with_teacher(before: float | None, after: float | None, cost: float | None) -> dict:
    """The speedup with the teacher's own training in the bill, and after how many students that is paid back."""
    if None in (before, after, cost):
        return {"speedup_with_teacher": None, "paid_back_after": None}
    saved = before - after
    return {
        "speedup_with_teacher": before / (after + cost),
        "paid_back_after": math.ceil(cost / saved) if saved > 0 else None,
    }


def _costs_of(group: list[Run]) -> dict:
    """What the teacher of an arm cost: during the taught updates against its FLOPs bound, and to train it."""
    first = group[0]
    flops, teacher = first.summary.get("flops") or {}, first.summary["teacher"]
    made = teacher_run(first) if teacher else None
    bound = flops.get("teacher_forward", 0) / (flops.get("student_update") or math.inf)
    training = {axis: made.rows[-1].get(axis) for axis in COST_AXES} if made else None
    return {
        "overhead": [_overhead(run) for run in group] if teacher else None,  # of an update with the teacher, per run
        "flops_bound": 1 + bound if bound else None,
        "share": [_share(run.rows[-1]) for run in group] if teacher else None,  # of all train seconds
        "kd_off": [run.summary["kd_off"] for run in group],
        "teacher_training": training and {"run": made.summary["name"], **training},
    }


def _overhead(run: Run) -> float | None:
    """Train seconds with the teacher over those without it, up to the last evaluation that was still taught."""
    taught = [row for row in run.rows if row.get("kd_active")]
    share = _share(taught[-1]) if taught else None
    return 1 / (1 - share) if share is not None and share < 1 else None


def _share(row: dict) -> float | None:
    spent, train = row.get("teacher_seconds"), row.get("train_seconds")
    return spent / train if spent is not None and train else None


def _or(value: float | None, default: float) -> float:
    return default if value is None or not math.isfinite(value) else value
