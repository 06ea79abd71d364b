"""Which runs may be compared: arms that differ in nothing but the teacher, with runs that pair up by seed."""

import difflib
import math
from collections.abc import Collection
from pathlib import Path

from w2s.compare.runs import RunFolder, teacher_folder
from w2s.crossing import target_key
from w2s.record import BOOKKEEPING_OPTIONS

MUST_MATCH = ("task", "metric", "mode")  # a comparison across these means nothing, so --allow does not open them
# the seeds pair the runs; the targets are compared as numbers, from summary.json, and the features that judge samples
# by their weights; `workers` stays compared, since it changes what an update costs
FREE_OPTIONS = {*BOOKKEEPING_OPTIONS, "seed", "target", "fd_features", "fid_weights"}
TEACHER_PREFIXES = ("kd_", "teacher")  # of the options in which arms differ by intention
KD_PREFIXES = ("kd_", "teacher_classes", "teacher_score")  # of those that say the same wherever the teacher's folder is


def common_settings(run: RunFolder) -> dict:
    """Everything that runs of all arms must have in common, by name; what belongs to the teacher is left out."""
    settings = {}
    for name, value in run.options.items():
        if name not in FREE_OPTIONS and not name.startswith(TEACHER_PREFIXES):
            settings[name] = value
    environment = run.summary["environment"] or {}
    for name in ("device", "processes", "earlier_processes", "sharding", "mixed_precision"):
        settings[name] = environment.get(name) or None  # no earlier processes are none
    for name in (*MUST_MATCH, "weights", "params", "data"):
        settings[name] = run.summary.get(name)
    settings["flops"] = (run.summary.get("flops") or {}).get("student_update")
    settings["features"] = (run.summary.get("features") or {}).get("digest")
    settings["target"] = sorted(float(key) for key in run.summary["targets"])
    return settings


def _distillation_settings(run: RunFolder) -> dict:
    """What runs of the same arm must have in common beside the common settings.

    The teacher is known by the name of its folder, since folders may have been moved, and by which of the run's weights
    were taken. Without a teacher its options have no effect, so that they may differ.
    """
    teacher = run.summary["teacher"]
    if not teacher:
        return {"teacher": None}
    settings = {name: value for name, value in run.options.items() if name.startswith(KD_PREFIXES)}
    if run.summary["teachers"]:  # of which not all need have had their turn
        return settings | {"teachers": [Path(spec).name for spec in run.options["teacher"]]}
    folder = teacher_folder(teacher)
    return settings | {
        "teacher": folder.name if folder else None,
        "teacher model": teacher.get("model"),
        "teacher params": teacher.get("params"),
        "teacher weights": "best" if Path(str(teacher.get("checkpoint") or "")).name == "best" else "last",
    }


def _evaluation_grid(run: RunFolder) -> list[tuple]:
    """Epoch, update and samples of each evaluation, which also fix the batch size and the length of the run."""
    return [(round(row["epoch"], 6), row["update"], row.get("samples")) for row in run.rows]


def check_comparable(arms: dict[str, list[RunFolder]], allow: tuple[str, ...] = ()) -> list[str]:
    """Check that the arms differ in nothing but the teacher, and that their runs can be paired by seed.

    Args:
        arms: the runs of each arm, the reference first.
        allow: names of settings that may differ all the same, also "grid" and "seeds".

    Returns:
        The differences that `allow` let pass, one line each.

    Raises:
        ValueError: a difference that is not allowed; its one line describes the first and names the others.
    """
    runs = [run for group in arms.values() for run in group]
    _check_allowed(allow, runs)
    differences = differing_settings(runs)
    for arm, group in arms.items():
        _check_arm(arm, group)
    if missing := _missing_seed(arms):
        differences["seeds"] = missing
    if refused := [name for name in differences if name not in allow]:
        others = f" (and in {', '.join(refused[1:])})" if refused[1:] else ""
        remedy = "" if refused[0] in MUST_MATCH else f"; --allow {' '.join(refused)} compares them all the same"
        raise ValueError(f"the runs differ in {differences[refused[0]]}{others}{remedy}")
    return list(differences.values())


