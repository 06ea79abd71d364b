"""Speedup against the strength of the teacher: one point per arm, each arm having its own teacher (--strength).

The gap is measured on the reporting split: the final metric of the reference, the median over its seeds, minus the
teacher's. It is positive where the teacher is the weaker one, whichever way the metric counts.
"""

from typing import BinaryIO

from w2s.compare.runs import RunFolder
from w2s.compare.text import AXIS_NAMES

STRENGTH_AXES = ("epoch", "train_seconds")


def strength_points(result: dict, arms: dict[str, list[RunFolder]]) -> list[dict]:
    """The points to draw, the strongest teacher first; arms without a teacher are left out.

    Args:
        result: as `compare_arms` returns it.
        arms: the runs of each arm, the reference first.

    Returns:
        `{"arm", "teacher", "gap", "speedup": {tau: {axis: {"value", "interval", "lower_bound"}}}}` each: the geometric
        mean of the pairs, its interval, and the lower bound where the reference is censored; None where not defined.

    Raises:
        ValueError: fewer than two arms have a teacher, or the reference has no final metric.
    """
    reference, *others = arms
    sign = 1 if result["mode"] == "max" else -1
    final = result["final"][reference]["median"]
    teachers = {arm: teacher for arm in others if (teacher := arms[arm][0].summary["teacher"])}
    if len(teachers) < 2:
        raise ValueError("--strength compares teachers: give at least two arms with a teacher beside the reference")
    if final is None:
        raise ValueError(f"--strength: {reference} has no final {result['metric']} to compare the teachers with")
    points = []
    for arm, teacher in teachers.items():
        speedup = {}
        for target, entry in result["targets"].items():
            speedup[target] = {axis: _speedup(entry["versus"][arm][axis]) for axis in STRENGTH_AXES}
        gap = sign * (final - teacher["report"])
        points.append({"arm": arm, "teacher": teacher["report"], "gap": gap, "speedup": speedup})
    return sorted(points, key=lambda point: point["gap"])


def _speedup(versus: dict) -> dict:
    return {
        "value": versus["geometric_mean"],
        "interval": versus["interval"],
        "lower_bound": versus["geometric_mean_lower_bound"],
    }


def draw_strength(result: dict, file: BinaryIO) -> None:
    """Draw the points as a PNG: one panel per axis, one line per target; a triangle points up from a lower bound.

    Args:
        result: as `compare_arms` returns it, with `strength` as `strength_points` returns it.
        file: takes the PNG.
    """
    from matplotlib.figure import Figure  # slow to import: not before the input is checked

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for panel, axis in zip(figure.subplots(1, 2, sharey=True), STRENGTH_AXES, strict=True):
        for index, target in enumerate(result["targets"]):
            points = [(point["gap"], point["speedup"][target][axis]) for point in result["strength"]]
            known = [(gap, speedup) for gap, speedup in points if speedup["value"] is not None]
            bounded = [(gap, speedup) for gap, speedup in points if speedup["value"] is None and speedup["lower_bound"]]
            colour = f"C{index}"
            panel.plot(*_xy(known, "value"), "o-", color=colour, label=f"target {target}")
            panel.plot(*_xy(bounded, "lower_bound"), "^", color=colour, markerfacecolor="none")
            for gap, speedup in known:
                if speedup["interval"]:
                    panel.plot([gap, gap], speedup["interval"], color=colour, alpha=0.4, linewidth=2)
        panel.axhline(1, color="0.3", linewidth=1)
        panel.axvline(0, color="0.3", linewidth=1, linestyle=":")
        gap_name = f"teacher weaker by, {result['metric']} at the end of {result['reference']}"
        panel.set(xlabel=gap_name, title=AXIS_NAMES[axis])
        panel.grid(alpha=0.25)
    figure.supylabel(f"speedup over {result['reference']}, paired", size="medium")
    panel.legend(frameon=False)
    figure.savefig(file, format="png", dpi=160)


def _xy(points: list[tuple[float, dict]], key: str) -> tuple[list[float], list[float]]:
    """The gaps of points and one number of their speedups."""
    return [gap for gap, _ in points], [speedup[key] for _, speedup in points]
