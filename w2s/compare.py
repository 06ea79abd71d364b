"""How much earlier did the treated runs reach a target? Run folders in; speedup.json, report.md, curves.png out.

python -m w2s.compare --baseline RUN... --treated RUN... [--target TAU...] --out DIR
"""

import argparse
import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import BinaryIO, NamedTuple

from w2s.crossing import AXES, best_value, crossings, read_metrics, replacing, target_key

AXIS_NAMES = dict(zip(AXES, ("epochs", "updates", "samples", "train seconds", "total seconds", "PFLOPs"), strict=True))
COLOURS = ("#0072B2", "#D55E00")  # Okabe-Ito blue and vermilion: told apart in all common kinds of colour vision
FIELDS = dict.fromkeys(("task", "name", "status", "metric", "mode"), str) | {"targets": dict}
FIELDS |= dict.fromkeys(("teacher", "kd_off", "environment"), dict | None)


class Run(NamedTuple):
    """A finished run: `summary` as in summary.json; `rows` one dict an evaluation, each update once, in order."""

    folder: Path
    summary: dict
    rows: list[dict]


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises ValueError: a file is missing or malformed, or the run is unfinished or empty."""
    metrics, facts = folder / "metrics.csv", folder / "summary.json"
    for path in (folder, metrics, facts):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
    try:
        summary = json.loads(facts.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{facts} is not JSON: {error}") from None
    for key, kind in FIELDS.items():
        if not isinstance(summary, dict) or not isinstance(summary.get(key), kind):
            raise ValueError(f"{facts}: {key!r} is missing or malformed")
    if summary["mode"] not in ("max", "min"):
        raise ValueError(f"{facts}: 'mode' is neither max nor min")
    if summary["status"] != "finished":
        raise ValueError(f"{folder} is not a finished run: its status is {summary['status']!r}")
    rows = read_metrics(metrics)
    if not rows:
        raise ValueError(f"{metrics} has no rows")
    if summary["metric"] not in rows[0]:
        raise ValueError(f"{metrics} has no column {summary['metric']!r}")
    if not all(math.isfinite(_or(row.get(key), math.nan)) for row in rows for key in ("epoch", "update")):
        raise ValueError(f"{metrics} has a row without epoch or update")
    return Run(folder, summary, [row for _, row in sorted({row["update"]: row for row in rows}.items())])


def choose_targets(runs: list[Run], given: list[float] | None = None) -> list[float]:
    """The targets given, else all of the runs, the easiest first. Raises ValueError: none, or not a finite number."""
    targets = {target_key(tau): tau for tau in given or [float(key) for run in runs for key in run.summary["targets"]]}
    if not targets or not all(map(math.isfinite, targets.values())):
        raise ValueError(f"target not finite: {', '.join(targets)}" if targets else "no targets: --target gives them")
    return sorted(targets.values(), reverse=runs[0].summary["mode"] == "min")


def compare(arms: dict[str, list[Run]], targets: list[float]) -> dict:
    """Crossings, medians and speedups of two arms, the reference first, at each tau in `targets`.

    Raises ValueError where runs differ in task, metric, mode or evaluation grid. Returns:
        What speedup.json holds: `targets[tau][arm][axis]`, `targets[tau]["confirmed"][arm][axis]`, `final[arm]` and
        `best[arm]`, each `{"runs": [...], "median": x}`; `targets[tau]["speedup"][axis]` and `["lower_bound"][axis]`;
        task, metric, mode; `arms[arm]`. None: censored, an infinite median, not recorded or not defined.
    """
    runs = [run for group in arms.values() for run in group]
    folder, summary, rows = runs[0]
    for run in runs[1:]:
        for key in ("task", "metric", "mode"):
            if (one := summary[key]) != (other := run.summary[key]):
                raise ValueError(f"the runs differ in {key}: {one!r} in {folder}, {other!r} in {run.folder}")
        if [round(row["epoch"], 6) for row in run.rows] != [round(row["epoch"], 6) for row in rows]:
            raise ValueError(f"the runs differ in the epochs of their evaluations: {folder}, {run.folder}")
    metric, mode = summary["metric"], summary["mode"]
    worst = -math.inf if mode == "max" else math.inf  # a run that ends in NaN takes part in the median
    result = {key: summary[key] for key in ("task", "metric", "mode")} | {"arms": {}, "final": {}, "best": {}}
    for arm, group in arms.items():
        result["arms"][arm] = [{"run": run.summary["name"], "seed": run.summary.get("seed")} for run in group]
        result["final"][arm] = _spread([_or(run.rows[-1][metric], worst) for run in group])
        result["best"][arm] = _spread([_or(best_value(run.rows, metric, mode), worst) for run in group])
    return result | {"targets": {target_key(target): _at_target(arms, target, metric, mode) for target in targets}}


def _at_target(arms: dict[str, list[Run]], target: float, metric: str, mode: str) -> dict:
    result: dict = {"speedup": {}, "lower_bound": {}, "confirmed": {}}
    floors = {}
    for arm, group in arms.items():
        first, confirmed = zip(*(crossings(run.rows, metric, target, mode) for run in group), strict=True)
        result[arm], result["confirmed"][arm] = _costs(first), _costs(confirmed)
        # A censored run crosses after its last evaluation, if ever: with that in place of infinity the median is below
        # the true one, also where an even number of runs takes the mean of a crossed and a censored one.
        floors[arm] = _costs([point or run.rows[-1] for point, run in zip(first, group, strict=True)])
    reference, treated = arms
    for axis in AXES:
        before, after, floor = (x[axis]["median"] for x in (result[reference], result[treated], floors[reference]))
        result["speedup"][axis] = before / after if before is not None and after else None
        result["lower_bound"][axis] = floor / after if before is None and floor is not None and after else None
    return result


def _costs(points: list[dict | None]) -> dict:
    return {axis: _spread([_or(p.get(axis), math.nan) if p else math.inf for p in points]) for axis in AXES}


def _spread(values: list[float]) -> dict:
    """In the median infinity takes part (censored, diverged) and NaN (not recorded) decides; both are written None."""
    middle = math.nan if any(map(math.isnan, values)) else median(values)
    *runs, middle = (value if math.isfinite(value) else None for value in (*values, middle))
    return {"runs": runs, "median": middle}


def _or(value: float | None, default: float) -> float:
    return default if value is None or not math.isfinite(value) else value


def write_report(result: dict, arms: dict[str, list[Run]]) -> str:
    """The comparison as Markdown: the rule, the conditions, a table for each target, final and best values."""
    metric, sign = result["metric"], ">=" if result["mode"] == "max" else "<="
    seeds = {arm: [str(run.summary.get("seed")) for run in group] for arm, group in arms.items()}
    facts = [f"- {arm}: {len(each)} runs, seeds {', '.join(each)}" for arm, each in seeds.items()]
    runs = [run for group in arms.values() for run in group]
    step = " or ".join(dict.fromkeys(_text(b["epoch"] - a["epoch"]) for a, b in pairwise(runs[0].rows))) or "n/a"
    facts += [f"- Grid: {len(runs[0].rows)} evaluations a run; step, and so resolution: {step} epochs"]
    places = [(run.summary.get("environment") or {"hardware": "not recorded"}).items() for run in runs]
    places = dict.fromkeys(", ".join(f"{key} {value}" for key, value in place) for place in places)
    facts += [f"- Hardware and software{', not the same for all runs' * (len(places) > 1)}: {'; '.join(places)}"]
    for _, summary, rows in runs:
        if teacher := summary.get("teacher"):
            size, switch, report = (_text(teacher.get(key)) for key in ("params", "switch", "report"))
            scores = f"{metric} {switch} on the switch split and {report} on the reporting split"
            spent, train = (_or(rows[-1].get(f"{key}_seconds"), math.nan) for key in ("teacher", "train"))
            off = (kd := summary.get("kd_off")) and f"switched off at epoch {_text(kd['epoch'])} ({kd['reason']})"
            facts += [f"- {summary['name']}: teacher {teacher.get('model')}, {size} parameters, {scores}"]
            facts[-1] += f"; {spent / (train or math.nan):.1%} of train seconds; {off or 'never switched off'}"
    blocks = [
        f"# Time to target: {result['task']}, {metric}",
        f"first@tau is the first evaluation with {metric} {sign} tau; confirmed, the first of two in a row. A run\n"
        "without one is censored: shown as `> E`, E its last evaluation, and infinite in medians. The speedup is the\n"
        f"median of the {' over that of the '.join(arms)} runs; `> x` is a lower bound, the former being censored.",
        "\n".join(facts),
    ]
    for tau, entry in result["targets"].items():
        rows = [
            [f"{kind}, {AXIS_NAMES[axis]}", arm, *_cells(part[arm][axis], [run.rows[-1].get(axis) for run in group])]
            for axis in ("epoch", "train_seconds")
            for kind, part in (("first", entry), ("confirmed", entry["confirmed"]))
            for arm, group in arms.items()
        ]
        ratios = [(name, entry["speedup"][axis], entry["lower_bound"][axis]) for axis, name in AXIS_NAMES.items()]
        texts = [f"{x:.2f}x in {name}" if x else f"> {y:.2f}x in {name}" for name, x, y in ratios if x or y]
        late = "" if all(tau in run.summary["targets"] for run in runs) else " (not among the targets of every run)"
        blocks += [f"## first@{tau}{late}", _table(rows), f"Speedup: {', '.join(texts) or 'not defined'}."]
    pairs = [(kind, arm) for kind in ("final", "best") for arm in arms]
    rows = [[kind, arm, *_cells(result[kind][arm], [None] * len(arms[arm]))] for kind, arm in pairs]
    return "\n\n".join([*blocks, f"## Final and best {metric}", _table(rows)]) + "\n"


def _cells(spread: dict, last: list[float | None]) -> list[str]:
    """Each run, median and range as text; a censored run is shown as `> E`, E taken from `last`."""
    pairs = [("> ", e) if v is None and e is not None else ("", v) for v, e in zip(spread["runs"], last, strict=True)]
    known = sorted(pair for pair in pairs if pair[1] is not None)
    floored = spread["median"] is None and len(known) == len(pairs)
    middle = ("> ", median(value for _, value in known)) if floored else ("", spread["median"])
    each, middle, ends = ([mark + _text(v) for mark, v in x] for x in (pairs, [middle], [*known[:1], *known[-1:]]))
    return [", ".join(each), *middle, " to ".join(dict.fromkeys(ends)) or "n/a"]


def _text(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _table(rows: list[list[str]]) -> str:
    lines = [["", "arm", "each run", "median", "min to max"], [""] * 5, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines[1] = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def draw_curves(result: dict, arms: dict[str, list[Run]], file: BinaryIO) -> None:
    """Draw the metric over epochs and over train seconds as a PNG: runs thin, medians bold, targets dashed."""
    import numpy as np
    from matplotlib.figure import Figure  # slow, and may write to stderr: not before the input is known to be good

    metric, worst = result["metric"], -np.inf if result["mode"] == "max" else np.inf
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    for panel, axis in zip(figure.subplots(1, 2, sharey=True), ("epoch", "train_seconds"), strict=True):
        for (arm, group), colour in zip(arms.items(), COLOURS, strict=True):
            table = [[[row.get(key) for row in run.rows] for run in group] for key in (axis, metric, "epoch")]
            x, y, epochs = np.array(table, dtype=float)  # each (runs, evaluations); None becomes NaN
            panel.plot(x.T, y.T, color=colour, alpha=0.45, linewidth=1)
            middle = np.median(np.where(np.isfinite(y), y, worst), axis=0)
            panel.plot(np.median(x, axis=0), middle, "o-", c=colour, lw=3, ms=4, label=f"{arm}, median of {len(group)}")
            for run, *curve, epoch in zip(group, x, y, epochs, strict=True):
                if off := run.summary.get("kd_off"):
                    point = [np.interp(off["epoch"], epoch, values) for values in curve]
                    panel.plot(*point, "D", color=colour, markeredgecolor="black", zorder=3, label="teacher off")
        for tau in map(float, result["targets"]):
            panel.axhline(tau, color="0.3", linestyle="--", linewidth=1.2, label="target")
            panel.text(0.01, tau, f"{tau:.10g}", transform=panel.get_yaxis_transform(), va="bottom")
        panel.set(xlabel=AXIS_NAMES[axis], xlim=(0, None))
        panel.grid(alpha=0.25)
    figure.supylabel(f"{metric} ({'higher' if result['mode'] == 'max' else 'lower'} is better)", size="medium")
    entries = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))  # each label once
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=len(entries), frameon=False)
    figure.savefig(file, format="png", dpi=160)


def main(argv: list[str] | None = None) -> int:
    """Compare the runs named on the command line. Returns the exit code: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser("python -m w2s.compare", description=__doc__.split("\n")[0], exit_on_error=False)
    for arm in ("baseline", "treated"):
        parser.add_argument(f"--{arm}", nargs="+", required=True, type=Path, metavar="RUN", help=f"{arm} run folders")
    parser.add_argument("--target", nargs="+", type=float, metavar="TAU", help="instead of the targets of the runs")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the three files go")
    try:
        args = parser.parse_args(argv)
        folders = [folder.resolve() for folder in (*args.baseline, *args.treated)]
        if twice := [folder for folder in folders if folders.count(folder) > 1]:
            raise ValueError(f"{twice[0]} is given twice")
        arms = {"baseline": [*map(read_run, args.baseline)], "treated": [*map(read_run, args.treated)]}
        result = compare(arms, choose_targets(arms["baseline"] + arms["treated"], args.target))
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    paths = [args.out / name for name in ("speedup.json", "report.md", "curves.png")]
    report = write_report(result, arms)
    with replacing(paths[0]) as table, replacing(paths[1]) as text, replacing(paths[2]) as image:
        json.dump(result, table, indent=2, allow_nan=False)
        text.write(report + "\n![curves](curves.png)\n")
        draw_curves(result, arms, image.buffer)
    print(report, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
