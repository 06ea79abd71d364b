"""Speedup against the strength of the teacher: a point an arm, each arm with its own teacher (w2s.compare --strength).

The gap is that of the reporting split: the final metric of the reference, the median of its seeds, less the teacher's;
positive where the teacher is the weaker one, whichever way the metric counts.
"""

from typing import BinaryIO

from w2s.compare.runs import Run

AXES = {"epoch": "epochs", "train_seconds": "train seconds"}


def strength_points(result: dict, arms: dict[str, list[Run]]) -> list[dict]:
    """What is drawn, the strongest teacher first: `{"arm", "teacher", "gap", "speedup": {tau: {axis: ...}}}`.

    Each speedup has `value` (geometric mean of the pairs), its `interval`, and `lower_bound` where the reference is
    censored; None where not defined. Arms without a teacher are left out.

    Raises:
        ValueError: fewer than two arms with a teacher, or a reference without a final metric.
    """
    reference, *others = arms
    sign, final = (1 if result["mode"] == "max" else -1), result["final"][reference]["median"]
    taught = {arm: run.summary["teacher"] for arm in others if (run := arms[arm][0]).summary["teacher"]}
    if len(taught) < 2:
        raise ValueError("--strength compares teachers: give at least two arms with a teacher beside the reference")
    if final is None:
        raise ValueError(f"--strength: {reference} has no final {result['metric']} to compare the teachers with")
    points = []
    for arm, teacher in taught.items():
        speedup = {}
        for tau, entry in result["targets"].items():
            found = {axis: entry["versus"][arm][axis] for axis in AXES}
            speedup[tau] = {
                axis: {
                    "value": versus["geometric_mean"],
                    "interval": versus["interval"],
                    "lower_bound": versus["geometric_mean_lower_bound"],
                }
                for axis, versus in found.items()
            }
        gap = sign * (final - teacher["report"])
        points.append({"arm": arm, "teacher": teacher["report"], "gap": gap, "speedup": speedup})
    return sorted(points, key=lambda point: point["gap"])


def draw_strength(result: dict, file: BinaryIO) -> None:
    """Draw the points as a PNG: a panel an axis, a line a target; a triangle points up from a lower bound."""
    from matplotlib.figure import Figure  # slow: not before the input is known to be good

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for panel, (axis, name) in zip(figure.subplots(1, 2, sharey=True), AXES.items(), strict=True):
        for number, tau in enumerate(result["targets"]):
            at = [(point["gap"], point["speedup"][tau][axis]) for point in result["strength"]]
            known = [(gap, found) for gap, found in at if found["value"] is not None]
            line = panel.plot(*_columns(known, "value"), "o-", color=f"C{number}", label=f"target {tau}")[0]
            bounds = [(gap, found) for gap, found in at if found["value"] is None and found["lower_bound"]]
            panel.plot(*_columns(bounds, "lower_bound"), "^", color=line.get_color(), mfc="none")
            for gap, found in known:
                if found["interval"]:
                    panel.plot([gap, gap], found["interval"], color=line.get_color(), alpha=0.4, linewidth=2)
        panel.axhline(1, color="0.3", linewidth=1)
        panel.axvline(0, color="0.3", linewidth=1, linestyle=":")
        panel.set(xlabel=f"teacher weaker by, {result['metric']} at the end of {result['reference']}", title=name)
        panel.grid(alpha=0.25)
    figure.supylabel(f"speedup over {result['reference']}, paired", size="medium")
    panel.legend(frameon=False)
    figure.savefig(file, format="png", dpi=160)


def _columns(pairs: list[tuple[float, dict]], key: str) -> tuple[list[float], list[float]]:
    return [gap for gap, _ in pairs], [found[key] for _, found in pairs]
