"""The curves of arms of runs: drawn as a PNG, and as the numbers that the page draws them from."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from w2s.compare.runs import RunFolder
from w2s.compare.text import AXIS_NAMES, progress_axis
from w2s.crossing import AXES, crossings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's, which people with any common kind of colour vision can tell apart, and three more for many arms
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A5195", "#8C6D31", "#8A8A8A")


def arm_colour(index: int) -> str:
    """The colour of the arm with this index."""
    return COLOURS[index % len(COLOURS)]


def _columns(run: RunFolder, *names: str) -> np.ndarray:
    """Columns of a run as an array (names, evaluations), NaN where a value is missing."""
    return np.array([[row.get(name) for row in run.rows] for name in names], dtype=float)


def _is_logarithmic(result: dict, arms: dict[str, list[RunFolder]]) -> bool:
    """Whether the metric falls by an order of magnitude, so that a linear scale would only show its first values."""
    values = np.concatenate([_columns(run, result["metric"])[0] for group in arms.values() for run in group])
    values = [*values[np.isfinite(values)], *(float(target) for target in result["targets"])]
    return result["mode"] == "min" and bool(0 < 10 * min(values) < max(values))


def _teaching_end(run: RunFolder, axis: str) -> float | None:
    """The cost on an axis at which the teacher of a run was switched off, or of the whole run if it never was.

    None where there was no teacher or the axis was not recorded.
    """
    if not run.summary["teacher"]:
        return None
    epochs, costs = _columns(run, "epoch", axis)
    switch_off = run.summary["kd_off"]
    cost = np.interp(switch_off["epoch"], [0, *epochs], [0, *costs]) if switch_off else costs[-1]
    return _finite(float(cost))


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def draw_curves(result: dict, arms: dict[str, list[RunFolder]], file: BinaryIO) -> None:
    """Draw the metric over progress and over train seconds as a PNG: runs thin, medians bold, targets dashed.

    Args:
        result: as `compare_arms` returns it.
        arms: the runs of each arm.
        file: takes the PNG.
    """
    from matplotlib.figure import Figure  # slow to import, and may write to stderr: not before the input is checked

    metric = result["metric"]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    for panel, axis in zip(figure.subplots(1, 2, sharey=True), (progress_axis(result), "train_seconds"), strict=True):
        for index, group in enumerate(arms.values()):
            _draw_arm(panel, group, axis=axis, result=result, colour=arm_colour(index), name=list(arms)[index])
        for target in result["targets"]:
            height = float(target)
            panel.axhline(height, color="0.3", linestyle="--", linewidth=1.2, label="target")
            panel.text(0.01, height, target, transform=panel.get_yaxis_transform(), va="bottom")
        panel.set(xlabel=AXIS_NAMES[axis], xlim=(0, None), yscale="log" if _is_logarithmic(result, arms) else "linear")
        panel.grid(alpha=0.25)
    figure.supylabel(f"{metric} ({'higher' if result['mode'] == 'max' else 'lower'} is better)", size="medium")
    handles, labels = panel.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))  # each label once
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=min(len(entries), 4), frameon=False)
    figure.savefig(file, format="png", dpi=160)


def _draw_arm(panel: Axes, group: list[RunFolder], *, axis: str, result: dict, colour: str, name: str) -> None:
    """Draw the runs of an arm, their median over the evaluations that all have, and each switch-off."""
    metric, worst = result["metric"], -np.inf if result["mode"] == "max" else np.inf
    for run in group:
        panel.plot(*_columns(run, axis, metric), color=colour, alpha=0.45, linewidth=1)
    common = min(len(run.rows) for run in group)
    x = np.array([_columns(run, axis)[0][:common] for run in group])
    y = np.array([_columns(run, metric)[0][:common] for run in group])
    middle = np.median(np.where(np.isfinite(y), y, worst), axis=0)
    label = f"{name}, median of {len(group)}"
    panel.plot(np.median(x, axis=0), middle, "o-", color=colour, linewidth=3, markersize=4, label=label)
    for run in group:
        if switch_off := run.summary["kd_off"]:
            epochs, costs, values = _columns(run, "epoch", axis, metric)
            cost = np.interp(switch_off["epoch"], [0, *epochs], [0, *costs])
            point = cost, np.interp(switch_off["epoch"], epochs, values)
            panel.plot(*point, "D", color=colour, markeredgecolor="black", zorder=3, label="teacher off")


def page_data(result: dict, arms: dict[str, list[RunFolder]]) -> dict:
    """What the page's script draws from: plain numbers and names, None where a value is missing or not finite."""
    first = progress_axis(result)
    axes = [first, *(axis for axis in AXES if axis != first)]
    groups = []
    for index, (arm, group) in enumerate(arms.items()):
        groups.append({"name": arm, "colour": arm_colour(index), "runs": [_run_data(run, result) for run in group]})
    return {
        "metric": result["metric"],
        "mode": result["mode"],
        "targets": [float(target) for target in result["targets"]],
        "arms": groups,
        "axes": [{"key": axis, "name": AXIS_NAMES[axis]} for axis in axes],
        "log": _is_logarithmic(result, arms),
    }


def _run_data(run: RunFolder, result: dict) -> dict:
    """A run's part of the page's data: its evaluations, its crossings and where the teacher was switched off."""
    metric, marks = result["metric"], []
    for target in result["targets"]:
        first, confirmed = crossings(run.rows, metric, float(target), result["mode"])
        for kind, crossing in (("first", first), ("confirmed", confirmed)):
            if crossing:
                marks.append({"kind": kind, "tau": target, **crossing})
    points = []
    for row in run.rows:
        point = {axis: _finite(row.get(axis)) for axis in AXES}
        points.append(point | {"value": _finite(row.get(metric))})
    ends = {axis: _teaching_end(run, axis) for axis in AXES}
    return {"name": run.summary["name"], "seed": run.seed, "points": points, "marks": marks, "off": ends}
