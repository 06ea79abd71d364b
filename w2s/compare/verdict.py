"""A comparison in one sentence."""

from w2s.compare.runs import RunFolder
from w2s.compare.text import AXIS_NAMES, interval_text, number_text, progress_axis, ratio_text, reaching_sign


def verdict(result: dict, arms: dict[str, list[RunFolder]]) -> str:
    """The sentence about the first arm beside the reference.

    It speaks of the hardest target whose speedup is known or bounded, and of the final metric.

    Args:
        result: as `compare_arms` returns it.
        arms: the runs of each arm, the reference first.
    """
    reference, arm = list(arms)[:2]
    unit = progress_axis(result)
    versus = {target: entry["versus"][arm] for target, entry in result["targets"].items()}
    final = _gain_text(result["gain"][arm]["final"], name=f"final {result['metric']}")
    reached = [target for target, axes in versus.items() if axes[unit]["speedup"] or axes[unit]["lower_bound"]]
    if not reached:
        return f"{arm} shows no speedup over {reference}: {_nothing_reached_text(result, arms)}; {final}."
    target = reached[-1]
    before = result["targets"][target][reference][unit]["median"]
    after = result["targets"][target][arm][unit]["median"]
    goal = f"{result['metric']} {reaching_sign(result)} {target}"
    counts = f"medians of {len(arms[reference])} and {len(arms[arm])} runs"
    if before == after:
        lead = f"{arm} and {reference} both reach {goal} at {unit} {number_text(after)}, neither of them earlier"
    else:
        instead = number_text(before)
        if before is None:
            crossed = any(run is not None for run in result["targets"][target][reference][unit]["runs"])
            instead = "never within the run" + (", in the median" if crossed else "")
        lead = f"{arm} reaches {goal} at {unit} {number_text(after)} instead of {instead}"
    claims = [_speedup_text(versus[target][axis], name=AXIS_NAMES[axis]) for axis in (unit, "train_seconds")]
    return f"{lead} ({counts}); paired by seed, {' and '.join(claims)}; {final}."


def _nothing_reached_text(result: dict, arms: dict[str, list[RunFolder]]) -> str:
    """That the median of the first arm reaches no target, and which of them the median of the reference reaches."""
    reference, arm = list(arms)[:2]
    unit, targets = progress_axis(result), result["targets"]
    goals = f"{result['metric']} {reaching_sign(result)} {' or '.join(targets)}"
    seeds = len(arms[arm])
    runs = f"the median over the {seeds} seeds of {arm}" if seeds > 1 else f"the run of {arm}"
    text = f"{runs} does not reach {goals}"
    points = {target: entry[reference][unit]["median"] for target, entry in targets.items()}
    if reached := [target for target, point in points.items() if point is not None]:
        text += f", that of {reference} reaches {reached[-1]} at {unit} {number_text(points[reached[-1]])}"
    return text


def _speedup_text(versus: dict, name: str) -> str:
    """A speedup on one axis and how sure it is; "faster" and "slower" only where the interval leaves 1 out."""
    ratio, interval = versus["geometric_mean"], versus["interval"]
    if ratio is None:
        bound = versus["geometric_mean_lower_bound"] or versus["lower_bound"]
        return f"at least {ratio_text(bound)} in {name}, some runs being censored" if bound else f"no figure in {name}"
    if interval is None:
        doubt = "no interval: one pair, or all pairs alike"
    elif interval[0] > 1:
        doubt = f"95 % interval {interval_text(interval, ratio_text)}: faster"
    elif interval[1] < 1:
        doubt = f"95 % interval {interval_text(interval, ratio_text)}: slower"
    else:
        doubt = f"95 % interval {interval_text(interval, ratio_text)}: not shown to differ from 1"
    return f"{ratio_text(ratio)} in {name} ({doubt}; p {versus['p']:.2g})"


def _gain_text(gain: dict, name: str) -> str:
    """The gain in a metric, its interval and, where a margin was given, the verdict on it."""
    if gain["mean"] is None:
        return f"{name} cannot be compared: a run diverged or has no partner"
    if gain["mean"] == 0:
        text = f"{name} the same on average"
    else:
        text = f"{name} {number_text(abs(gain['mean']))} {'better' if gain['mean'] > 0 else 'worse'}"
    if gain["interval"]:
        text += f" (95 % interval of the gain {interval_text(gain['interval'])})"
    return f"{text}, {gain['verdict']}" if gain["verdict"] else text
