"""What a run leaves behind: args.yaml, metrics.csv, summary.json, and the values that trackers get."""

import contextlib
import csv
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from w2s import require
from w2s.crossing import best_value, crossings, target_key

COLUMNS = ("epoch", "update", "samples", "train_seconds", "total_seconds", "teacher_seconds", "pflops", "lr")
COLUMNS += ("kd_weight", "kd_temperature", "kd_active", "train_loss", "task_loss", "kd_loss")
TRACKER_AXES = ("epoch", "train_seconds", "pflops")  # the x-axes that curves are drawn over in a dashboard

# options of the training scripts that change neither the training nor its result: they may differ between the runs of a
# comparison, and between a run and its resumption
BOOKKEEPING_OPTIONS = (
    *("config", "output", "name", "resume", "dry_run", "eval_only", "log_with", "project", "group", "log_interval"),
    *("push_to_hub", "checkpoint_hist", "recovery_interval", "check_images", "validation_batch_size", "fd_cache"),
    "ddp_timeout",
)


class RunRecord:
    """The rows of a run and what follows from them: metrics.csv, summary.json, crossings, tracker values.

    Everything but the rows is derived from them, so a resumed run continues by handing back those of its checkpoint.

    Args:
        folder: the run folder, or None to keep nothing (other ranks, a dry run).
        metric: the reported metric that targets and `best` refer to.
        mode: "max" or "min".
        targets: tau values fixed before the run.
        reported: names of all reported metrics, `metric` among them; `switch_<metric>` is added.
        facts: everything else that summary.json holds (task, name, seed, teacher, environment, ...).
        log: called with (values, update) after each row, for trackers.
    """

    def __init__(
        self,
        folder: Path | None,
        metric: str,
        mode: str,
        targets: list[float],
        reported: tuple[str, ...],
        facts: dict,
        log: Callable[[dict, int], None] | None = None,
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {mode!r}")
        self.folder, self.metric, self.mode, self.targets = folder, metric, mode, targets
        self.facts, self.log = dict(facts), log
        self.columns = (*COLUMNS, *reported, f"switch_{metric}")
        self.rows: list[dict] = []

    def start(self, options: dict, rows: list[dict] | None = None) -> None:
        """Create the folder with args.yaml, metrics.csv and summary.json.

        Args:
            options: everything that the run was made with, as YAML can hold it; a comparison refuses runs that differ
                in one, except for those whose names begin with kd_ or teacher.
            rows: of the checkpoint, where a run is resumed.
        """
        if self.folder:
            require("compare", "yaml")  # which reads the file, too; the rest of the record needs nothing
            import yaml

            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / "args.yaml") as file:
                yaml.safe_dump(options, file, sort_keys=True)
        self.rewrite(rows)
        self.write_summary()

    def add(self, switch: float | None = None, **row: float | None) -> bool:
        """Append an evaluation and write it to metrics.csv. A repeated update replaces the row before it.

        Args:
            switch: the metric on the switch split, which is the column switch_<metric>.
            row: the other columns.

        Returns:
            Whether the metric is the best so far (the first of equals).

        Raises:
            ValueError: the row is out of order or has an unknown column.
        """
        if switch is not None:
            row[f"switch_{self.metric}"] = switch
        if unknown := set(row) - set(self.columns):
            raise ValueError(f"unknown columns {sorted(unknown)}")
        if self.rows and row["update"] < self.rows[-1]["update"]:
            raise ValueError(f"evaluation at update {row['update']} comes after {self.rows[-1]['update']}")
        repeated = bool(self.rows) and row["update"] == self.rows[-1]["update"]
        if repeated:
            self.rows.pop()
        before = best_value(self.rows, self.metric, self.mode)
        self.rows.append(row)
        value = best_value([row], self.metric, self.mode)
        is_best = value is not None and (before is None or (value > before if self.mode == "max" else value < before))
        if self.folder:
            if repeated:
                self.rewrite()
            else:
                self._append(row)
            self.write_summary()
        if self.log:
            self.log(self.tracker_values(row), row["update"])
        return is_best

    def rewrite(self, rows: list[dict] | None = None) -> None:
        """Write metrics.csv anew, from `rows` where they are given, so that later and half-written lines disappear."""
        if rows is not None:
            self.rows = list(rows)
        if self.folder:
            with replacing(self.folder / "metrics.csv") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(self.columns)
                writer.writerows([_cell(row.get(c)) for c in self.columns] for row in self.rows)

    def _append(self, row: dict) -> None:
        if not (self.folder / "metrics.csv").exists():
            self.rewrite()
            return
        with open(self.folder / "metrics.csv", "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([_cell(row.get(c)) for c in self.columns])
            file.flush()
            os.fsync(file.fileno())

    def summary(self) -> dict:
        """What summary.json holds."""
        targets = {}
        for target in self.targets:
            first, confirmed = crossings(self.rows, self.metric, target, self.mode)
            targets[target_key(target)] = {"first": first, "confirmed": confirmed}
        return {
            **self.facts,
            "metric": self.metric,
            "mode": self.mode,
            "best": best_value(self.rows, self.metric, self.mode),
            "last": self.rows[-1].get(self.metric) if self.rows else None,
            "targets": targets,
        }

    def write_summary(self, **facts: object) -> None:
        """Update the facts and write summary.json, whole or not at all."""
        self.facts.update(facts)
        if self.folder:
            with replacing(self.folder / "summary.json") as file:
                json.dump(_finite(self.summary()), file, indent=2, allow_nan=False)
                file.write("\n")

    def tracker_values(self, row: dict) -> dict:
        """A row as tracker scalars: `eval/NAME`, and the metrics again under one prefix for each other x-axis."""
        known = {k: v for k, v in row.items() if v is not None}
        teacher, switch = self.facts.get("teacher"), known.get(f"switch_{self.metric}")
        if teacher and switch is not None:  # how far the teacher is ahead on the switch split; below 0 it is beaten
            known["teacher_gap"] = (teacher["switch"] - switch) * (1 if self.mode == "max" else -1)
        metrics = {k: v for k, v in known.items() if k not in COLUMNS}
        values = {axis: known[axis] for axis in TRACKER_AXES if axis in known}
        values |= {f"eval/{k}": v for k, v in known.items() if k not in TRACKER_AXES}
        for axis in TRACKER_AXES[1:]:
            values |= {f"by_{axis}/{k}": v for k, v in metrics.items()}
        return values

    def tracker_summary(self) -> dict:
        """The final values of a run for a tracker's summary.

        Best, last, the crossings on each axis (absent if censored), the teacher's scores, and where and why it fell
        silent.
        """
        summary = self.summary()
        values = {"best": summary["best"], "last": summary["last"]}
        values |= {f"teacher/{split}": (summary.get("teacher") or {}).get(split) for split in ("switch", "report")}
        values |= {f"kd_off/{key}": value for key, value in (summary.get("kd_off") or {}).items()}
        for tau, kinds in summary["targets"].items():
            for kind, crossing in kinds.items():
                values |= {f"{kind}@{tau}/{axis}": v for axis, v in (crossing or {}).items()}
        return {k: v for k, v in values.items() if v is not None}


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.csv: floats, None for an empty cell.

    Raises:
        ValueError: a line has another number of cells than the header, or a cell is no number; the line is named.
    """
    try:
        with open(path, newline="") as file:
            lines = list(csv.reader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV file: {error}") from None
    if not lines:
        raise ValueError(f"{path} is empty")
    header, rows = lines[0], []
    if "update" not in header:
        raise ValueError(f"{path} line 1: no column 'update' in the header")
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise ValueError(f"{path} line {number}: {len(line)} cells where the header has {len(header)}")
        try:
            rows.append({name: float(cell) if cell else None for name, cell in zip(header, line, strict=True)})
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from None
        if rows[-1]["update"] is None or not math.isfinite(rows[-1]["update"]):
            raise ValueError(f"{path} line {number}: no update")
    return rows


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w", suffix: str = ".partial") -> Iterator:
    """Open a file, as text or ("wb") binary, that takes the place of `path` once it is whole and on disk.

    Until then its name ends in `suffix`, which must differ between processes that may write it at the same time.
    """
    beside = path.with_name(path.name + suffix)
    try:
        with open(beside, mode, newline="" if mode == "w" else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return repr(value) if type(value) is int else repr(float(value))  # repr round-trips a float exactly


def _finite(value: object) -> object:
    """JSON knows no NaN or infinity: null instead."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
