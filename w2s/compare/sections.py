"""What the report of a comparison says: paragraphs, lists and tables, which report.py turns into Markdown and HTML."""

import json
from itertools import pairwise
from typing import NamedTuple

from w2s.compare.bill import cost_facts
from w2s.compare.comparable import TEACHER_PREFIXES, common_settings
from w2s.compare.runs import RunFolder
from w2s.compare.strength import STRENGTH_AXES
from w2s.compare.text import (
    AXIS_NAMES,
    bound_or_ratio_text,
    bounds_text,
    interval_text,
    median_text,
    number_text,
    paired_text,
    progress_axis,
    ratio_text,
    reaching_sign,
    run_cells,
)

SCRIPTS = {"cls": "train_cls.py", "det": "train_det.py", "diffusion": "train_diffusion.py"}  # by task
PER_RUN_OPTIONS = {"name", "seed", "output", "resume"}  # differ between any two runs and say nothing of the arms


class Table(NamedTuple):
    """A header and rows of text; the first columns of each row name it."""

    header: list[str]
    rows: list[list[str]]


Part = str | list[str] | Table  # a paragraph, the items of a list, or a table


class Section(NamedTuple):
    """A part of the report under a title; a folded one is shown when a reader opens it."""

    title: str
    parts: list[Part]
    folded: bool


def sections(result: dict, arms: dict[str, list[RunFolder]], command: str) -> list[Section]:
    """The whole report but its title, verdict and curves.

    Args:
        result: as `compare_arms` returns it.
        arms: the runs of each arm, the reference first.
        command: the command line that made the comparison.
    """
    metric = result["metric"]
    many = len(arms) > 2
    unfolded = [
        Section("Speedup", [headline_table(result, arms), _headline_note(result, arms)], folded=False),
        Section("All arms" if many else f"Final {metric}", [_arms_table(result, arms, targets=many)], folded=False),
    ]
    if "strength" in result:
        unfolded.append(Section("Speedup against the teacher's strength", [_strength_table(result)], folded=False))
    runs = [run for group in arms.values() for run in group]
    folded = []
    for target, entry in result["targets"].items():
        planned = all(target in run.summary["targets"] for run in runs)
        title = f"first@{target}" if planned else f"first@{target} (not among the targets of every run)"
        folded.append(Section(title, _target_parts(result, entry, arms), folded=True))
    folded += [
        Section(f"Final and best {metric}", _metric_parts(result, arms), folded=True),
        Section("What the teacher cost", [cost_facts(result, arms)], folded=True),
        Section("Conditions", [_rule(result), _condition_facts(result, arms)], folded=True),
        Section("Settings and commands", _settings_parts(arms, command), folded=True),
    ]
    return unfolded + folded


def headline_table(result: dict, arms: dict[str, list[RunFolder]]) -> Table:
    """The first arm beside the reference: first@tau and the paired speedups, one row per target."""
    reference, arm = list(arms)[:2]
    unit = progress_axis(result)
    header = [f"{result['metric']} {reaching_sign(result)} tau", f"{reference}: {unit}", f"{arm}: {unit}"]
    header += [f"speedup in {AXIS_NAMES[unit]}", "in train seconds", "in PFLOPs", "train seconds, teacher paid"]
    rows = []
    for target, entry in result["targets"].items():
        versus = entry["versus"][arm]
        medians = [median_text(entry[name][unit], _last(arms[name], unit)) for name in (reference, arm)]
        speedups = [paired_text(versus[axis]) for axis in (unit, "train_seconds", "pflops")]
        paid = ratio_text(versus["train_seconds"].get("speedup_with_teacher"))
        rows.append([target, *medians, *speedups, paid])
    return Table(header, rows)


def _headline_note(result: dict, arms: dict[str, list[RunFolder]]) -> str:
    reference, arm = list(arms)[:2]
    return (
        f"The {progress_axis(result)} of first@tau is the median of the runs; speedups over {reference} are paired by "
        f"seed, in brackets their 95 % interval. Teacher paid: the ratio of the medians with the teacher's own "
        f"training added to the bill of {arm}."
    )


def _last(group: list[RunFolder], axis: str) -> list[float | None]:
    """The cost of each run's last evaluation."""
    return [run.rows[-1].get(axis) for run in group]


