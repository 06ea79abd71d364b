"""How much earlier did taught runs reach a target? Run folders in; a table, a report, a page and curves out.

python -m w2s.compare --baseline RUN... --treated RUN... --out DIR
python -m w2s.compare --arm baseline='output/b-seed*' --arm w2s='output/w-seed*' --arm shuffled=... --out DIR
"""

import argparse
import glob
import json
import shlex
import sys
from pathlib import Path

from w2s.compare.report import draw_curves, write_html, write_report
from w2s.compare.runs import Run, choose_targets, read_run
from w2s.compare.speedup import compare
from w2s.compare.strength import draw_strength, strength_points
from w2s.record import replacing

RESERVED = ("speedup", "lower_bound", "confirmed", "versus")  # keys beside the arms in speedup.json


def write_all(result: dict, arms: dict[str, list[Run]], out: Path, command: str) -> str:
    """Write the four files into `out`, each whole or as it was before. Returns the report as Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    report = write_report(result, arms, command)
    names = ("speedup.json", "report.md", "report.html", "curves.png")
    with replacing(out / names[0]) as table, replacing(out / names[1]) as text, replacing(out / names[2]) as page:
        json.dump(result, table, indent=2, allow_nan=False)
        text.write(report + "\n![curves](curves.png)\n" + "![strength](strength.png)\n" * ("strength" in result))
        page.write(write_html(result, arms, command))
        with replacing(out / names[3], "wb") as image:
            draw_curves(result, arms, image)
    if "strength" in result:
        with replacing(out / "strength.png", "wb") as image:
            draw_strength(result, image)
    return report


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; raises argparse.ArgumentError or ValueError."""
    parser = argparse.ArgumentParser("python -m w2s.compare", description=__doc__.split("\n")[0], exit_on_error=False)
    for arm in ("baseline", "treated"):
        parser.add_argument(f"--{arm}", nargs="+", default=[], type=Path, metavar="RUN", help=f"{arm} run folders")
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
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the four files go")
    parser.add_argument("--log-with", choices=["wandb"], help="log table and curves as a run of its own")
    parser.add_argument("--project", default="w2s", help="W&B project (w2s)")
    parser.add_argument("--group", help="W&B group (default: that of the runs, else the folder in --out)")
    args = parser.parse_args(argv)
    if bool(args.arm) == bool(args.baseline or args.treated) or bool(args.baseline) != bool(args.treated):
        raise ValueError("give --baseline RUN... and --treated RUN..., or --arm NAME=GLOB for each arm")
    args.allow = tuple(name.lstrip("-").replace("-", "_") for name in args.allow) + ("target",) * bool(args.target)
    return args


def find_arms(args: argparse.Namespace) -> dict[str, list[Path]]:
    """The run folders of each arm. Raises ValueError: an arm without runs, a folder twice, a name that is taken."""
    arms: dict[str, list[Path]] = {"baseline": args.baseline, "treated": args.treated} if args.baseline else {}
    for text in args.arm:
        name, _, pattern = text.partition("=")
        if not name or not pattern or name in RESERVED:
            raise ValueError(f"--arm {text}: takes NAME=GLOB" + f"; {name} is no free name" * (name in RESERVED))
        folders = [Path(path) for path in sorted(glob.glob(pattern))]
        if not folders:
            raise ValueError(f"--arm {text}: no such folder")
        arms[name] = arms.get(name, []) + folders
    if len(arms) < 2:
        raise ValueError("one arm alone: give --arm NAME=GLOB again for the arm to compare with")
    folders = [folder.resolve() for group in arms.values() for folder in group]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise ValueError(f"{twice[0]} is given twice")
    return arms


def check_wandb() -> None:
    """Raise ValueError where W&B cannot be used: not installed, or no key and not offline."""
    from w2s.engine.errors import InputError
    from w2s.engine.trackers import check_trackers

    try:
        check_trackers("wandb")
    except InputError as error:
        raise ValueError(str(error)) from None


def log_to_wandb(args: argparse.Namespace, result: dict, arms: dict[str, list[Run]]) -> None:
    """Log the table, the curves and the page as a run of its own, in the group of the runs compared."""
    import wandb

    runs = [run for group in arms.values() for run in group]
    group = args.group or runs[0].options.get("group") or args.out.name
    board = wandb.init(project=args.project, group=group, job_type="compare", name=args.out.name, dir=str(args.out))
    columns = ["target", "arm", "axis", "speedup", "lower_bound", "geometric_mean", "low", "high", "p"]
    table, summary = wandb.Table(columns=columns), {}
    for tau, entry in result["targets"].items():
        for arm, axes in entry["versus"].items():
            for axis, v in axes.items():
                low, high = v["interval"] or (None, None)
                table.add_data(tau, arm, axis, *(v[key] for key in columns[3:6]), low, high, v["p"])
                if v["geometric_mean"]:
                    summary[f"speedup@{tau}/{arm}/{axis}"] = v["geometric_mean"]
    page = wandb.Html(str(args.out / "report.html"))
    board.log({"speedups": table, "curves": wandb.Image(str(args.out / "curves.png")), "report": page})
    board.summary.update(summary)
    board.finish()


def main(argv: list[str] | None = None) -> int:
    """Compare the runs named on the command line. Returns the exit code: 0 done, 2 bad input."""
    command = shlex.join(["python", "-m", "w2s.compare", *(sys.argv[1:] if argv is None else argv)])
    try:
        args = parse(argv)
        if args.log_with:
            check_wandb()
        arms = {arm: [*map(read_run, folders)] for arm, folders in find_arms(args).items()}
        targets = choose_targets([run for group in arms.values() for run in group], args.target)
        result = compare(arms, targets, args.margin, args.allow)
        if args.strength:
            result["strength"] = strength_points(result, arms)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(write_all(result, arms, args.out, command), end="")
    if args.log_with:
        log_to_wandb(args, result, arms)
    return 0


if __name__ == "__main__":
    sys.exit(main())
