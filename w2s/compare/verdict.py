"""A comparison in one sentence, and how its numbers are written."""

from w2s.compare.curves import AXIS_NAMES, progress_axis
from w2s.compare.runs import Run


def number(value: float | None) -> str:
    """Four digits, or all before the point."""
    return "n/a" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def times(value: float | None, mark: str = "") -> str:
    """A ratio as text."""
    return "n/a" if value is None else f"{mark}{value:.2f}x"


def span_text(pair: list | None, show=number) -> str:
    return "n/a" if pair is None else f"{show(pair[0])} to {'any' if pair[1] is None else show(pair[1])}"


def verdict(result: dict, arms: dict[str, list[Run]]) -> str:
    """The one sentence, of the first arm beside the reference.

    The hardest target that both medians reach, or that bounds the speedup, and the final metric.
    """
    metric, sign, reference = result["metric"], ">=" if result["mode"] == "max" else "<=", result["reference"]
    unit, arm = progress_axis(result), next(iter(result["gain"]))
    entries = {tau: entry["versus"][arm] for tau, entry in result["targets"].items()}
    ended = _gain_text(result["gain"][arm]["final"], f"final {metric}")
    reached = [tau for tau, v in entries.items() if v[unit]["speedup"] or v[unit]["lower_bound"]]
    if not reached:
        return f"{arm} shows no speedup over {reference}, for no target is reached by its median; {ended}."
    tau = reached[-1]
    after, before = (result["targets"][tau][name][unit] for name in (arm, reference))
    instead = number(before["median"]) if before["median"] is not None else "never within the run"
    claims = " and ".join(_claim(entries[tau][axis], AXIS_NAMES[axis]) for axis in (unit, "train_seconds"))
    counts = f"medians of {len(arms[reference])} and {len(arms[arm])} runs"
    return (
        f"{arm} reaches {metric} {sign} {tau} at {unit} {number(after['median'])} instead of {instead} "
        f"({counts}); paired by seed, {claims}; {ended}."
    )


def _claim(versus: dict, name: str) -> str:
    """A speedup in one axis with its doubt; the word "shown" stands only where the interval leaves 1 out."""
    if (ratio := versus["geometric_mean"]) is None:
        bound = versus["geometric_mean_lower_bound"] or versus["lower_bound"]
        return f"at least {times(bound)} in {name}, some runs being censored" if bound else f"no figure in {name}"
    if (span := versus["interval"]) is None:
        return f"{times(ratio)} in {name} (no interval: one pair, or all pairs alike; p {versus['p']:.2g})"
    shown = "faster" if span[0] > 1 else "slower" if span[1] < 1 else "not shown to differ from 1"
    return f"{times(ratio)} in {name} (95 % interval {span_text(span, times)}: {shown}; p {versus['p']:.2g})"


def _gain_text(gain: dict, name: str) -> str:
    if gain["mean"] is None:
        return f"{name} cannot be compared: a run diverged or has no partner"
    span = f" (95 % interval of the gain {span_text(gain['interval'])})" if gain["interval"] else ""
    word = f", {gain['verdict']}" if gain["verdict"] else ""
    return f"{name} {number(abs(gain['mean']))} {'better' if gain['mean'] >= 0 else 'worse'}{span}{word}"
