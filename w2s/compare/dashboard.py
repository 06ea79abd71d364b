"""The saved W&B workspace of a comparison: the arms' curves over three axes, first@tau, and what the teacher did.

    python -m w2s.compare.dashboard --project P [--entity E] [--group G]

The runs are those that the scripts logged with `--log-with wandb`, in W&B's own cloud or server (offline runs: after
`wandb sync`). Needs the library `wandb-workspaces`. A workspace is only a view: the runs themselves are not changed.
"""

import argparse
import importlib.util
import re
import sys

from w2s.compare.text import AXIS_NAMES
from w2s.record import TRACKER_AXES

# one curve or bar per arm: the median of its seeds, with the range from the least to the greatest
PER_ARM = {"groupby": "JobType", "groupby_aggfunc": "median", "groupby_rangefunc": "minmax"}


def choose_group(runs: list, group: str | None) -> tuple[str, list]:
    """A group and its runs: the one asked for, or the only one in which a student was taught.

    Args:
        runs: with `group` and `job_type`, as W&B's API gives them.
        group: the name of the group, if one was asked for.

    Raises:
        ValueError: there is none, or more than one.
    """
    groups = {}
    for run in runs:
        if run.job_type != "compare" and run.group:
            groups.setdefault(run.group, []).append(run)
    taught = [name for name, members in groups.items() if any(run.job_type != "baseline" for run in members)]
    if group is None and len(taught) == 1:
        group = taught[0]
    if group not in groups:
        known = f"it has {', '.join(sorted(groups))}" if groups else "it has no runs that the scripts have logged"
        raise ValueError(f"no group {group}: {known}" if group else f"choose runs with --group: {known}")
    return group, groups[group]


def build_workspace(entity: str, project: str, group: str, runs: list):
    """The workspace of a group of runs, not yet saved. It draws only what at least one of them has logged.

    Args:
        entity, project: where the runs are.
        group: their group.
        runs: with `summary`, a mapping of everything logged, as W&B's API gives it.

    Raises:
        ValueError: none of the runs has finished, so that the metric is not known.
    """
    import wandb_workspaces.expr as expr
    import wandb_workspaces.workspaces as ws

    keys = {key for run in runs for key in run.summary.keys()}  # noqa: SIM118 - W&B's summary is no whole mapping
    metrics = sorted({metric for run in runs if (metric := run.summary.get("metric"))})
    if not metrics:
        raise ValueError(f"no run of group {group} has ended yet: their metric is not known")
    panels = {
        "Curves of the arms": _metric_panels(keys, metrics),
        "first@tau": _crossing_panels(keys),
        "Distillation": _distillation_panels(keys),
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"w2s {group}",
        sections=[ws.Section(name=name, panels=made, is_open=True) for name, made in panels.items() if made],
        runset_settings=ws.RunsetSettings(filters=[expr.Metric("Group") == group]),
    )


def _line_panels(x: str, y: str, title: str, keys: set[str]) -> list:
    """One panel of curves, or none where nothing of it was logged."""
    import wandb_workspaces.reports.v2 as wr

    if not {x, y} <= keys:
        return []
    return [wr.LinePlot(title=title, x=x, y=[y], title_x=AXIS_NAMES[x], **PER_ARM)]


def _metric_panels(keys: set[str], metrics: list[str]) -> list:
    panels = []
    for metric in metrics:
        for axis in TRACKER_AXES:
            logged = f"eval/{metric}" if axis == "epoch" else f"by_{axis}/{metric}"
            panels += _line_panels(axis, logged, f"{metric} over {AXIS_NAMES[axis]}", keys)
    return panels


def _crossing_panels(keys: set[str]) -> list:
    """The cost of first@tau; runs that never crossed have logged none and are not in it."""
    import wandb_workspaces.reports.v2 as wr

    targets = [match[1] for key in keys if (match := re.fullmatch(r"first@(.+)/epoch", key))]
    panels = []
    for target in sorted(targets, key=float):
        for axis in TRACKER_AXES:
            key = f"first@{target}/{axis}"
            if key in keys:
                title = f"first@{target}, {AXIS_NAMES[axis]} (crossed runs)"
                panels.append(wr.BarPlot(title=title, metrics=[key], **PER_ARM))
    return panels


def _distillation_panels(keys: set[str]) -> list:
    import wandb_workspaces.reports.v2 as wr

    panels = _line_panels("epoch", "eval/kd_weight", "distillation weight", keys)
    panels += _line_panels("epoch", "eval/teacher_gap", "teacher ahead of student, switch split (0: level)", keys)
    if {"kd_off/epoch", "last"} <= keys:
        off, last = wr.SummaryMetric("kd_off/epoch"), wr.SummaryMetric("last")
        panels.append(wr.ScatterPlot(title="switch-off (epochs) and the metric at the end", x=off, y=last))
    return panels


def save_dashboard(argv: list[str] | None) -> str:
    """Build and save the workspace named on the command line. Returns its address.

    Raises:
        argparse.ArgumentError, ValueError: bad input, or W&B refuses.
    """
    parser = argparse.ArgumentParser(
        "python -m w2s.compare.dashboard", description=__doc__.split("\n")[0], exit_on_error=False
    )
    parser.add_argument("--project", help="W&B project; needed")
    parser.add_argument("--entity", help="W&B user or team (default: yours)")
    parser.add_argument("--group", help="of the runs (default: the only one with a taught student)")
    args = parser.parse_args(argv)
    if not args.project:
        raise ValueError("give the --project that the runs are in")
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ValueError("the dashboard needs a library that is not installed: pip install wandb-workspaces")
    import wandb

    try:
        api = wandb.Api()
        entity = args.entity or api.default_entity
        runs = list(api.runs(f"{entity}/{args.project}"))
    except Exception as error:  # no key, no network, no such project: wandb raises many kinds
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ValueError(f"cannot read project {args.project}: {type(error).__name__}: {reason}") from None
    group, members = choose_group(runs, args.group)
    workspace = build_workspace(entity, args.project, group, members)
    try:
        workspace.save()
    except Exception as error:
        raise ValueError(f"cannot save the workspace: {' '.join(str(error).split())[:200]}") from None
    return workspace.url


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0 done, 2 bad input, 130 interrupted."""
    try:
        print(save_dashboard(argv))
    except (ValueError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
