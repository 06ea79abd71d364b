"""--eval-only: which model is evaluated, and with which options."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from w2s.engine.checkpoint import FREE_OPTIONS
from w2s.engine.errors import InputError
from w2s.engine.options import run_name
from w2s.engine.parsing import Parser, announce
from w2s.engine.recipe import read_recipe

# what an evaluation does not take from the run: the options that choose the run and say how this machine reads it, and
# those by which a training starts
NOT_TAKEN = {*FREE_OPTIONS, "cache", "initial_checkpoint", "pretrained", "pretrained_backbone", "teacher", "kd_control"}
# each names data of its own, so that one of them on the command line takes the place of all of the run's
DATA = {"dataset", "data_dir", "data", "train_images", "train_json", "val_images", "val_json"}


def parse_options(parser: Parser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a script.

    With --eval-only they are those of the run that is evaluated, as its args.yaml holds them, under those of the
    command line. --initial-checkpoint then names the model: what the command line gives, or else the run of this name.
    Only where the command line asks for --pretrained weights is there no run.

    Raises:
        InputError: see `Parser.parse_recipe`, or there is nothing to evaluate.
    """
    args = parser.parse_recipe(argv)
    if not args.eval_only:
        return args
    given = parser.given(argv)
    args.teacher = args.kd_control = None
    if "pretrained" in given and "initial_checkpoint" not in given:
        args.initial_checkpoint = None
        return args
    own = Path(args.output) / (args.name or run_name(args))
    model = Path(args.initial_checkpoint) if "initial_checkpoint" in given else own
    if not model.exists():
        raise InputError(
            f"{model} holds no exported model to evaluate: no such folder; name a run with --name or "
            "--initial-checkpoint"
        )
    args.initial_checkpoint = str(model)
    for switch in {"pretrained", "pretrained_backbone"} & set(vars(args)):
        setattr(args, switch, False)
    if folder := _run_of(model):
        taken = set(vars(args)) - NOT_TAKEN - given - (DATA if DATA & given else set())
        of_run = read_recipe(folder / "args.yaml")
        vars(args).update({name: of_run[name] for name in taken if name in of_run})
        announce(f"evaluating {model} with the options in {folder / 'args.yaml'}")
    return args


def _run_of(model: Path) -> Path | None:
    """The run folder that a run folder, a folder of an exported model or a file of one belongs to."""
    nearest = model.parent if model.is_file() else model
    return next((folder for folder in (nearest, nearest.parent) if (folder / "args.yaml").is_file()), None)
