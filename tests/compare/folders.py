"""Small run folders with numbers worked out by hand, and the command that compares them."""

import json
import math
from pathlib import Path

import yaml

from w2s.compare.__main__ import main
from w2s.compare.comparable import choose_targets
from w2s.compare.runs import read_run
from w2s.compare.speedup import compare_arms
from w2s.record import RunRecord

NAN = math.nan
TEACHER = {"model": "resnet10t", "switch": 68.25, "report": 67.5, "params": 4922416, "checkpoint": "best"}
KD_OFF = {"epoch": 2.0, "update": 20, "reason": "surpass"}
ENVIRONMENT = {"torch": "2.11.0", "device": "cpu, 2 cores", "processes": 1}
FILES = ["curves.png", "report.html", "report.md", "speedup.json"]
OPTIONS = {"dataset": "digits", "epochs": 5, "batch_size": 10, "lr": 0.1, "kd_weight": 3.0, "teacher": None}


def write_run(
    folder: Path,
    values,
    mode="max",
    targets=(60.0,),
    metric="top1",
    seconds=10.0,
    step=1.0,
    empty=(),
    options=None,
    **facts,
) -> Path:
    """A finished run with one evaluation every `step` epochs, 10 updates, 100 samples, `seconds` train seconds (12 in
    total, a tenth of them in the teacher) and a quarter of a PFLOP; the columns in `empty` hold nothing."""
    folder.mkdir(parents=True)
    (folder / "args.yaml").write_text(yaml.safe_dump(OPTIONS | {"name": folder.name} | (options or {})))
    known = {"task": "classification", "name": folder.name, "status": "finished", "seed": 0, "teacher": None}
    known |= {"kd_off": None, "environment": ENVIRONMENT}
    record = RunRecord(None, metric, mode, list(targets), (metric,), known | facts)
    for i, value in enumerate(values, start=1):
        row = {"epoch": i * step, "update": 10 * i, "samples": 100 * i, "train_seconds": seconds * i}
        row |= {"total_seconds": 12.0 * i, "teacher_seconds": seconds * i / 10, "pflops": 0.25 * i, metric: value}
        row["kd_active"] = int(bool(facts.get("kd_off")) and i * step <= facts["kd_off"]["epoch"])
        record.add(**{key: None if key in empty else value for key, value in row.items()})
    record.folder = folder  # written at once: every row by itself waits for the disk
    record.rewrite()
    record.write_summary()
    return folder


def write_runs(tmp_path: Path, arm: str, curves, seconds=(10.0, 10.0, 10.0), **options) -> list[Path]:
    """Runs arm-0, arm-1, ... with these curves and seconds between evaluations; the seed is the number."""
    pairs = enumerate(zip(curves, seconds, strict=False))
    return [write_run(tmp_path / f"{arm}-{i}", c, seconds=s, seed=i, **options) for i, (c, s) in pairs]


def command(baseline: list, treated: list, out: Path, *more: object) -> list[str]:
    return [str(x) for x in ("--baseline", *baseline, "--treated", *treated, "--out", out, *more)]


def result_of(tmp_path: Path, baseline: list, treated: list, *more: object) -> dict:
    """speedup.json of a comparison that succeeds."""
    assert main(command(baseline, treated, tmp_path / "out", *more)) == 0
    return json.loads((tmp_path / "out" / "speedup.json").read_text())


def report_of(tmp_path: Path) -> str:
    """report.md of the comparison that `result_of` made."""
    return (tmp_path / "out" / "report.md").read_text()


def spoil_summary(folder: Path, **facts: object) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | facts))


# first@60 at epochs 3, 5, 4 without and 2, 2, 3 with the teacher
BASELINE = [[50, 55, 60, 62, 61], [40, 50, 58, 59, 65], [45, 59.9, 59.9, 63, 64]]
TREATED = [[55, 60, 61, 62, 63], [50, 70, 59, 66, 67], [59, 59, 62, 64, 62]]


def numbers(baseline: list[Path], treated: list[Path]) -> dict:
    """What speedup.json would hold, from the library: nothing is drawn or written."""
    arms = {"baseline": [read_run(folder) for folder in baseline], "treated": [read_run(folder) for folder in treated]}
    result = compare_arms(arms, choose_targets(arms["baseline"] + arms["treated"]))
    return json.loads(json.dumps(result, allow_nan=False))


def core(summary: dict) -> dict:
    """The runs and the median of a summary."""
    return {"runs": summary["runs"], "median": summary["median"]}


def table(text: str, heading: str) -> list[list[str]]:
    """The rows of the first Markdown table under a heading or in a fold of this title, header and rule left out."""
    marks = [mark for mark in (f"## {heading}\n", f"<summary>{heading}</summary>\n") if mark in text]
    lines = text.split(marks[0])[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def set_option(folder: Path, **options: object) -> None:
    """Change options in the args.yaml of a run."""
    known = yaml.safe_load((folder / "args.yaml").read_text())
    (folder / "args.yaml").write_text(yaml.safe_dump(known | options))


def drop_rows(folder: Path, keep: int) -> None:
    """Cut metrics.csv after so many rows."""
    lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    (folder / "metrics.csv").write_text("".join(lines[: keep + 1]))


def check_refused(tmp_path: Path, capsys, words: list[str], *parts: str) -> None:
    """See that a command ends with exit code 2 and one line that holds these parts, and writes nothing."""
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    for part in parts:
        assert part in printed.err
    assert not (tmp_path / "out").exists()
