"""Speedups, gains and costs of arms of runs as plain numbers: what speedup.json holds."""

import math

from w2s.compare.comparable import check_comparable
from w2s.compare.runs import RunFolder, read_teacher_runs, taught_by, total_cost
from w2s.compare.stats import interval, non_inferiority, ratio_of_pairs, sign_flip_p, summarise
from w2s.crossing import AXES, best_value, crossings, target_key

COST_AXES = ("train_seconds", "total_seconds", "pflops")  # the axes on which a teacher's training has a cost, too


def compare_arms(
    arms: dict[str, list[RunFolder]],
    targets: list[float],
    *,
    margin: float | None = None,
    allow: tuple[str, ...] = (),
) -> dict:
    """Crossings, medians, speedups and their uncertainty, final metrics and costs of arms.

    Args:
        arms: the runs of each arm, the reference first.
        targets: tau values.
        margin: how much worse the metric may end and still count as non-inferior.
        allow: settings in which the runs may differ.

    Returns:
        What speedup.json holds: `targets[tau][arm][axis]`, `targets[tau]["confirmed"][arm][axis]`, `final[arm]` and
        `best[arm]`, as `summarise` returns them; `targets[tau]["versus"][arm][axis]` for each arm but the reference,
        and of the first of them again as `targets[tau]["speedup"][axis]` and `["lower_bound"][axis]`;
        `gain[arm]["final" or "best"]`; `costs[arm]`; task, metric, mode; `arms[arm]`. None stands for what is
        censored, infinite, not recorded or not defined.

    Raises:
        ValueError: the runs may not be compared; see `check_comparable`.
    """
    differences = check_comparable(arms, allow)
    reference, *others = arms
    facts = arms[reference][0].summary
    metric, mode = facts["metric"], facts["mode"]
    final_and_best = {arm: final_and_best_of(group, metric, mode) for arm, group in arms.items()}
    costs = {arm: _costs(group) for arm, group in arms.items()}
    gain = {arm: {} for arm in others}
    for arm in others:
        for kind in ("final", "best"):
            before, after = final_and_best[reference][kind]["runs"], final_and_best[arm][kind]["runs"]
            pairs = _pair_by_seed(arms[reference], before, arms[arm], after)
            gain[arm][kind] = gain_of_pairs(pairs, mode, margin)
    return {
        "task": facts["task"],
        "metric": metric,
        "mode": mode,
        "reference": reference,
        "arms": {arm: [{"run": run.summary["name"], "seed": run.seed} for run in group] for arm, group in arms.items()},
        "final": {arm: values["final"] for arm, values in final_and_best.items()},
        "best": {arm: values["best"] for arm, values in final_and_best.items()},
        "differences": differences,
        "margin": margin,
        "gain": gain,
        "costs": costs,
        "targets": {target_key(target): _at_target(arms, target, costs) for target in targets},
    }


def final_and_best_of(group: list[RunFolder], metric: str, mode: str) -> dict:
    """The final and the best metric of an arm; a run that ends in NaN takes part as the worst, not as absent."""
    worst = -math.inf if mode == "max" else math.inf
    return {
        "final": summarise([_finite_or(run.rows[-1][metric], worst) for run in group]),
        "best": summarise([_finite_or(best_value(run.rows, metric, mode), worst) for run in group]),
    }


def _pair_by_seed(reference: list[RunFolder], before: list, group: list[RunFolder], after: list) -> list[tuple]:
    """The values of two arms, one per run of each, as pairs (before, after) of the seeds that both have."""
    by_seed = {run.seed: value for run, value in zip(reference, before, strict=True)}
    return [(by_seed[run.seed], value) for run, value in zip(group, after, strict=True) if run.seed in by_seed]


def gain_of_pairs(pairs: list[tuple], mode: str, margin: float | None) -> dict:
    """How much better the metric of an arm is, positive being better: mean over pairs, interval, p and verdict."""
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    gains = [after - before if mode == "max" else before - after for before, after in known]
    complete = bool(gains) and len(known) == len(pairs)  # a diverged run has no number to take a mean of
    gain_interval = interval(gains) if complete else None
    return {
        "mean": math.fsum(gains) / len(gains) if complete else None,
        "interval": gain_interval and [gain_interval["low"], gain_interval["high"]],
        "p": sign_flip_p(gains) if complete else None,
        "verdict": None if margin is None else non_inferiority(gain_interval, margin),
    }


