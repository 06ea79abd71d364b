"""What is said and drawn of a comparison of budgets: the sentence, the table, budget.md and budget.png."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

from w2s.compare.curves import arm_colour
from w2s.compare.report import markdown_table
from w2s.compare.sections import Table
from w2s.compare.text import AXIS_NAMES, interval_text, number_text, ratio_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOTE = (
    "Each run has a whole schedule of its length, and each arm its own settings at each length. The speedup is how "
    "much less budget an arm needs for the final quality that the reference has at this budget: the geometric mean "
    "over seeds with its 95 % interval, read off curves that are interpolated on the logarithm of the budget. `>` and "
    "`<`: in some seed that quality lies outside the arm's curve, so that there is only a bound; below 1 the arm needs "
    "more budget, not less. No figure: the seeds are bounded on different sides, or a cost was not recorded. "
    "Teacher paid: the teacher's own training is added to every budget of its arm."
)


def budget_report(result: dict, command: str) -> str:
    """The comparison as Markdown: the sentence, the curves, one table, and how to read them."""
    blocks = [f"# Quality against budget: {result['task']}, {result['metric']}", f"**{budget_verdict(result)}**"]
    blocks += ["![budget](budget.png)", markdown_table(budget_table(result)), NOTE]
    if not result["timed"]:
        blocks.append("Seconds are left out, since not all runs were made on the same kind of device.")
    if result["differences"]:
        blocks.append("Allowed to differ, beside what is tuned: " + "; ".join(result["differences"]) + ".")
    return "\n\n".join([*blocks, f"This report: `{command}`"]) + "\n"


def budget_verdict(result: dict) -> str:
    """The sentence about the first arm beside the reference, from the shortest to the longest budget."""
    reference, arm = list(result["arms"])[:2]
    unit = "update" if result["task"] == "diffusion" else "epoch"
    parts = []
    for length, entry in result["budgets"].items():
        speedup = entry["speedup"][arm]
        other = ("train_seconds", "train seconds") if result["timed"] else ("pflops", "PFLOPs")
        epochs, cost = (speedup_text(speedup[axis]) for axis in ("epoch", other[0]))
        budget = f"{length} {unit}{'' if length == '1' else 's'}"
        parts.append(f"with {budget}, {epochs} in {unit}s and {cost} in {other[1]}")
    return f"Iso-quality speedup of {arm} over {reference} at its final {result['metric']}: " + "; ".join(parts) + "."


def speedup_text(speedup: dict) -> str:
    """An iso-quality speedup with its interval, or the bound for it."""
    if speedup["geometric_mean"] is not None:
        low_high = speedup["interval"]
        interval = f" ({low_high[0]:.2f} to {low_high[1]:.2f})" if low_high else ""
        return ratio_text(speedup["geometric_mean"]) + interval
    if speedup["at_least"] is not None:
        return f"> {ratio_text(speedup['at_least'])}"
    return f"< {ratio_text(speedup['at_most'])}" if speedup["at_most"] is not None else "no figure"


def budget_table(result: dict) -> Table:
    """One row per budget and arm: what it was tuned to, its final metric, the gain, and the iso-quality speedups."""
    metric, reference = result["metric"], result["reference"]
    columns = {
        "epoch": "in epochs",
        "train_seconds": "in train seconds",
        "pflops": "in PFLOPs",
        "train_seconds_paid": "in train seconds, teacher paid",
        "pflops_paid": "in PFLOPs, teacher paid",
    }
    columns = {axis: name for axis, name in columns.items() if result["timed"] or "seconds" not in axis}
    rows = []
    for length, entry in result["budgets"].items():
        for arm in result["arms"]:
            own = entry["tuned"][arm]
            if own.get("lr") is not None:
                own = {name: value for name, value in own.items() if name != "lr_base"}  # which --lr overrides
            tuned = ", ".join(f"{name} {value}" for name, value in own.items() if value is not None)
            row = [length, arm, tuned, number_text(entry["final"][arm]["median"])]
            if arm == reference:
                row += [""] * (1 + len(columns))
            else:
                gain, speedup = entry["gain"][arm], entry["speedup"][arm]
                row.append(f"{number_text(gain['mean'])} ({interval_text(gain['interval'])})")
                row += [speedup_text(speedup[axis]) for axis in columns]
            rows.append(row)
    return Table(["budget", "arm", "settings", f"final {metric}", "gain", *columns.values()], rows)


def draw_budgets(result: dict, file: BinaryIO) -> None:
    """Draw final quality over budget as a PNG, on each axis of cost: each run a point, medians joined."""
    from matplotlib.figure import Figure  # slow to import: not before the input is checked

    axes = ("epoch", "train_seconds", "pflops") if result["timed"] else ("epoch", "pflops")
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for panel, axis in zip(figure.subplots(1, len(axes), sharey=True), axes, strict=True):
        for index, arm in enumerate(result["arms"]):
            _draw_arm(panel, result, arm, axis=axis, colour=arm_colour(index))
        panel.set(xlabel=f"{AXIS_NAMES[axis]} of the whole schedule", xscale="log")
        ticks = [entry["cost"][result["reference"]][axis] for entry in result["budgets"].values()]
        if None not in ticks:  # of the reference: powers of ten would say little, and their fractions overlap
            panel.set_xticks(ticks, [f"{tick:.2g}" if tick < 1 else number_text(tick) for tick in ticks])
            panel.set_xticks([], minor=True)
        panel.grid(alpha=0.25)
    figure.supylabel(f"final {result['metric']}", size="medium")
    entries = {}  # a panel has none of an arm whose costs on that axis were not recorded
    for panel in figure.axes:
        entries |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=len(entries), frameon=False)
    figure.savefig(file, format="png", dpi=160)


def _draw_arm(panel: Axes, result: dict, arm: str, *, axis: str, colour: str) -> None:
    entries = list(result["budgets"].values())
    costs = [entry["cost"][arm][axis] for entry in entries]
    if None in costs:
        return
    for cost, entry in zip(costs, entries, strict=True):
        runs = [value for value in entry["final"][arm]["runs"] if value is not None]
        panel.plot([cost] * len(runs), runs, ".", color=colour, alpha=0.6)
    medians = [entry["final"][arm]["median"] for entry in entries]
    panel.plot(costs, medians, "o-", color=colour, linewidth=2.5, label=arm)
    paid = [entry["cost"][arm][f"{axis}_paid"] for entry in entries] if axis != "epoch" else costs
    if paid != costs and None not in paid:
        panel.plot(paid, medians, ":", color=colour, linewidth=1.5, label=f"{arm}, teacher's training paid")
