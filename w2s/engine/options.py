"""Command-line options shared by the scripts, and recipes: YAML files that hold the same options.

`-c recipe.yaml` first, the command line over it. A recipe goes through the same parser as the command line, so an
unknown key or a value of the wrong type is refused just the same.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from timm.utils import ParseKwargs

from w2s.engine.errors import InputError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are `InputError`s and that reads recipes."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_argument("-c", "--config", metavar="FILE", help="YAML recipe; the command line overrides it")

    def error(self, message: str) -> None:
        raise InputError(message)

    def parse_recipe(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse a command line and the recipe it names.

        Raises:
            InputError: unknown option or key, wrong type, unreadable recipe.
        """
        config = self.parse_args(argv).config
        if not config:
            return self.parse_args(argv)
        tokens = self._recipe_tokens(Path(config))
        try:
            self.parse_args(tokens)
        except InputError as error:
            raise InputError(f"{config}: {error}") from None
        return self.parse_args(tokens + list(sys.argv[1:] if argv is None else argv))

    def _recipe_tokens(self, path: Path) -> list[str]:
        recipe = read_recipe(path)
        actions = {option[2:]: action for option, action in self._option_string_actions.items() if option[:2] == "--"}
        tokens = []
        for key, value in recipe.items():
            option = str(key).replace("_", "-")
            action = actions.get(option)
            negative = isinstance(action, argparse.BooleanOptionalAction) and f"--{option}" != action.option_strings[0]
            if action is None or option in ("config", "help") or negative:
                close = difflib.get_close_matches(option, actions, n=1)
                raise InputError(f"{path}: unknown key '{key}'" + (f", did you mean '{close[0]}'?" if close else ""))
            tokens += _tokens(path, key, action, value)
        return tokens


def read_recipe(path: Path) -> dict:
    """The keys and values of a recipe.

    Raises:
        InputError: it cannot be read or is no mapping.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(f"cannot read recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"recipe {path} is no text file") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, dict):
        raise InputError(f"{path} must be a mapping of options, not a {type(recipe).__name__}")
    return recipe


def _tokens(path: Path, key: str, action: argparse.Action, value: object) -> list[str]:
    """One recipe entry as command-line words."""
    option = action.option_strings[0] if len(action.option_strings) == 1 else f"--{action.dest.replace('_', '-')}"
    if value is None or value == []:  # an empty list is the default, as args.yaml has it
        return []
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise InputError(f"{path}: '{key}' must be true or false, got {value!r}")
        return [option if value else f"--no-{option[2:]}"]
    if isinstance(action, ParseKwargs):
        if not isinstance(value, dict):
            raise InputError(f"{path}: '{key}' must be a mapping of NAME: VALUE, got {value!r}")
        return [option, *(f"{name}={item!r}" for name, item in value.items())]
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and action.nargs is None:
        raise InputError(f"{path}: '{key}' takes one value, got the list {value!r}")
    if any(isinstance(item, bool | dict | list) for item in values):
        raise InputError(f"{path}: '{key}' has a value of the wrong type: {value!r}")
    return [option, *map(str, values)] if action.nargs is not None else [f"{option}={values[0]}"]


class Switch(argparse.BooleanOptionalAction):
    """A yes/no option; unlike its base it may itself be called --no-something."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


