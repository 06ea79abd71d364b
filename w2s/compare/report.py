"""A comparison in words and tables: as Markdown, and as one page of HTML that needs no network.

The page draws its curves with a hundred lines of script of its own (report.html) instead of a bundled plotting
library: plotly's smallest bundle is a megabyte a report, and lines, marks and a shaded window need none of it.
"""

import html
import json
import re
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

from w2s.compare.curves import AXIS_NAMES, draw_curves, page_data, progress_axis
from w2s.compare.runs import SCRIPTS, Run, settings
from w2s.compare.verdict import number, span_text, times, verdict

__all__ = ["draw_curves", "write_html", "write_report"]


class Table(NamedTuple):
    """A header and rows of text; the first columns of each row name it."""

    header: list[str]
    rows: list[list[str]]


Part = str | list[str] | Table  # a paragraph, bullets or a table
Section = tuple[str, list[Part]]


def sections(result: dict, arms: dict[str, list[Run]], command: str) -> list[Section]:
    """The whole report but its title and verdict, for both forms."""
    runs = [run for group in arms.values() for run in group]
    found = [("All arms", _summary_parts(result, arms))] if len(arms) > 2 else []
    for tau, entry in result["targets"].items():
        late = "" if all(tau in run.summary["targets"] for run in runs) else " (not among the targets of every run)"
        found.append((f"first@{tau}{late}", _target_parts(result, entry, arms)))
    metric = result["metric"]
    pairs = [(kind, arm) for kind in ("final", "best") for arm in arms]
    header = ["", "arm", "each run", "median", "min to max"]
    rows = [[kind, arm, *_cells(result[kind][arm], [None] * len(arms[arm]))] for kind, arm in pairs]
    gains = [[kind, arm, *_gain_cells(gain)] for arm, kinds in result["gain"].items() for kind, gain in kinds.items()]
    margin = f"margin {number(result['margin'])}"
    gain = Table(["", "arm", "mean gain", "95 % interval", "p", margin if result["margin"] is not None else ""], gains)
    said = "Gain over the reference, positive is better:"
    found.append((f"Final and best {metric}", [Table(header, rows), said, gain]))
    if "strength" in result:
        found.append(("Speedup against the teacher's strength", _strength_parts(result)))
    found.append(("What the teacher cost", _cost_parts(result, arms)))
    found.append(("Conditions", _conditions(result, arms)))
    found.append(("Settings and commands", _settings_parts(arms, command)))
    return found


def _summary_parts(result: dict, arms: dict[str, list[Run]]) -> list[Part]:
    """A line an arm: what many arms would be lost among in the tables of the targets."""
    unit, metric = progress_axis(result), result["metric"]
    axes = (unit, "train_seconds")
    header = ["arm", f"final {metric}", "mean gain"]
    for tau in result["targets"]:
        header += [f"first@{tau}, {AXIS_NAMES[unit]}", *(f"paired, {AXIS_NAMES[axis]}" for axis in axes)]
    rows = []
    for arm, group in arms.items():
        gain = result["gain"].get(arm)
        row = [arm, number(result["final"][arm]["median"]), number(gain["final"]["mean"]) if gain else ""]
        for entry in result["targets"].values():
            row.append(_cells(entry[arm][unit], [run.rows[-1].get(unit) for run in group])[1])
            versus = entry["versus"].get(arm)
            row += [_paired_cell(versus[axis]) if versus else "" for axis in axes]
        rows.append(row)
    return [Table(header, rows)]


def _gain_cells(gain: dict) -> list[str]:
    span = span_text(gain["interval"])
    return [number(gain["mean"]), span, number(gain["p"]), gain["verdict"] or "no --margin"]


def _strength_parts(result: dict) -> list[Part]:
    metric, axes = result["metric"], {"epoch": "epochs", "train_seconds": "train seconds"}
    rows = [
        [
            point["arm"],
            number(point["teacher"]),
            number(point["gap"]),
            tau,
            *(_paired_cell(result["targets"][tau]["versus"][point["arm"]][axis]) for axis in axes),
        ]
        for point in result["strength"]
        for tau in point["speedup"]
    ]
    return [Table(["arm", f"teacher {metric}", "gap", "target", *axes.values()], rows)]


def _paired_cell(versus: dict) -> str:
    value, bound, span = versus["geometric_mean"], versus["geometric_mean_lower_bound"], versus["interval"]
    if value is None and bound:
        return times(bound, "> ")
    return times(value) + (f" ({span_text(span, times)})" if span else "")


