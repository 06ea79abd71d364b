"""The report of a comparison: as Markdown, and as one page of HTML that needs no network.

The page draws its curves with a hundred lines of script of its own (report.html) instead of a bundled plotting
library: plotly's smallest bundle is a megabyte per report, and lines, marks and a shaded window need none of it.
"""

import html
import json
import re
from pathlib import Path

from w2s.compare.curves import page_data
from w2s.compare.runs import RunFolder
from w2s.compare.sections import Part, Section, Table, sections
from w2s.compare.verdict import verdict


def write_markdown(result: dict, arms: dict[str, list[RunFolder]], command: str) -> str:
    """The comparison as Markdown: verdict, curves and the headline table first, the details folded.

    Args:
        result: as `compare_arms` returns it.
        arms: the runs of each arm, the reference first.
        command: the command line that made the comparison.
    """
    blocks = [f"# {_escape_markdown(_title(result))}", f"**{_escape_markdown(verdict(result, arms))}**"]
    blocks.append("![curves](curves.png)")
    if "strength" in result:
        blocks.append("![strength](strength.png)")
    for section in sections(result, arms, command):
        blocks += _markdown_section(section)
    return "\n\n".join(blocks) + "\n"


def _title(result: dict) -> str:
    return f"Time to target: {result['task']}, {result['metric']}"


def _markdown_section(section: Section) -> list[str]:
    title, parts = _escape_markdown(section.title), [_markdown_part(part) for part in section.parts]
    if section.folded:
        return [f"<details>\n<summary>{title}</summary>", *parts, "</details>"]
    return [f"## {title}", *parts]


def _markdown_part(part: Part) -> str:
    if isinstance(part, str):
        return _escape_markdown(part)
    if isinstance(part, list):
        return "\n".join(f"- {_escape_markdown(item)}" for item in part)
    return markdown_table(part)


def markdown_table(table: Table) -> str:
    """A table in Markdown whose columns are aligned, so that it also reads well in a terminal."""
    lines = []
    for row in (table.header, *table.rows):
        lines.append([_escape_markdown(cell).replace("|", "\\|") for cell in row])
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def _escape_markdown(text: str) -> str:
    """Text on one line in which nothing is taken for an HTML tag."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", " ".join(text.split()))


def write_html(result: dict, arms: dict[str, list[RunFolder]], command: str) -> str:
    """The comparison as one page, with curves to look into; every text from the runs is escaped.

    Args:
        result: as `compare_arms` returns it.
        arms: the runs of each arm, the reference first.
        command: the command line that made the comparison.
    """
    data = json.dumps(page_data(result, arms), allow_nan=False)
    fills = {
        "TITLE": html.escape(_title(result)),
        "VERDICT": html.escape(verdict(result, arms)),
        "SECTIONS": "\n".join(_html_section(section) for section in sections(result, arms, command)),
        "DATA": data.replace("<", "\\u003c"),  # no </script> inside
    }
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: fills[match[1]], page)  # in one pass: a fill may hold braces


def _html_section(section: Section) -> str:
    title, body = html.escape(section.title), "".join(_html_part(part) for part in section.parts)
    if section.folded:
        return f"<details><summary>{title}</summary>\n{body}</details>"
    return f"<section><h2>{title}</h2>\n{body}</section>"


def _html_part(part: Part) -> str:
    if isinstance(part, str):
        text = re.sub("`(.*?)`", r"<code>\1</code>", html.escape(part))
        return f"<p>{text}</p>\n"
    if isinstance(part, list):
        items = "".join(f"<li>{html.escape(item)}</li>" for item in part)
        return f"<ul>{items}</ul>\n"
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in part.header)
    rows = []
    for row in part.rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        rows.append(f"<tr>{cells}</tr>\n")
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>\n'