class KeyValues(ParseKwargs):
    """timm's NAME=VALUE words, with its errors as argparse knows them; true and false mean what they do in a recipe."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            super().__call__(parser, namespace, values, option_string)
        except (ValueError, SyntaxError):
            raise argparse.ArgumentError(self, f"takes NAME=VALUE words, got {' '.join(values)}") from None
        pairs = getattr(namespace, self.dest)
        truths = {"true": True, "false": False}  # to timm they are words, and a word counts as true
        pairs.update({k: truths[v] for k, v in pairs.items() if isinstance(v, str) and v in truths})


def add_switch(group: argparse._ArgumentGroup, name: str, help: str, default: bool = False) -> None:
    """A yes/no option `--name` that `--no-name` takes back."""
    group.add_argument(name, action=Switch, default=default, help=help)


def add_run_options(parser: Parser) -> None:
    """Where a run lives, how it starts, resumes and is watched."""
    group = parser.add_argument_group("run")
    group.add_argument("--output", metavar="DIR", default="output", help="folder of all runs (default: output)")
    group.add_argument("--name", help="folder of this run in --output (default: recipe or model, and the seed)")
    group.add_argument("--seed", type=natural_int, default=0, help="weights, data order, augmentation (default: 0)")
    group.add_argument(
        "--target", nargs="+", default=[], metavar="TAU", help="metric values to time, fixed before the run: 65 80"
    )
    group.add_argument("--resume", metavar="auto|PATH", help="auto: go on from the newest complete checkpoint, if any")
    add_switch(group, "--dry-run", "a few updates and one evaluation; nothing is kept")
    add_switch(group, "--eval-only", "evaluate --initial-checkpoint, --pretrained or the run's own model, and exit")
    group.add_argument("--checkpoint-hist", type=positive_int, default=2, metavar="N", help="checkpoints kept (2)")
    group.add_argument(
        "--recovery-interval",
        type=natural_int,
        default=0,
        metavar="N",
        help="save every N updates too",
    )
    group.add_argument("--log-interval", type=positive_int, default=50, metavar="N", help="updates between log lines")
    group.add_argument("--log-with", choices=["wandb", "tensorboard", "all"], help="trackers beside metrics.csv")
    group.add_argument("--project", default="w2s", help="tracker project (default: w2s)")
    group.add_argument("--group", metavar="NAME", help="W&B group, one for all arms (default: task, data and model)")


def add_data_options(parser: Parser, kinds: str, folder: str) -> argparse._ArgumentGroup:
    """Images to classify or to generate, of some `kinds` of --dataset, or in a `folder`; returns the group."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="", help=f"{kinds}; '' for a folder")
    group.add_argument("--data-dir", metavar="DIR", help=f"{folder}, or root of the dataset")
    group.add_argument("--train-split", default="train", metavar="NAME")
    group.add_argument("--input-key", metavar="KEY", help="column of the image")
    group.add_argument("--target-key", metavar="KEY", help="column of the label")
    group.add_argument("--train-samples", type=positive_int, metavar="N", help="a seeded, class-balanced subset")
    group.add_argument(
        "--check-images", type=int, default=20000, metavar="N", help="decode N a split first, spread evenly (-1: all)"
    )
    group.add_argument(
        "--cache",
        choices=["auto", "device", "cpu", "none"],
        default="auto",
        help="decode once, keep the pixels there and augment them there (default: auto, on the device if that works)",
    )
    group.add_argument("-j", "--workers", type=natural_int, default=4, metavar="N", help="loader workers a process")
    return group


def add_weights_options(group: argparse._ArgumentGroup, compiled: str = "the student", sync_bn: bool = True) -> None:
    """How the student's weights are averaged, laid out in memory and compiled.

    Args:
        compiled: the part that --torchcompile compiles.
        sync_bn: whether the task's models have BatchNorm.
    """
    add_switch(group, "--model-ema", "evaluate, compare and export the moving average of the weights")
    group.add_argument("--model-ema-decay", type=share, default=0.9998)
    add_switch(group, "--model-ema-warmup", "a smaller decay at first")
    add_switch(group, "--channels-last", "NHWC memory format (default)", default=True)
    if sync_bn:
        add_switch(group, "--sync-bn", "BatchNorm over all GPUs")
    group.add_argument(
        "--torchcompile", type=backend, nargs="?", const="inductor", metavar="BACKEND", help=f"compile {compiled}"
    )


def add_training_options(parser: Parser, epochs: int, batch_size: int) -> argparse._ArgumentGroup:
    """Length, batch and evaluations of a run that counts in epochs; returns the group."""
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive_int, default=epochs)
    group.add_argument("-b", "--batch-size", type=positive_int, default=batch_size, metavar="N", help="per process")
    group.add_argument("--validation-batch-size", type=positive_int, metavar="N", help="per process; decides nothing")
    group.add_argument("--grad-accum-steps", type=positive_int, default=1, metavar="N")
    group.add_argument("--evals-per-epoch", type=positive_int, default=1, metavar="N")
    return group