def _target_parts(result: dict, entry: dict, arms: dict[str, list[Run]]) -> list[Part]:
    header = ["", "arm", "each run", "median", "min to max"]
    rows = [
        [f"{kind}, {AXIS_NAMES[axis]}", arm, *_cells(part[arm][axis], [run.rows[-1].get(axis) for run in group])]
        for axis in (progress_axis(result), "train_seconds")
        for kind, part in (("first", entry), ("confirmed", entry["confirmed"]))
        for arm, group in arms.items()
    ]
    parts: list[Part] = [Table(header, rows)]
    for arm, versus in entry["versus"].items():
        ratios = [(name, versus[axis]["speedup"], versus[axis]["lower_bound"]) for axis, name in AXIS_NAMES.items()]
        texts = [f"{times(x) if x else times(y, '> ')} in {name}" for name, x, y in ratios if x or y]
        which = f" of {arm}" if len(entry["versus"]) > 1 else ""
        parts.append(f"Speedup{which}: {', '.join(texts) or 'not defined'}.")
        if not texts and not any(axis["geometric_mean_lower_bound"] for axis in versus.values()):
            continue
        header = ["axis", "speedup", "paired", "95 % interval", "p", "by the grid", "teacher paid", "paid back after"]
        parts.append(Table(header, [[AXIS_NAMES[axis], *_versus_cells(versus[axis])] for axis in AXIS_NAMES]))
    return parts


def _versus_cells(versus: dict) -> list[str]:
    students = versus.get("paid_back_after")
    bound = versus["geometric_mean_lower_bound"]
    return [
        times(versus["speedup"]) if versus["speedup"] else times(versus["lower_bound"], "> "),
        times(versus["geometric_mean"]) if versus["geometric_mean"] else times(bound, "> "),
        span_text(versus["interval"], times),
        number(versus["p"]),
        span_text(versus["resolution"], times),
        times(versus.get("speedup_with_teacher")),
        f"{students} student{'s' * (students > 1)}" if students else "n/a",
    ]


def _cells(summary: dict, last: list[float | None]) -> list[str]:
    """Each run, median and range as text; a censored run is shown as `> E`, E taken from `last`."""
    pairs = [("> ", e) if v is None and e is not None else ("", v) for v, e in zip(summary["runs"], last, strict=True)]
    known = sorted(pair for pair in pairs if pair[1] is not None)
    floored = summary["median"] is None and len(known) == len(pairs)
    middle = ("> ", median(value for _, value in known)) if floored else ("", summary["median"])
    each, middle, ends = ([mark + number(v) for mark, v in x] for x in (pairs, [middle], [*known[:1], *known[-1:]]))
    return [", ".join(each), *middle, " to ".join(dict.fromkeys(ends)) or "n/a"]


def _cost_parts(result: dict, arms: dict[str, list[Run]]) -> list[Part]:
    facts = []
    for arm, group in arms.items():
        costs = result["costs"][arm]
        for run, overhead in zip(group, costs["overhead"] or [], strict=False):
            teacher, summary, last = run.summary["teacher"], run.summary, run.rows[-1]
            size, switch, report = (number(teacher.get(key)) for key in ("params", "switch", "report"))
            scores = f"{result['metric']} {switch} on the switch split and {report} on the reporting split"
            spent, train = last.get("teacher_seconds"), last.get("train_seconds")
            off = (kd := summary["kd_off"]) and f"switched off at epoch {number(kd['epoch'])} ({kd['reason']})"
            facts.append(
                f"{summary['name']}: teacher {teacher.get('model')}, {size} parameters, {scores}; "
                f"{f'{spent / train:.1%}' if spent is not None and train else 'n/a'} of train seconds; "
                f"{off or 'never switched off'}; an update with the teacher took {times(overhead)} of one without"
            )
        if costs["overhead"]:
            facts.append(
                f"{arm}: by FLOPs, an update with the teacher takes {times(costs['flops_bound'])} of one without"
            )
            trained = costs["teacher_training"]
            facts.append(
                f"{arm}: the teacher's own training ({trained['run']}) took {number(trained['train_seconds'])} train "
                f"seconds, {number(trained['total_seconds'])} in total, {number(trained['pflops'])} PFLOPs"
                if trained
                else f"{arm}: the teacher's own training is not in the bill: its run folder is not at hand"
            )
    return [facts or ["no arm had a teacher"]]