def _check_allowed(allow: tuple[str, ...], runs: list[RunFolder]) -> None:
    known = {"grid", "seeds"}.union(*(common_settings(run) for run in runs))
    for name in allow:
        if name in MUST_MATCH or name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f", try {close[0]}" if close else ""
            raise ValueError(f"--allow {name}: not a setting that may differ{hint}")


def differing_settings(runs: list[RunFolder]) -> dict[str, str]:
    """For each setting in which the first run and another one differ, by name: what differs, as text."""
    first, expected = runs[0], common_settings(runs[0])
    differences = {}
    for run in runs[1:]:
        settings = common_settings(run)
        for name in sorted({*expected, *settings}, key=lambda name: (name not in MUST_MATCH, name)):
            if expected.get(name) != settings.get(name):
                values = f"{expected.get(name)!r} in {first.path}, {settings.get(name)!r} in {run.path}"
                differences.setdefault(name, f"{name}: {values}")
        if _evaluation_grid(first) != _evaluation_grid(run):
            differences.setdefault("grid", f"the epochs of their evaluations: {first.path}, {run.path}")
    return differences


def _check_arm(arm: str, group: list[RunFolder]) -> None:
    """Check that within an arm the teacher, its schedule and the grid are the same, and that each seed is new."""
    first, seeds = group[0], [run.seed for run in group]
    for run in group:
        if run.seed is None or seeds.count(run.seed) > 1:
            problem = "no seed" if run.seed is None else f"seed {run.seed} twice"
            lengths = {other.options.get("epochs", other.options.get("updates")) for other in group}
            hint = "; runs of several lengths are compared with --budget" if len(lengths) > 1 else ""
            raise ValueError(f"arm {arm} has {problem} ({run.path}), so that its runs cannot be paired{hint}")
        if _evaluation_grid(first) != _evaluation_grid(run):
            raise ValueError(f"the runs differ in the epochs of their evaluations: {first.path}, {run.path}")
    check_teaching(arm, group)


def check_teaching(arm: str, group: list[RunFolder], free: Collection[str] = ()) -> None:
    """Check that the runs of an arm have the same teacher and the same options of distillation, apart from `free`.

    Raises:
        ValueError: two runs differ; its one line names what and which.
    """
    first = group[0]
    expected = _distillation_settings(first)
    for run in group:
        settings = _distillation_settings(run)
        for name in expected | settings:
            if name not in free and expected.get(name) != settings.get(name):
                values = f"{expected.get(name)!r} in {first.path}, {settings.get(name)!r} in {run.path}"
                raise ValueError(f"the runs of arm {arm} differ in {name}: {values}")


def _missing_seed(arms: dict[str, list[RunFolder]]) -> str:
    """The first seed that one arm has and another does not, as text; empty if there is none."""
    seeds = {arm: {run.seed for run in group} for arm, group in arms.items()}
    for seed in sorted(set().union(*seeds.values())):
        for arm in arms:
            if seed not in seeds[arm]:
                return f"seeds: {arm} has no run of seed {seed}"
    return ""


def choose_targets(runs: list[RunFolder], given: list[float] | None = None) -> list[float]:
    """The targets given, or else those of all runs; the easiest comes first.

    Raises:
        ValueError: there are none, one is not a finite number, or one is a share where percent are expected.
    """
    targets = given or [float(key) for run in runs for key in run.summary["targets"]]
    by_key = {target_key(target): target for target in targets}
    best = max((run.summary["best"] or 0 for run in runs if run.summary["mode"] == "max"), default=0)
    for target in given or []:
        if 0 < target < 1 and 2 < best <= 100:
            raise ValueError(f"--target {target:g}: {target:g} percent? Write {100 * target:g}")
    if not by_key:
        raise ValueError("no targets: --target gives them")
    if not all(math.isfinite(target) for target in targets):
        raise ValueError(f"target not finite: {', '.join(by_key)}")
    return sorted(by_key.values(), reverse=runs[0].summary["mode"] == "min")