def _arms_table(result: dict, arms: dict[str, list[RunFolder]], *, targets: bool) -> Table:
    """One row per arm: its final metric and the verdict on it, with first@tau and speedups if `targets`."""
    unit = progress_axis(result)
    axes = (unit, "train_seconds")
    header = ["arm", f"final {result['metric']}", *_gain_header(result)]
    for target in result["targets"] if targets else ():
        header += [f"first@{target}, {AXIS_NAMES[unit]}", *(f"speedup, {AXIS_NAMES[axis]}" for axis in axes)]
    rows = []
    for arm, group in arms.items():
        gain = result["gain"].get(arm)
        row = [arm, number_text(result["final"][arm]["median"])]
        row += _gain_cells(gain["final"]) if gain else [""] * len(_gain_header(result))
        for entry in result["targets"].values() if targets else ():
            row.append(median_text(entry[arm][unit], _last(group, unit)))
            versus = entry["versus"].get(arm)
            row += [paired_text(versus[axis]) if versus else "" for axis in axes]
        rows.append(row)
    return Table(header, rows)


def _gain_header(result: dict) -> list[str]:
    header = ["mean gain", "95 % interval", "p"]
    return header if result["margin"] is None else [*header, f"margin {number_text(result['margin'])}"]


def _gain_cells(gain: dict) -> list[str]:
    cells = [number_text(gain["mean"]), interval_text(gain["interval"]), number_text(gain["p"])]
    return [*cells, gain["verdict"]] if gain["verdict"] else cells


def _strength_table(result: dict) -> Table:
    header = ["arm", f"teacher {result['metric']}", "gap", "target", *(AXIS_NAMES[axis] for axis in STRENGTH_AXES)]
    rows = []
    for point in result["strength"]:
        for target in point["speedup"]:
            versus = result["targets"][target]["versus"][point["arm"]]
            speedups = [paired_text(versus[axis]) for axis in STRENGTH_AXES]
            rows.append([point["arm"], number_text(point["teacher"]), number_text(point["gap"]), target, *speedups])
    return Table(header, rows)


def _target_parts(result: dict, entry: dict, arms: dict[str, list[RunFolder]]) -> list[Part]:
    """Every run's crossings of one target, and each arm's speedups over the reference on all axes."""
    rows = []
    for axis in (progress_axis(result), "train_seconds"):
        for kind, summaries in (("first", entry), ("confirmed", entry["confirmed"])):
            for arm, group in arms.items():
                cells = run_cells(summaries[arm][axis], _last(group, axis))
                rows.append([f"{kind}, {AXIS_NAMES[axis]}", arm, *cells])
    parts: list[Part] = [Table(["", "arm", "each run", "median", "min to max"], rows)]
    for arm, versus in entry["versus"].items():
        texts = []
        for axis, name in AXIS_NAMES.items():
            if versus[axis]["speedup"] or versus[axis]["lower_bound"]:
                text = bound_or_ratio_text(versus[axis]["speedup"], versus[axis]["lower_bound"])
                texts.append(f"{text} in {name}")
        which = f" of {arm}" if len(entry["versus"]) > 1 else ""
        parts.append(f"Speedup{which}: {', '.join(texts) or 'not defined'}.")
        if texts or any(axis["geometric_mean_lower_bound"] for axis in versus.values()):
            header = ["axis", "speedup", "paired", "95 % interval", "p", "by the grid", "teacher paid"]
            rows = [[AXIS_NAMES[axis], *_versus_cells(versus[axis])] for axis in AXIS_NAMES]
            parts.append(Table([*header, "paid back after"], rows))
    return parts


def _versus_cells(versus: dict) -> list[str]:
    students = versus.get("paid_back_after")
    return [
        bound_or_ratio_text(versus["speedup"], versus["lower_bound"]),
        bound_or_ratio_text(versus["geometric_mean"], versus["geometric_mean_lower_bound"]),
        interval_text(versus["interval"], ratio_text),
        number_text(versus["p"]),
        bounds_text(versus["resolution"]),
        ratio_text(versus.get("speedup_with_teacher")),
        f"{students} student{'s' if students > 1 else ''}" if students else "n/a",
    ]