def add_kd_options(
    parser: Parser, teacher: str, unit: str = "epochs", controls: Sequence[str] = ("shuffled", "random")
) -> None:
    """The method: the teacher and its early phase.

    Args:
        teacher: what --teacher takes.
        unit: of the window.
        controls: those that a task knows, see w2s.controls.
    """
    group = parser.add_argument_group("distillation (off without --teacher)")
    group.add_argument("--teacher", metavar="RUN_OR_FILE", help=teacher)
    group.add_argument("--teacher-model", metavar="NAME", help="timm architecture of a --teacher file")
    group.add_argument("--teacher-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="its kwargs")
    group.add_argument(
        "--teacher-score", type=float, metavar="X", help="its known held-out metric, if it saw the switch split"
    )
    group.add_argument("--kd-weight", type=not_negative, default=3.0, help="plateau of lambda (default: 3)")
    group.add_argument("--kd-warmup", type=not_negative, help=f"{unit} from 0 to the plateau (default: 5%% of the run)")
    group.add_argument("--kd-hold", type=not_negative, help=f"{unit} on the plateau (default: 55%% of the run)")
    group.add_argument("--kd-decay", type=not_negative, help=f"{unit} back to 0 (default: 20%% of the run)")
    group.add_argument(
        "--kd-temperature", type=float, nargs="+", default=[6.0, 1.0], metavar="T", help="START [END] (%(default)s)"
    )
    group.add_argument("--kd-patience", type=positive_int, default=2, help="evaluations in a row to win (default: 2)")
    group.add_argument(
        "--kd-off", type=_kd_off, default="surpass", metavar="WHEN", help=f"surpass, never, or a number of {unit}"
    )
    group.add_argument(
        "--kd-control",
        choices=controls,
        help="what takes the teacher's place in the term, as a control; see w2s/controls.py",
    )
    group.add_argument(
        "--switch-split",
        default="0.02",
        metavar="F",
        help="share of the training data held out for the switch-off, or a split name for streams (%(default)s)",
    )
    group.add_argument("--switch-seed", type=natural_int, default=0, help="which slice (0); the same in all arms")


def add_optimizer_options(parser: Parser, unit: str = "epochs") -> None:
    """timm's optimiser and schedule options, under timm's names. The schedule runs on updates.

    In epochs --decay-* have timm's defaults; in updates None, for the script to fill in as shares of its run.
    """
    decay, milestones = (30.0, [30.0, 60.0]) if unit == "epochs" else (None, None)
    per = "" if unit == "epochs" else "%% of the run"
    group = parser.add_argument_group("optimiser and schedule (timm)")
    group.add_argument("--opt", default="sgd", metavar="NAME", help="any timm optimiser (default: %(default)s)")
    group.add_argument("--opt-eps", type=float)
    group.add_argument("--opt-betas", type=float, nargs="+")
    group.add_argument("--opt-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V")
    group.add_argument("--momentum", type=float, default=0.9)
    group.add_argument("--weight-decay", type=float, default=2e-5)
    group.add_argument("--layer-decay", type=float)
    group.add_argument("--clip-grad", type=positive, metavar="X", help="gradient clipping (default: none)")
    group.add_argument("--clip-mode", choices=["norm", "value", "agc"], default="norm")
    group.add_argument("--lr", type=float, help="overrides --lr-base")
    group.add_argument("--lr-base", type=float, default=0.1, help="lr = lr-base * global batch / lr-base-size")
    group.add_argument("--lr-base-size", type=positive_int, default=256)
    group.add_argument("--lr-base-scale", choices=["linear", "sqrt"], help="default: sqrt for Adam and LAMB kinds")
    group.add_argument("--sched", default="cosine", help="timm schedule, on updates (default: %(default)s)")
    group.add_argument(f"--warmup-{unit}", type=not_negative, default=0)
    group.add_argument("--warmup-lr", type=float, default=1e-5)
    group.add_argument("--min-lr", type=float, default=0.0)
    group.add_argument(f"--decay-{unit}", type=float, default=decay, help=f"of step schedules (default: 30{per})")
    group.add_argument("--decay-milestones", type=float, nargs="+", default=milestones, help=f"{unit} (30 60{per})")
    group.add_argument("--decay-rate", type=float, default=0.1)


def parse_targets(values: list[str], metric: str, low: float, high: float, option: str = "--target") -> list[float]:
    """`["65", "top1=80"]` as numbers.

    Raises:
        InputError: no number, another metric's name, or outside (low, high].
    """
    targets = []
    for value in values:
        name, _, number = value.rpartition("=")
        if name and name != metric:
            raise InputError(f"{option} {value}: the reported metric of this run is {metric}")
        try:
            targets.append(float(number))
        except ValueError:
            raise InputError(f"{option} {value}: not a number") from None
        if not low < targets[-1] <= high:
            raise InputError(f"{option} {value}: {metric} lies above {low:g} and up to {high:g}")
    return targets


def switch_fraction(text: str) -> float:
    """The share of the training data that `--switch-split` holds out.

    Raises:
        InputError: it is no number.
    """
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--switch-split {text}: a share of the training data, as 0.02") from None


def run_name(args) -> str:
    """The name of a run that was given none: its recipe or its model, and its seed."""
    return f"{Path(args.config).stem if args.config else args.model}-seed{args.seed}"


def check_targets(args, metric: str, low: float, high: float) -> list[float]:
    """The values of --target; --teacher-score is checked beside them.

    Raises:
        InputError: see `parse_targets`.
    """
    if args.teacher_score is not None:
        parse_targets([str(args.teacher_score)], metric, low, high, option="--teacher-score")
    return parse_targets(args.target, metric, low, high)


def positive_int(text: str) -> int:
    """An argparse type: 1, 2, 3, ..."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def natural_int(text: str) -> int:
    """An argparse type: 0, 1, 2, ... below 2^32."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {value}")
    return value


def share(text: str) -> float:
    """An argparse type: a number from 0 up to, but not, 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1), got {text}")
    return value


def probability(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {text}")
    return value


def not_negative(text: str) -> float:
    """An argparse type: a number from 0 up."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def backend(text: str) -> str:
    """An argparse type: a backend of torch.compile."""
    if text not in (known := torch._dynamo.list_backends(None)):
        raise argparse.ArgumentTypeError(f"{text}: torch has {', '.join(known)}")
    return text


def _kd_off(text: str) -> str | float:
    return text if text in ("surpass", "never") else not_negative(text)