def _at_target(arms: dict[str, list[RunFolder]], target: float, costs: dict) -> dict:
    """The entry of one target in speedup.json."""
    reference, *others = arms
    crossed = {arm: [_crossing_costs(run, target) for run in group] for arm, group in arms.items()}
    entry: dict = {"speedup": {}, "lower_bound": {}, "confirmed": {}, "versus": {}}
    for arm, runs in crossed.items():
        entry[arm] = {axis: summarise([run[axis]["first"] for run in runs]) for axis in AXES}
        entry["confirmed"][arm] = {axis: summarise([run[axis]["confirmed"] for run in runs]) for axis in AXES}
    for arm in others:
        training = costs[arm]["teacher_training"]
        entry["versus"][arm] = {}
        for axis in AXES:
            before, after = [run[axis] for run in crossed[reference]], [run[axis] for run in crossed[arm]]
            versus = _versus(_pair_by_seed(arms[reference], before, arms[arm], after), before, after)
            if training and axis in COST_AXES:
                medians = [entry[name][axis]["median"] for name in (reference, arm)]
                versus |= _with_teachers_paid(*medians, _training_cost(arms, costs, reference, axis), training[axis])
            entry["versus"][arm][axis] = versus
    for key in ("speedup", "lower_bound"):
        entry[key] = {axis: entry["versus"][others[0]][axis][key] for axis in AXES}
    return entry


def _crossing_costs(run: RunFolder, target: float) -> dict:
    """What it cost a run to reach a target.

    Returns:
        For each axis the costs of `first` and `confirmed`, infinite where there is no such crossing; of `previous`,
        the evaluation before the first crossing, 0 at the start of the run; and of `at_least`, the first crossing or,
        where there is none, the last evaluation. NaN where the axis was not recorded.
    """
    first, confirmed = crossings(run.rows, run.summary["metric"], target, run.summary["mode"])
    before = [row for row in run.rows if first is None or row["update"] < first["update"]]
    costs = {}
    for axis in AXES:
        points = {"first": first, "confirmed": confirmed, "previous": before[-1] if before else {axis: 0.0}}
        points["at_least"] = first or run.rows[-1]
        costs[axis] = {
            name: math.inf if point is None else _finite_or(point.get(axis), math.nan) for name, point in points.items()
        }
    return costs


def _versus(pairs: list[tuple[dict, dict]], before: list[dict], after: list[dict]) -> dict:
    """One arm against the reference on one axis: the ratio of medians over all runs, and the view paired by seed.

    A censored run crosses after its last evaluation, if at all. With that evaluation in place of infinity the median
    of the reference is a lower bound, also where an even number of runs averages a crossed and a censored one. The
    p-value takes censored runs in the same way, and a pair of two censored runs as equal: swapping the arms of a pair
    swaps these values as well.

    Args:
        pairs: the costs of (reference, other arm) of each seed.
        before, after: the costs of all runs of the reference and of the other arm.
    """
    middle_before = summarise([run["first"] for run in before])["median"]
    middle_after = summarise([run["first"] for run in after])["median"]
    least_before = summarise([run["at_least"] for run in before])["median"]
    bounded = middle_before is None and least_before is not None and bool(middle_after)
    paired = ratio_of_pairs([b["first"] for b, _ in pairs], [a["first"] for _, a in pairs])
    both_censored = [b["first"] == a["first"] == math.inf for b, a in pairs]
    logs = []  # of the ratios with censored runs at their last evaluation; none where a cost was not recorded
    if all(0 < run["at_least"] < math.inf for pair in pairs for run in pair):
        for (b, a), censored in zip(pairs, both_censored, strict=True):
            logs.append(0.0 if censored else math.log(b["at_least"] / a["at_least"]))
    bounded_pairs = bool(logs) and paired["geometric_mean"] is None and all(a["first"] < math.inf for _, a in pairs)
    return {
        "speedup": middle_before / middle_after if middle_before is not None and middle_after else None,
        "lower_bound": least_before / middle_after if bounded else None,
        **paired,
        "geometric_mean_lower_bound": mean_ratio(logs) if bounded_pairs else None,
        "p": sign_flip_p(logs) if logs and not all(both_censored) else None,
        "resolution": _resolution(pairs) if paired["geometric_mean"] else None,
    }


