"""Run folders as evidence: each is read whole and checked against itself."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import yaml

from w2s.crossing import best_value, crossings
from w2s.record import read_metrics

# what summary.json must hold, and of which type; what may be None may be missing
SUMMARY_TYPES = {
    "task": str,
    "name": str,
    "status": str,
    "metric": str,
    "mode": str,
    "targets": dict,
    "teacher": dict | None,
    "teachers": list | None,
    "kd_off": dict | None,
    "environment": dict | None,
}


class RunFolder(NamedTuple):
    """A finished run, as its folder records it.

    Attributes:
        path: the folder.
        summary: summary.json.
        rows: metrics.csv, one dict per evaluation in the order of updates.
        options: args.yaml.
    """

    path: Path
    summary: dict
    rows: list[dict]
    options: dict

    @property
    def seed(self) -> int | None:
        """The seed of the run; None where it was not recorded."""
        return self.summary.get("seed")


def read_run(folder: Path, statuses: tuple[str, ...] = ("finished",)) -> RunFolder:
    """Read a run folder.

    Args:
        folder: of the run.
        statuses: those of summary.json that will do.

    Raises:
        ValueError: a file is missing or malformed, the run is empty or unfinished, or metrics.csv and summary.json
            contradict each other.
    """
    metrics, summary, options = folder / "metrics.csv", folder / "summary.json", folder / "args.yaml"
    for path in (folder, metrics, summary, options):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
    facts = _read_summary(summary)
    if facts["status"] not in statuses:
        raise ValueError(f"{folder} is not a finished run: its status is {facts['status']!r}")
    rows = _read_rows(metrics, metric=facts["metric"])
    run = RunFolder(path=folder, summary=facts, rows=rows, options=_read_options(options))
    _check_consistent(run)
    return run


def _read_summary(path: Path) -> dict:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    for key, kind in SUMMARY_TYPES.items():
        if not isinstance(summary, dict) or not isinstance(summary.get(key), kind):
            raise ValueError(f"{path}: {key!r} is missing or malformed")
    if summary["mode"] not in ("max", "min"):
        raise ValueError(f"{path}: 'mode' is neither max nor min")
    return {**dict.fromkeys(SUMMARY_TYPES), **summary}


def _read_rows(path: Path, metric: str) -> list[dict]:
    rows = read_metrics(path)
    if not rows:
        raise ValueError(f"{path} has no rows")
    if metric not in rows[0]:
        raise ValueError(f"{path} has no column {metric!r}")
    for previous, row in zip([None, *rows], rows, strict=False):
        if not _is_finite(row.get("epoch")):
            raise ValueError(f"{path} has a row without epoch or update")
        if previous and row["update"] <= previous["update"]:
            before, after = f"{previous['update']:.10g}", f"{row['update']:.10g}"
            raise ValueError(f"{path} is malformed: update {after} comes after update {before}")
    return rows


def _read_options(path: Path) -> dict:
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds no options")
    return options


def _check_consistent(run: RunFolder) -> None:
    """Raise ValueError where summary.json does not follow from metrics.csv: one of them was edited by hand."""
    metric, mode, targets = run.summary["metric"], run.summary["mode"], run.summary["targets"]
    last = run.rows[-1].get(metric)
    derived = {"best": best_value(run.rows, metric, mode), "last": last if _is_finite(last) else None}
    recorded = {"best": run.summary.get("best"), "last": run.summary.get("last")}
    for target in targets:
        first, confirmed = crossings(run.rows, metric, float(target), mode)
        derived |= {f"first@{target}": first, f"confirmed first@{target}": confirmed}
        recorded[f"first@{target}"] = targets[target].get("first")
        recorded[f"confirmed first@{target}"] = targets[target].get("confirmed")
    for key, value in derived.items():
        if value != recorded[key]:
            raise ValueError(
                f"metrics.csv and summary.json of {run.path} disagree in {key} "
                f"({_crossing_text(value)}, {_crossing_text(recorded[key])}): edited by hand?"
            )


def _crossing_text(value: object) -> str:
    return f"epoch {value.get('epoch')}, {value.get('value')}" if isinstance(value, dict) else str(value)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def taught_by(run: RunFolder) -> list[dict]:
    """The teachers that taught in a run, as its summary has them; none for a student alone."""
    if several := run.summary["teachers"]:
        return [teacher for teacher in several if teacher["updates"]]
    return [run.summary["teacher"]] if run.summary["teacher"] else []


def teacher_folder(teacher: dict) -> Path | None:
    """The run folder that a teacher was read from, as recorded; None where it was not a run folder."""
    path = Path(str(teacher.get("checkpoint") or ""))
    path = path.parent if path.name in ("model", "best") else path
    return path if path.name else None


def read_teacher_runs(runs: list[RunFolder]) -> list[RunFolder]:
    """The runs that made the teachers of `runs`, each once; none at all if one of them cannot be read.

    One that was stopped before its end has been paid for, too, up to its last evaluation.
    They are looked for beside the taught run first, since records are copied together, and then at their recorded path.
    Runs of the same name are taken for the same.
    """
    found: dict[str, RunFolder] = {}
    for run in runs:
        for recorded in map(teacher_folder, taught_by(run)):
            if recorded is None:
                return []
            if recorded.name not in found:
                made = _read_first([run.path.parent / recorded.name, recorded])
                if made is None:
                    return []
                found[recorded.name] = made
    return list(found.values())


def _read_first(folders: list[Path]) -> RunFolder | None:
    """The first of these runs that can be read."""
    for folder in folders:
        try:
            return read_run(folder, statuses=("finished", "preempted"))
        except (ValueError, OSError):
            continue
    return None


def total_cost(runs: list[RunFolder], axis: str) -> float | None:
    """What runs cost together; None where that was not recorded."""
    costs = [run.rows[-1].get(axis) for run in runs]
    return None if None in costs else sum(costs)
