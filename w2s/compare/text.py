"""How axes, numbers, ratios and intervals are written in the verdict, the tables and the drawings."""

from collections.abc import Callable
from statistics import median

AXIS_NAMES = {
    "epoch": "epochs",
    "update": "updates",
    "samples": "samples",
    "train_seconds": "train seconds",
    "total_seconds": "total seconds",
    "pflops": "PFLOPs",
}


def progress_axis(result: dict) -> str:
    """The axis that progress is counted on: updates of a diffusion model, epochs elsewhere."""
    return "update" if result["task"] == "diffusion" else "epoch"


def reaching_sign(result: dict) -> str:
    """The sign between the metric and a target that is reached."""
    return ">=" if result["mode"] == "max" else "<="


def number_text(value: float | None) -> str:
    """Four significant digits, or all digits before the decimal point."""
    if value is None:
        return "n/a"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def ratio_text(value: float | None) -> str:
    """A ratio with two decimals: 1.50x."""
    return "n/a" if value is None else f"{value:.2f}x"


def bound_or_ratio_text(ratio: float | None, lower_bound: float | None) -> str:
    """A ratio, or where there is none the lower bound for it: > 1.50x."""
    if ratio is None and lower_bound is not None:
        return f"> {ratio_text(lower_bound)}"
    return ratio_text(ratio)


def interval_text(interval: list[float] | None, text: Callable[[float | None], str] = number_text) -> str:
    """An interval [low, high], each end written by `text`."""
    return "n/a" if interval is None else f"{text(interval[0])} to {text(interval[1])}"


def bounds_text(bounds: list[float | None] | None) -> str:
    """The least and the greatest value that a ratio can have; 0 as the least and None as the greatest are no bound."""
    if bounds is None:
        return "n/a"
    low, high = bounds
    if low == 0:
        return "not bounded" if high is None else f"up to {ratio_text(high)}"
    return f"{ratio_text(low)} or more" if high is None else interval_text(bounds, ratio_text)


def paired_text(versus: dict) -> str:
    """The paired speedup of an entry of `targets[tau]["versus"][arm]` with its interval: 1.50x (1.20 to 1.80)."""
    text = bound_or_ratio_text(versus["geometric_mean"], versus["geometric_mean_lower_bound"])
    if versus["interval"]:
        low, high = versus["interval"]
        text += f" ({low:.2f} to {high:.2f})"
    return text


def run_cells(summary: dict, last: list[float | None]) -> list[str]:
    """Each run, the median and the range of a summary; a censored run is written `> E`.

    Args:
        summary: as `summarise` returns it.
        last: E, the cost of each run's last evaluation; None where nothing is known or no run can be censored.
    """
    marked = _marked_values(summary, last)
    known = sorted(pair for pair in marked if pair[1] is not None)
    ends = [mark + number_text(value) for mark, value in (*known[:1], *known[-1:])]
    each = ", ".join(mark + number_text(value) for mark, value in marked)
    return [each, median_text(summary, last), " to ".join(dict.fromkeys(ends)) or "n/a"]


def median_text(summary: dict, last: list[float | None]) -> str:
    """The median of a summary; `> E` if it is censored, E being the median with each run's last evaluation in place."""
    values = [value for _, value in _marked_values(summary, last)]
    if summary["median"] is None and None not in values:
        return f"> {number_text(median(values))}"
    return number_text(summary["median"])


def _marked_values(summary: dict, last: list[float | None]) -> list[tuple[str, float | None]]:
    """The value of each run after its mark: "> " where the run is censored and its last evaluation stands in."""
    marked = []
    for value, end in zip(summary["runs"], last, strict=True):
        censored = value is None and end is not None
        marked.append(("> ", end) if censored else ("", value))
    return marked
