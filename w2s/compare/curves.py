"""The curves of arms of runs: drawn as a PNG, and as the numbers that the page draws them from."""

from typing import BinaryIO

import numpy as np

from w2s.compare.runs import Run
from w2s.crossing import AXES, crossings

AXIS_NAMES = dict(zip(AXES, ("epochs", "updates", "samples", "train seconds", "total seconds", "PFLOPs"), strict=True))
# Okabe and Ito, told apart in all common kinds of colour vision; then three more for comparisons of many arms
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A5195", "#8C6D31", "#8A8A8A")


def colour_of(number: int) -> str:
    """The colour of the arm with this number."""
    return COLOURS[number % len(COLOURS)]


def progress_axis(result: dict) -> str:
    """What progress is counted in: updates of a diffusion model, epochs elsewhere."""
    return "update" if result["task"] == "diffusion" else "epoch"


def _logarithmic(result: dict, arms: dict[str, list[Run]]) -> bool:
    """Whether the metric falls by orders of magnitude, so that a linear scale would show its first values only."""
    values = np.concatenate([_columns(run, result["metric"])[0] for group in arms.values() for run in group])
    values = [*values[np.isfinite(values)], *map(float, result["targets"])]
    return result["mode"] == "min" and bool(0 < 10 * min(values) < max(values))


def _columns(run: Run, *names: str) -> np.ndarray:
    """Columns of a run as (names, evaluations); None becomes NaN."""
    return np.array([[row.get(name) for row in run.rows] for name in names], dtype=float)


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def switch_off(run: Run, axis: str) -> float | None:
    """Where on an axis the teacher of a run fell silent; the end of the run if it never did; None without a teacher."""
    if not run.summary["teacher"]:
        return None
    epochs, costs = _columns(run, "epoch", axis)
    off = run.summary["kd_off"]
    value = np.interp(off["epoch"], [0, *epochs], [0, *costs]) if off else costs[-1]
    return _finite(float(value))


def draw_curves(result: dict, arms: dict[str, list[Run]], file: BinaryIO) -> None:
    """Draw the metric over progress and over train seconds as a PNG: runs thin, medians bold, targets dashed."""
    from matplotlib.figure import Figure  # slow, and may write to stderr: not before the input is known to be good

    metric, worst = result["metric"], -np.inf if result["mode"] == "max" else np.inf
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    for panel, axis in zip(figure.subplots(1, 2, sharey=True), (progress_axis(result), "train_seconds"), strict=True):
        for number, (arm, group) in enumerate(arms.items()):
            colour, common = colour_of(number), min(len(run.rows) for run in group)
            for run in group:
                panel.plot(*_columns(run, axis, metric), color=colour, alpha=0.45, linewidth=1)
            x, y = np.array([_columns(run, axis, metric)[:, :common] for run in group]).swapaxes(0, 1)
            middle = np.median(np.where(np.isfinite(y), y, worst), axis=0)
            panel.plot(np.median(x, axis=0), middle, "o-", c=colour, lw=3, ms=4, label=f"{arm}, median of {len(group)}")
            for run in group:
                if off := run.summary["kd_off"]:
                    epochs, *curve = _columns(run, "epoch", axis, metric)
                    point = [np.interp(off["epoch"], epochs, values) for values in curve]
                    panel.plot(*point, "D", color=colour, markeredgecolor="black", zorder=3, label="teacher off")
        for tau in map(float, result["targets"]):
            panel.axhline(tau, color="0.3", linestyle="--", linewidth=1.2, label="target")
            panel.text(0.01, tau, f"{tau:.10g}", transform=panel.get_yaxis_transform(), va="bottom")
        panel.set(xlabel=AXIS_NAMES[axis], xlim=(0, None), yscale="log" if _logarithmic(result, arms) else "linear")
        panel.grid(alpha=0.25)
    figure.supylabel(f"{metric} ({'higher' if result['mode'] == 'max' else 'lower'} is better)", size="medium")
    entries = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))  # each label once
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=min(len(entries), 4), frameon=False)
    figure.savefig(file, format="png", dpi=160)


def page_data(result: dict, arms: dict[str, list[Run]]) -> dict:
    """What the page's script draws from: plain numbers and names, None where a value is missing or not finite."""
    metric, mode = result["metric"], result["mode"]
    groups = []
    for number, (arm, group) in enumerate(arms.items()):
        runs = []
        for run in group:
            marks = []
            for tau in result["targets"]:
                points = zip(("first", "confirmed"), crossings(run.rows, metric, float(tau), mode), strict=True)
                marks += [{"kind": kind, "tau": tau, **point} for kind, point in points if point]
            points = [
                {axis: _finite(row.get(axis)) for axis in AXES} | {"value": _finite(row.get(metric))}
                for row in run.rows
            ]
            off = {axis: switch_off(run, axis) for axis in AXES}
            runs.append({"name": run.summary["name"], "seed": run.seed, "points": points, "marks": marks, "off": off})
        groups.append({"name": arm, "colour": colour_of(number), "runs": runs})
    first = progress_axis(result)
    axes = [{"key": axis, "name": AXIS_NAMES[axis]} for axis in (first, *(axis for axis in AXES if axis != first))]
    shape = {"axes": axes, "log": _logarithmic(result, arms)}
    return {"metric": metric, "mode": mode, "targets": [*map(float, result["targets"])], "arms": groups} | shape
