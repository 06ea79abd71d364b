"""How much earlier did taught runs reach a target? Run folders in; a verdict, a report, a page and curves out.

python -m w2s.compare --baseline RUN... --treated RUN... --out DIR
python -m w2s.compare --arm baseline='output/b-seed*' --arm w2s='output/w-seed*' --arm shuffled=... --out DIR
"""

import argparse
import glob
import io
import json
import math
import shlex
import sys
from pathlib import Path

from w2s import require

try:
    from w2s.compare.budget import compare_budgets
    from w2s.compare.budget_report import budget_report, budget_table, budget_verdict, draw_budgets
    from w2s.compare.comparable import choose_targets
    from w2s.compare.curves import draw_curves
    from w2s.compare.report import markdown_table, write_html, write_markdown
    from w2s.compare.runs import RunFolder, read_run
    from w2s.compare.sections import headline_table
    from w2s.compare.speedup import compare_arms
    from w2s.compare.strength import draw_strength, strength_points
    from w2s.compare.verdict import verdict
    from w2s.compare.wandb_run import check_wandb, log_to_wandb
    from w2s.record import replacing
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; pip install 'w2s[compare]'")

RESERVED = ("speedup", "lower_bound", "confirmed", "versus")  # keys beside the arms in speedup.json


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; raises argparse.ArgumentError or ValueError."""
    parser = argparse.ArgumentParser("python -m w2s.compare", description=__doc__.split("\n")[0], exit_on_error=False)
    for arm in ("baseline", "treated"):
        parser.add_argument(f"--{arm}", nargs="+", default=[], metavar="RUN", help=f"{arm} run folders, or patterns")
    parser.add_argument(
        "--arm", action="append", default=[], metavar="NAME=GLOB", help="runs of an arm; the first is the reference"
    )
    parser.add_argument("--target", nargs="+", type=float, metavar="TAU", help="instead of the targets of the runs")
    parser.add_argument("--margin", type=float, help="how much worse the metric may end and still be non-inferior")
    parser.add_argument("--allow", nargs="+", default=[], metavar="NAME", help="settings that may differ all the same")
    parser.add_argument(
        "--strength",
        action="store_true",
        help="arms differ in their teachers: draw speedup against the teacher's gap, too",
    )
    parser.add_argument(
        "--budget",
        action="store_true",
        help="the runs of each arm have schedules of several lengths: compare final quality against the budget",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the files go")
    parser.add_argument("--log-with", choices=["wandb"], help="log table and curves as a run of its own")
    parser.add_argument("--project", default="w2s", help="W&B project (w2s)")
    parser.add_argument("--group", help="W&B group (default: that of the runs, else the folder in --out)")
    args, unknown = parser.parse_known_args(argv)
    if unknown and unknown[0].startswith("-"):
        raise ValueError(f"unknown option {unknown[0]}; --help lists those there are")
    if unknown:
        raise ValueError(f"'{unknown[0]}' belongs to no option; the runs follow --baseline and --treated, or --arm")
    if bool(args.arm) == bool(args.baseline or args.treated) or bool(args.baseline) != bool(args.treated):
        raise ValueError("give --baseline RUN... and --treated RUN..., or --arm NAME=GLOB for each arm")
    if args.margin is not None and not 0 <= args.margin < math.inf:
        raise ValueError(f"--margin {args.margin:g}: give a finite number of at least 0, in the unit of the metric")
    if args.budget and (args.strength or args.target or args.log_with):
        raise ValueError("--budget compares final metrics: leave --strength, --target and --log-with out")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; name a folder")
    if (args.out / "metrics.csv").exists():
        raise ValueError(f"--out {args.out} is the folder of a run; name another one")
    return args


def find_arms(baseline: list[str], treated: list[str], named: list[str]) -> dict[str, list[Path]]:
    """The run folders of each arm, the reference first.

    Args:
        baseline, treated: folders or patterns; empty where arms are named.
        named: `NAME=GLOB`, repeated for an arm of several patterns.

    Raises:
        ValueError: an arm has no runs or a reserved name, there is only one arm, or a folder is given twice.
    """
    arms: dict[str, list[Path]] = {}
    for name, patterns in (("baseline", baseline), ("treated", treated)):
        for pattern in patterns:
            arms[name] = arms.get(name, []) + _expand(pattern, option=f"--{name} {pattern}")
    for text in named:
        name, _, pattern = text.partition("=")
        if not name or not pattern:
            raise ValueError(f"--arm {text}: takes NAME=GLOB")
        if name in RESERVED:
            raise ValueError(f"--arm {text}: {name} is not a free name, choose another")
        arms[name] = arms.get(name, []) + _expand(pattern, option=f"--arm {text}")
    if len(arms) < 2:
        raise ValueError("one arm alone: give --arm NAME=GLOB again for the arm to compare with")
    resolved = [folder.resolve() for group in arms.values() for folder in group]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise ValueError(f"{folder} is given twice")
    return arms


def _expand(pattern: str, option: str) -> list[Path]:
    """The folder of this name or else all that match the pattern; raises ValueError where there is none."""
    if Path(pattern).exists():
        return [Path(pattern)]
    folders = [Path(path) for path in sorted(glob.glob(pattern))]
    if not folders:
        raise ValueError(f"{option}: no such folder")
    return folders


def write_budget(args: argparse.Namespace, command: str) -> list[Path]:
    """Compare schedules of several lengths, write the files and print the verdict. Raises ValueError or OSError."""
    result = compare_budgets(read_arms(args), margin=args.margin, allow=allowed(args))
    args.out.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    draw_budgets(result, image)
    contents = {
        "budget.json": json.dumps(result, indent=2, allow_nan=False).encode(),
        "budget.md": budget_report(result, command).encode(),
        "budget.png": image.getvalue(),
    }
    paths = replace_files(contents, args.out)
    print(f"{budget_verdict(result)}\n\n{markdown_table(budget_table(result))}\n")
    return paths


def write_files(result: dict, arms: dict[str, list[RunFolder]], out: Path, command: str) -> list[Path]:
    """Write the files of a comparison into `out`, all made before the first is written. Returns their paths."""
    contents = {
        "speedup.json": json.dumps(result, indent=2, allow_nan=False).encode(),
        "report.md": write_markdown(result, arms, command).encode(),
        "report.html": write_html(result, arms, command).encode(),
    }
    image = io.BytesIO()
    draw_curves(result, arms, image)
    contents["curves.png"] = image.getvalue()
    if "strength" in result:
        image = io.BytesIO()
        draw_strength(result, image)
        contents["strength.png"] = image.getvalue()
    return replace_files(contents, out)


def replace_files(contents: dict[str, bytes], out: Path) -> list[Path]:
    """Write whole files into `out`. Returns their paths."""
    for name, content in contents.items():
        with replacing(out / name, "wb") as file:
            file.write(content)
    return [out / name for name in contents]


def read_arms(args: argparse.Namespace) -> dict[str, list[RunFolder]]:
    """The runs of each arm that the command line names. Raises ValueError or OSError."""
    folders = find_arms(args.baseline, args.treated, args.arm)
    return {arm: [read_run(folder) for folder in group] for arm, group in folders.items()}


def allowed(args: argparse.Namespace) -> tuple[str, ...]:
    """The settings of --allow, written as options are recorded."""
    return tuple(name.lstrip("-").replace("-", "_") for name in args.allow)


def compare_folders(args: argparse.Namespace) -> tuple[dict, dict[str, list[RunFolder]]]:
    """The comparison that the command line asks for, and the runs of each arm. Raises ValueError or OSError."""
    arms = read_arms(args)
    targets = choose_targets([run for group in arms.values() for run in group], args.target)
    allow = (*allowed(args), *(("target",) if args.target else ()))  # the targets of the runs are not used then
    result = compare_arms(arms, targets, margin=args.margin, allow=allow)
    if args.strength:
        result["strength"] = strength_points(result, arms)
    return result, arms


def run_command(argv: list[str] | None) -> int:
    """Compare the runs named on the command line, write the files and print the verdict. Returns the exit code."""
    command = shlex.join(["python", "-m", "w2s.compare", *(sys.argv[1:] if argv is None else argv)])
    try:
        args = parse_arguments(argv)
        require("compare", "matplotlib", "scipy")  # they are slow to import, and so imported late
        if args.log_with:
            check_wandb()
        if args.budget:
            print(*write_budget(args, command), sep="\n", flush=True)
            return 0
        result, arms = compare_folders(args)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, ModuleNotFoundError, argparse.ArgumentError) as error:
        return _refuse(error)
    paths = write_files(result, arms, args.out, command)
    print(f"{verdict(result, arms)}\n\n{markdown_table(headline_table(result, arms))}\n")
    print(*paths, sep="\n", flush=True)
    if args.log_with:
        first = next(iter(arms.values()))[0]
        group = args.group or first.options.get("group") or args.out.name
        try:
            log_to_wandb(result, out=args.out, project=args.project, group=group)
        except ValueError as error:
            return _refuse(error)
    return 0


def _refuse(error: Exception) -> int:
    """Say what is wrong in one line. Returns the exit code of bad input."""
    print(f"error: {error}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0 done, 2 bad input, 130 interrupted."""
    try:
        return run_command(argv)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