def _metric_parts(result: dict, arms: dict[str, list[RunFolder]]) -> list[Part]:
    """Every run's final and best metric, and each arm's gain over the reference."""
    rows = []
    for kind in ("final", "best"):
        for arm, group in arms.items():
            rows.append([kind, arm, *run_cells(result[kind][arm], [None] * len(group))])
    gains = [[kind, arm, *_gain_cells(gain)] for arm, kinds in result["gain"].items() for kind, gain in kinds.items()]
    return [
        Table(["", "arm", "each run", "median", "min to max"], rows),
        "Gain over the reference, positive is better:",
        Table(["", "arm", *_gain_header(result)], gains),
    ]


def _rule(result: dict) -> str:
    """How the numbers of the report are defined."""
    return (
        f"first@tau is the first evaluation with {result['metric']} {reaching_sign(result)} tau; confirmed, the first "
        "of two in a row. A run without one is censored: shown as `> E`, E being its last evaluation, and infinite in "
        f"medians. The speedup is the median of {result['reference']} over that of the other arm; `> x` is a lower "
        "bound where the former is censored. Paired: the geometric mean of the ratios of runs of the same seed, with "
        "its 95 % interval (Student's t on their logarithms, which assumes that these are normal; from 8 pairs on the "
        "bootstrap-t) and the two-sided p-value over all flips of sign, which with n pairs is never below 2/2^n and is "
        "not corrected for the number of targets, axes and arms. By the grid: the least and the greatest value of the "
        "ratio, since each crossing lies between two evaluations. Teacher paid: the speedup with the teacher's own "
        "training added to the arm's bill."
    )


def _condition_facts(result: dict, arms: dict[str, list[RunFolder]]) -> list[str]:
    """Seeds, evaluation grid, hardware and software, and what differs between the runs."""
    facts = []
    for arm, group in arms.items():
        facts.append(f"{arm}: {len(group)} runs, seeds {', '.join(str(run.seed) for run in group)}")
    runs = [run for group in arms.values() for run in group]
    steps = dict.fromkeys(number_text(after["epoch"] - before["epoch"]) for before, after in pairwise(runs[0].rows))
    step = " or ".join(steps) or "n/a"
    facts.append(f"Grid: {len(runs[0].rows)} evaluations a run; step, and so resolution: {step} epochs")
    environments = {}  # each once
    for run in runs:
        environment = run.summary["environment"] or {"hardware": "not recorded"}
        environments[", ".join(f"{key} {value}" for key, value in environment.items())] = None
    same = "" if len(environments) == 1 else ", not the same for all runs"
    facts.append(f"Hardware and software{same}: {'; '.join(environments)}")
    return facts + [f"Differs by leave of --allow: {line}" for line in result["differences"]]


def _settings_parts(arms: dict[str, list[RunFolder]], command: str) -> list[Part]:
    """The commands of this report and of its runs, and the options in which the arms agree and differ."""
    runs = [run for group in arms.values() for run in group]
    script = SCRIPTS.get(runs[0].summary["task"], "train_*.py")
    commands = [
        f"{arm}: python {script} -c {run.path}/args.yaml --name NEW" for arm, group in arms.items() for run in group
    ]
    options = {arm: _options_with_effect(group[0]) for arm, group in arms.items()}
    common = common_settings(runs[0])
    rows, same = [], []
    for name in sorted({name for run in runs for name in run.options} - PER_RUN_OPTIONS):
        values = [known.get(name) for known in options.values()]
        if len({repr(value) for value in values}) > 1:
            rows.append([name, *(_option_text(value) for value in values)])
        elif name in common:
            same.append(f"{name} {_option_text(common[name])}")
    differing = Table(["option", *options], rows)
    return [
        f"This report: {command}",
        "Its runs:",
        commands,
        differing,
        f"The same in all arms: {', '.join(same)}.",
    ]


def _options_with_effect(run: RunFolder) -> dict:
    """The options of a run, without those of a teacher that it does not have."""
    if run.summary["teacher"]:
        return run.options
    return {name: value for name, value in run.options.items() if not name.startswith(TEACHER_PREFIXES)}


def _option_text(value: object) -> str:
    if value is None:
        return "none"
    return json.dumps(value) if isinstance(value, dict | list | bool) else str(value)
