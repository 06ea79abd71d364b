"""Small run folders with numbers worked out by hand, and the command that compares them."""

import json
import math
from pathlib import Path

import yaml

from w2s.compare.__main__ import main
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