def _resolution(pairs: list[tuple[dict, dict]]) -> list[float | None]:
    """The least and the greatest geometric mean that the grid leaves open: each crossing lies between two evaluations.

    0 and None where it has no bound, since a crossing lies before the first evaluation.
    """
    least = [_log_ratio(before["previous"], after["first"]) for before, after in pairs]
    greatest = [_log_ratio(before["first"], after["previous"]) for before, after in pairs]
    return [mean_ratio(least), mean_ratio(greatest)]


def _log_ratio(one: float, other: float) -> float:
    """log(one / other) for costs of which either may be 0."""
    if one == 0:
        return -math.inf
    return math.inf if other == 0 else math.log(one / other)


def mean_ratio(logs: list[float]) -> float | None:
    """The geometric mean of ratios given as logarithms; None where it is infinite."""
    mean = sum(logs) / len(logs)
    return math.exp(mean) if mean < math.inf else None


def _training_cost(arms: dict[str, list[RunFolder]], costs: dict, arm: str, axis: str) -> float | None:
    """What the training of an arm's teachers cost: 0 for students alone, None where that is not known."""
    training = costs[arm]["teacher_training"]
    if training is None:
        return 0.0 if not any(run.summary["teacher"] for run in arms[arm]) else None
    return training[axis]


def _with_teachers_paid(
    before: float | None, after: float | None, training_before: float | None, training: float | None
) -> dict:
    """The speedup with the training of both arms' teachers in the bill, and after how many students it is paid back.

    The second is None where the reference has a teacher, too, whose training is not saved by doing without it.
    """
    if None in (before, after, training_before, training):
        return {"speedup_with_teacher": None, "paid_back_after": None}
    saved = before - after
    return {
        "speedup_with_teacher": (before + training_before) / (after + training),
        "paid_back_after": math.ceil(training / saved) if saved > 0 and not training_before else None,
    }


def _costs(group: list[RunFolder]) -> dict:
    """What the teacher of an arm cost: in the updates it taught, beside the bound by FLOPs, and in its own training."""
    first = group[0]
    flops, teacher = first.summary.get("flops") or {}, first.summary["teacher"]
    forward_share = _forward_flops(first) / (flops.get("student_update") or math.inf)
    training = None
    if teacher and (teacher_runs := read_teacher_runs(group)):
        training = {"run": ", ".join(run.summary["name"] for run in teacher_runs)}
        training |= {axis: total_cost(teacher_runs, axis) for axis in COST_AXES}
    return {
        "overhead": [_overhead(run) for run in group] if teacher else None,  # of an update with the teacher, per run
        "flops_bound": 1 + forward_share if forward_share else None,
        "share": [teacher_share(run.rows[-1]) for run in group] if teacher else None,  # of all train seconds
        "kd_off": [run.summary["kd_off"] for run in group],
        "teacher_training": training,
    }


def _forward_flops(run: RunFolder) -> float:
    """FLOPs of the teacher's forward in an update that it took part in; of several teachers, the mean."""
    if run.summary["teachers"] and (taught := taught_by(run)):
        return 1e15 * sum(teacher["pflops"] for teacher in taught) / sum(teacher["updates"] for teacher in taught)
    return (run.summary.get("flops") or {}).get("teacher_forward", 0)


def _overhead(run: RunFolder) -> float | None:
    """Train seconds of an update with the teacher over one without, up to the last evaluation that was still taught."""
    taught = [row for row in run.rows if row.get("kd_active")]
    share = teacher_share(taught[-1]) if taught else None
    return 1 / (1 - share) if share is not None and share < 1 else None


def teacher_share(row: dict) -> float | None:
    """The share of train seconds up to an evaluation that the teacher took; None where they were not recorded."""
    teacher_seconds, train_seconds = row.get("teacher_seconds"), row.get("train_seconds")
    return teacher_seconds / train_seconds if teacher_seconds is not None and train_seconds else None


def _finite_or(value: float | None, default: float) -> float:
    return default if value is None or not math.isfinite(value) else value
