"""Run folders as evidence: read whole, checked against themselves, and against each other before they are compared."""

import difflib
import json
import math
from pathlib import Path
from typing import NamedTuple

import yaml

from w2s.crossing import best_value, crossings, target_key
from w2s.record import read_metrics

SCRIPTS = {"cls": "train_cls.py", "det": "train_det.py", "diffusion": "train_diffusion.py"}
FIELDS = dict.fromkeys(("task", "name", "status", "metric", "mode"), str) | {"targets": dict}
FIELDS |= dict.fromkeys(("teacher", "kd_off", "environment"), dict | None)
# options that change neither the training nor its cost; the targets are compared as numbers
FREE = {
    *("config", "output", "name", "seed", "target", "resume", "dry_run", "eval_only", "log_with", "project", "group"),
    *("log_interval", "checkpoint_hist", "recovery_interval", "check_images", "validation_batch_size", "fd_cache"),
}
NEVER = ("task", "metric", "mode")  # a comparison across these means nothing, so --allow does not open them


class Run(NamedTuple):
    """A run: `summary` as in summary.json; `rows` one dict an evaluation, each update once, in order; its options."""

    folder: Path
    summary: dict
    rows: list[dict]
    options: dict

    @property
    def seed(self) -> int | None:
        return self.summary.get("seed")


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        ValueError: a file is missing or malformed, the run is empty or unfinished, or metrics.csv and summary.json
            contradict each other.
    """
    metrics, facts, options = folder / "metrics.csv", folder / "summary.json", folder / "args.yaml"
    for path in (folder, metrics, facts, options):
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
    if not all(math.isfinite(_or_nan(row.get(key))) for row in rows for key in ("epoch", "update")):
        raise ValueError(f"{metrics} has a row without epoch or update")
    rows = [row for _, row in sorted({row["update"]: row for row in rows}.items())]
    run = Run(folder, summary, rows, _read_options(options))
    _check_story(run)
    return run


def _read_options(path: Path) -> dict:
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds no options")
    return options


def _check_story(run: Run) -> None:
    """Raise ValueError where summary.json does not follow from metrics.csv: one of them was edited by hand."""
    _, summary, rows, _ = run
    metric, mode = summary["metric"], summary["mode"]
    told = {"best": best_value(rows, metric, mode), "last": rows[-1].get(metric)}
    kept = {key: summary.get(key) for key in told}
    for key in summary["targets"]:
        told[f"first@{key}"], told[f"confirmed first@{key}"] = crossings(rows, metric, float(key), mode)
        kept[f"first@{key}"] = summary["targets"][key].get("first")
        kept[f"confirmed first@{key}"] = summary["targets"][key].get("confirmed")
    for key, value in told.items():
        if (value if isinstance(value, dict) or math.isfinite(_or_nan(value)) else None) != kept[key]:
            where = f"metrics.csv and summary.json of {run.folder}"
            raise ValueError(f"{where} disagree in {key} ({_brief(value)}, {_brief(kept[key])}): edited by hand?")


def _brief(value: object) -> str:
    return f"epoch {value.get('epoch')}, {value.get('value')}" if isinstance(value, dict) else str(value)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def grid(run: Run) -> list[tuple]:
    """Where a run was evaluated: epoch, update and samples of each row; that is also its batch size and its length."""
    return [(round(row["epoch"], 6), row["update"], row.get("samples")) for row in run.rows]


def settings(run: Run) -> dict:
    """Everything that two runs compared must have in common, by name; what belongs to the teacher is left out."""
    taught = ("kd_", "teacher")
    same = {key: value for key, value in run.options.items() if key not in FREE and not key.startswith(taught)}
    places = run.summary["environment"] or {}
    same |= {key: places.get(key) for key in ("device", "processes", "mixed_precision")}
    same |= {key: run.summary.get(key) for key in (*NEVER, "weights", "params", "data")}
    same["flops"] = (run.summary.get("flops") or {}).get("student_update")
    same["target"] = sorted(map(float, run.summary["targets"]))
    return same


def _teaching(run: Run) -> dict:
    """What the runs of one arm have in common beside that; the teacher is known by its name: paths may be moved."""
    teacher, folder = run.summary["teacher"] or {}, _teacher_folder(run)
    same = {key: value for key, value in run.options.items() if key.startswith("kd_")}
    same |= {f"teacher {key}": teacher.get(key) for key in ("model", "params")}
    return same | {"teacher": folder and folder.name}


def check_comparable(arms: dict[str, list[Run]], allow: tuple[str, ...] = ()) -> list[str]:
    """See that the arms differ in nothing but the teacher, and that their runs can be paired by seed.

    Args:
        arms: the runs of each arm, the reference first.
        allow: names of settings that may differ all the same; "grid" and "seeds" too.

    Returns:
        What differs by leave of `allow`, a line each.

    Raises:
        ValueError: one line that names the first difference, and the others in short.
    """
    runs = [run for group in arms.values() for run in group]
    first, common = runs[0], settings(runs[0])
    known = {name for run in runs for name in settings(run)} | {"grid", "seeds"}
    for name in allow:
        if name in NEVER or name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"--allow {name}: not a setting that may differ" + f", try {close[0]}" * bool(close))
    found = {}  # name: what differs
    for run in runs[1:]:
        for name in sorted({*common, *settings(run)}, key=lambda name: (name not in NEVER, name)):
            one, other = common.get(name), settings(run).get(name)
            if one != other:
                found.setdefault(name, f"{name}: {one!r} in {first.folder}, {other!r} in {run.folder}")
        if grid(first) != grid(run):
            found.setdefault("grid", f"the epochs of their evaluations: {first.folder}, {run.folder}")
    for arm, group in arms.items():
        _check_arm(arm, group)
    if missing := _missing_seeds(arms):
        found["seeds"] = missing
    if refused := [name for name in found if name not in allow]:
        others = f" (and in {', '.join(refused[1:])})" if refused[1:] else ""
        leave = "" if refused[0] in NEVER else f"; --allow {' '.join(refused)} compares them all the same"
        raise ValueError(f"the runs differ in {found[refused[0]]}{others}{leave}")
    return list(found.values())


def _check_arm(arm: str, group: list[Run]) -> None:
    """Within an arm the teacher and its phase are the same too, the grid without exception, and each seed is new."""
    first, seeds = group[0], [run.seed for run in group]
    for run in group:
        if run.seed is None or seeds.count(run.seed) > 1:
            what = "no seed" if run.seed is None else f"seed {run.seed} twice"
            raise ValueError(f"arm {arm} has {what} ({run.folder}), so that its runs cannot be paired")
        one, other = _teaching(first), _teaching(run)
        if name := next((name for name in one | other if one.get(name) != other.get(name)), None):
            values = f"{one.get(name)!r} in {first.folder}, {other.get(name)!r} in {run.folder}"
            raise ValueError(f"the runs of arm {arm} differ in {name}: {values}")
        if grid(first) != grid(run):
            raise ValueError(f"the runs differ in the epochs of their evaluations: {first.folder}, {run.folder}")


def _missing_seeds(arms: dict[str, list[Run]]) -> str:
    """The first seed that one arm has and another has not, as text."""
    seeds = {arm: {run.seed for run in group} for arm, group in arms.items()}
    for seed in sorted(set().union(*seeds.values())):
        if lacking := [arm for arm in arms if seed not in seeds[arm]]:
            return f"seeds: {lacking[0]} has no run of seed {seed}"
    return ""


def choose_targets(runs: list[Run], given: list[float] | None = None) -> list[float]:
    """The targets given, else all of the runs, the easiest first. Raises ValueError: none, or not a finite number."""
    targets = {target_key(tau): tau for tau in given or [float(key) for run in runs for key in run.summary["targets"]]}
    if not targets or not all(map(math.isfinite, targets.values())):
        raise ValueError(f"target not finite: {', '.join(targets)}" if targets else "no targets: --target gives them")
    return sorted(targets.values(), reverse=runs[0].summary["mode"] == "min")


def teacher_run(run: Run) -> Run | None:
    """The finished run that made the teacher of `run`: beside it (records travel together) or at its recorded path."""
    path = _teacher_folder(run)
    for folder in (run.folder.parent / path.name, path) if path else ():
        try:
            return read_run(folder)
        except (ValueError, OSError):
            continue
    return None


def _teacher_folder(run: Run) -> Path | None:
    """Where the teacher of `run` came from: its run folder, if it was one."""
    path = Path(str((run.summary["teacher"] or {}).get("checkpoint") or ""))
    path = path.parent if path.name in ("model", "best") else path
    return path if path.name else None