def _conditions(result: dict, arms: dict[str, list[Run]]) -> list[Part]:
    runs = [run for group in arms.values() for run in group]
    metric, sign = result["metric"], ">=" if result["mode"] == "max" else "<="
    facts = [
        f"{arm}: {len(group)} runs, seeds {', '.join(str(run.seed) for run in group)}" for arm, group in arms.items()
    ]
    step = " or ".join(dict.fromkeys(number(b["epoch"] - a["epoch"]) for a, b in pairwise(runs[0].rows))) or "n/a"
    facts += [f"Grid: {len(runs[0].rows)} evaluations a run; step, and so resolution: {step} epochs"]
    places = [(run.summary["environment"] or {"hardware": "not recorded"}).items() for run in runs]
    places = dict.fromkeys(", ".join(f"{key} {value}" for key, value in place) for place in places)
    facts += [f"Hardware and software{', not the same for all runs' * (len(places) > 1)}: {'; '.join(places)}"]
    facts += [f"Differs by leave of --allow: {line}" for line in result["differences"]]
    rule = (
        f"first@tau is the first evaluation with {metric} {sign} tau; confirmed, the first of two in a row. A run "
        "without one is censored: shown as `> E`, E its last evaluation, and infinite in medians. The speedup is the "
        f"median of {result['reference']} over that of the other arm; `> x` is a lower bound, the former being "
        "censored. Paired: the geometric mean of the ratios of runs of the same seed, with its 95 % interval "
        "(Student's t on their logarithms, which leans on their being normal; from 8 pairs on the bootstrap-t) and the "
        "two-sided p-value of all flips of "
        "sign, which with n pairs is never below 2/2^n and is not corrected for the number of targets, axes and arms. "
        "By the grid: what the ratio is at the least and at the most, for each crossing lies between two evaluations. "
        "Teacher paid: the speedup with the teacher's own training added to the arm's bill."
    )
    return [rule, facts]


def _settings_parts(arms: dict[str, list[Run]], command: str) -> list[Part]:
    runs = [run for group in arms.values() for run in group]
    script = SCRIPTS.get(runs[0].summary["task"], "train_*.py")
    lines = [f"{arm}: python {script} -c {run.folder}/args.yaml" for arm, group in arms.items() for run in group]
    names = sorted({name for run in runs for name in run.options} - {"name", "seed", "output", "resume"})
    common = settings(runs[0])
    firsts = {arm: group[0].options for arm, group in arms.items()}
    header = ["option", *firsts]
    differ = [name for name in names if len({repr(options.get(name)) for options in firsts.values()}) > 1]
    rows = [[name, *(_value(options.get(name)) for options in firsts.values())] for name in differ]
    same = ", ".join(f"{name} {_value(common[name])}" for name in names if name in common and name not in differ)
    return [f"This report: {command}", "Its runs:", lines, Table(header, rows), f"The same in all arms: {same}."]


def _value(value: object) -> str:
    return "none" if value is None else json.dumps(value) if isinstance(value, dict | list | bool) else str(value)


def write_report(result: dict, arms: dict[str, list[Run]], command: str = "") -> str:
    """The comparison as Markdown: the verdict, a table for each target, final values, costs, conditions."""
    blocks = [f"# Time to target: {result['task']}, {result['metric']}", f"**{verdict(result, arms)}**"]
    for heading, parts in sections(result, arms, command):
        blocks += [f"## {heading}", *map(_markdown, parts)]
    return "\n\n".join(re.sub(r"<(?=[A-Za-z/!?])", "&lt;", block) for block in blocks) + "\n"


def _markdown(part: Part) -> str:
    if isinstance(part, str):
        return " ".join(part.split())
    if isinstance(part, list):
        return "\n".join(f"- {' '.join(line.split())}" for line in part)
    lines = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (part.header, *part.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def write_html(result: dict, arms: dict[str, list[Run]], command: str = "") -> str:
    """The comparison as one page, with curves to look into; every text from the runs is escaped."""
    title = html.escape(f"Time to target: {result['task']}, {result['metric']}")
    tables, rest = [], []
    for heading, parts in sections(result, arms, command):
        place = tables if heading.startswith(("first@", "All arms")) else rest
        place.append(f"<section><h2>{html.escape(heading)}</h2>\n{''.join(map(_html, parts))}</section>")
    data = json.dumps(page_data(result, arms), allow_nan=False).replace("<", "\\u003c")  # no </script> inside
    fills = {"TITLE": title, "VERDICT": html.escape(verdict(result, arms)), "TABLES": "\n".join(tables)}
    fills |= {"REST": "\n".join(rest), "DATA": data}
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda place: fills[place[1]], page)  # one pass: fills may hold braces


def _html(part: Part) -> str:
    if isinstance(part, str):
        return "<p>" + re.sub("`(.*?)`", r"<code>\1</code>", html.escape(part)) + "</p>\n"
    if isinstance(part, list):
        return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in part)}</ul>\n"
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in part.header)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n" for row in part.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n'
