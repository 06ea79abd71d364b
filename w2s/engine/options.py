"""The options that the training scripts share, group by group, and what follows from them."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from w2s.engine.errors import InputError
from w2s.engine.parsing import (
    KeyValues,
    Parser,
    Teachers,
    add_switch,
    backend,
    finite,
    natural_int,
    not_empty,
    not_negative,
    positive,
    positive_int,
    rate_of_evaluations,
    share,
)
from w2s.engine.trackers import TRACKERS


def add_run_options(parser: Parser) -> None:
    """Where a run lives, how it starts, resumes and is watched."""
    group = parser.add_argument_group("run")
    group.add_argument("--output", metavar="DIR", default="output", help="folder of all runs")
    group.add_argument("--name", help="folder of this run in --output (default: recipe or model, and the seed)")
    group.add_argument("--seed", type=natural_int, default=0, metavar="N", help="of weights, data order, augmentation")
    group.add_argument(
        "--target", nargs="+", default=[], metavar="TAU", help="metric values to time, fixed before the run: 65 80"
    )
    group.add_argument(
        "--resume", type=not_empty, metavar="auto|PATH", help="auto: go on from the newest complete checkpoint, if any"
    )
    add_switch(group, "--dry-run", "a few updates and one evaluation; nothing is kept")
    add_switch(group, "--eval-only", "evaluate the run's model or --initial-checkpoint, and exit")
    group.add_argument("--checkpoint-hist", type=positive_int, default=2, metavar="N", help="checkpoints kept")
    group.add_argument(
        "--recovery-interval",
        type=natural_int,
        default=0,
        metavar="N",
        help="save every N updates, too; 0: only after evaluations",
    )
    group.add_argument(
        "--ddp-timeout", type=positive_int, default=3600, metavar="SECONDS", help="of one process waiting for another"
    )
    group.add_argument("--log-interval", type=positive_int, default=50, metavar="N", help="updates between log lines")
    group.add_argument(
        "--log-with",
        nargs="+",
        choices=[*TRACKERS, "all"],
        metavar="NAME",
        help=f"trackers: {', '.join(TRACKERS)}; all",
    )
    group.add_argument("--push-to-hub", metavar="NAME", help="share the finished run there, with a model card")
    group.add_argument("--project", metavar="NAME", default="w2s", help="tracker project")
    group.add_argument("--group", metavar="NAME", help="W&B group, one for all arms (default: task, data and model)")


def add_data_options(parser: Parser, kinds: str, folder: str) -> argparse._ArgumentGroup:
    """Images to classify or to generate, of some `kinds` of --dataset, or in a `folder`; returns the group."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", metavar="NAME", default="", help=f"{kinds} (default: a folder)")
    group.add_argument("--data-dir", metavar="DIR", help=f"{folder}, or root of the dataset")
    group.add_argument("--train-split", default="train", metavar="NAME", help="images to train on")
    group.add_argument("--input-key", metavar="KEY", help="column of the image (default: image)")
    group.add_argument("--target-key", metavar="KEY", help="column of the label (default: label)")
    group.add_argument("--train-samples", type=positive_int, metavar="N", help="a seeded, class-balanced subset")
    group.add_argument(
        "--check-images", type=int, default=20000, metavar="N", help="decode N a split first, spread evenly; -1: all"
    )
    group.add_argument(
        "--cache",
        choices=["auto", "device", "cpu", "none"],
        default="auto",
        help="decode once, keep the pixels there and augment them there (default: auto, on the device if that works)",
    )
    add_worker_option(group)
    return group


def add_worker_option(group: argparse._ArgumentGroup) -> None:
    """How many processes load images."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    group.add_argument(
        "-j",
        "--workers",
        type=natural_int,
        default=min(4, cores),
        metavar="N",
        help="loader workers a process (default: 4, or the cores that there are if they are fewer)",
    )


def add_weights_options(
    group: argparse._ArgumentGroup,
    *,
    compiled: str = "the student",
    sync_bn: bool = True,
    ema: bool = False,
    ema_decay: float = 0.9998,
    channels_last: bool = True,
) -> None:
    """How the student's weights are averaged, laid out in memory and compiled.

    Args:
        compiled: the part that --torchcompile compiles.
        sync_bn: whether the task's models have BatchNorm.
        ema: whether the moving average and its warm-up are on by default.
        ema_decay: the default decay.
        channels_last: whether NHWC is the default.
    """
    add_switch(group, "--model-ema", "evaluate, compare and export the moving average of the weights", default=ema)
    group.add_argument("--model-ema-decay", type=share, default=ema_decay, metavar="D", help="of the moving average")
    add_switch(
        group,
        "--model-ema-warmup",
        "a decay of at most 1 - n^(-2/3) after n updates: 0.99 from 1,000 updates on, 0.999 from 31,600",
        default=ema,
    )
    add_switch(group, "--channels-last", "NHWC memory format", default=channels_last)
    if sync_bn:
        add_switch(group, "--sync-bn", "BatchNorm over all GPUs")
    group.add_argument(
        "--torchcompile",
        type=backend,
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help=f"compile {compiled}, with inductor if no backend is named",
    )


def add_training_options(parser: Parser, epochs: int, batch_size: int) -> argparse._ArgumentGroup:
    """Length, batch and evaluations of a run that counts in epochs; returns the group."""
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive_int, default=epochs, metavar="N", help="length of the run")
    add_batch_options(group, batch_size)
    group.add_argument(
        "--validation-batch-size",
        type=positive_int,
        metavar="N",
        help="per process; changes no result (default: --batch-size)",
    )
    group.add_argument(
        "--evals-per-epoch",
        type=rate_of_evaluations,
        default=1,
        metavar="N",
        help="evaluations, evenly spread; 0.5 for every second epoch",
    )
    return group


def add_batch_options(group: argparse._ArgumentGroup, batch_size: int) -> None:
    """How many examples an update sees."""
    group.add_argument(
        "-b", "--batch-size", type=positive_int, default=batch_size, metavar="N", help="per process and micro-batch"
    )
    group.add_argument(
        "--grad-accum-steps", type=positive_int, default=1, metavar="N", help="micro-batches in an update"
    )


def add_kd_options(
    parser: Parser,
    teacher: str,
    unit: str = "epochs",
    controls: Sequence[str] = ("shuffled", "random"),
    balance: bool = False,
) -> None:
    """The method: the teacher and its early phase.

    Args:
        teacher: what --teacher takes.
        unit: of the window.
        controls: those that a task knows, see w2s.controls.
        balance: whether lambda is a ratio of gradients by default.
    """
    group = parser.add_group_needing("teacher", "distillation (off without --teacher)")
    taken = f"{teacher}; of several, each hands over to the next once it is passed or its window has ended"
    group.add_argument("--teacher", nargs="+", type=not_empty, action=Teachers, metavar="RUN_OR_FILE", help=taken)
    group.add_argument("--teacher-model", metavar="NAME", help="of a --teacher file: a timm NAME or torchvision/NAME")
    group.add_argument("--teacher-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="its kwargs")
    group.add_argument("--teacher-classes", metavar="FILE", help="says which of its classes are those of the data")
    group.add_argument(
        "--teacher-score", type=float, metavar="X", help="its known held-out metric, if it saw the switch split"
    )
    group.add_argument("--kd-weight", type=not_negative, default=3.0, metavar="X", help="plateau of lambda")
    for part, what, default in (
        ("warmup", "from 0 to the plateau", "5"),
        ("hold", "on the plateau", "55"),
        ("decay", "back to 0", "20"),
    ):
        group.add_argument(
            f"--kd-{part}", type=not_negative, metavar="X", help=f"{unit} {what} (default: {default}%% of the run)"
        )
    group.add_argument("--kd-temperature", type=float, nargs="+", default=[6.0, 1.0], metavar="T", help="START [END]")
    group.add_argument("--kd-patience", type=positive_int, default=2, metavar="N", help="evaluations in a row to win")
    group.add_argument(
        "--kd-off",
        type=_kd_off,
        default="surpass",
        metavar="WHEN",
        help=f"surpass, running (no split needed), never (of several teachers: the last one), or a number of {unit}",
    )
    add_switch(group, "--kd-fade", "let lambda follow what is left of the teacher's lead (default: on)", default=True)
    about = "lambda is the ratio of both gradients, whose size stays the task's"
    add_switch(group, "--kd-balance", f"{about} (default: {'on' if balance else 'off'})", default=balance)
    group.add_argument(
        "--kd-control",
        choices=controls,
        help="what takes the teacher's place in the term, as a control; see w2s/controls.py",
    )
    group = parser.add_argument_group("switch split, the same in all arms")
    group.add_argument(
        "--switch-split",
        default="0.02",
        metavar="F",
        help="share of the training data held out for the switch-off, or a split name for streams",
    )
    group.add_argument("--switch-seed", type=natural_int, default=0, metavar="N", help="which slice that is")


def add_optimizer_options(parser: Parser, unit: str = "epochs") -> None:
    """timm's optimiser and schedule options, under timm's names. The schedule runs on updates.

    In epochs --decay-* suit a run of 100; in updates they are None, for the script to fill in as shares of its run.
    """
    decay, milestones = (30.0, [30.0, 60.0]) if unit == "epochs" else (None, None)
    shares = ("", "") if unit == "epochs" else (" (default: 30%% of the run)", " (default: 30%% and 60%% of the run)")
    group = parser.add_argument_group("optimiser and schedule (timm)")
    group.add_argument("--opt", default="sgd", metavar="NAME", help="any timm optimiser")
    group.add_argument("--opt-eps", type=not_negative, metavar="X", help="its epsilon (default: its own)")
    group.add_argument("--opt-betas", type=finite, nargs="+", metavar="X", help="its betas (default: its own)")
    group.add_argument("--opt-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="its other kwargs")
    group.add_argument("--momentum", type=share, default=0.9, metavar="X", help="of optimisers that have one")
    group.add_argument("--weight-decay", type=not_negative, default=2e-5, metavar="X", help="of the weights")
    group.add_argument("--layer-decay", type=positive, metavar="X", help="factor of the rate from layer to layer down")
    group.add_argument("--clip-grad", type=positive, metavar="X", help="gradient clipping (default: none)")
    group.add_argument("--clip-mode", choices=["norm", "value", "agc"], default="norm", help="what --clip-grad bounds")
    group.add_argument("--lr", type=finite, metavar="X", help="learning rate")
    group.add_argument(
        "--lr-base", type=finite, default=0.1, metavar="X", help="lr = lr-base * global batch / lr-base-size"
    )
    group.add_argument("--lr-base-size", type=positive_int, default=256, metavar="N", help="batch of --lr-base")
    group.add_argument(
        "--lr-base-scale",
        choices=["linear", "sqrt"],
        help="how lr grows with the batch (default: sqrt for Adam and LAMB kinds, else linear)",
    )
    group.add_argument("--sched", default="cosine", metavar="NAME", help="timm schedule, stepped on updates")
    group.add_argument(f"--warmup-{unit}", type=not_negative, default=0, metavar="X", help="linear warm-up of the rate")
    group.add_argument("--warmup-lr", type=not_negative, default=1e-5, metavar="X", help="where the warm-up begins")
    group.add_argument("--min-lr", type=not_negative, default=0.0, metavar="X", help="where the schedule ends")
    group.add_argument(
        f"--decay-{unit}", type=positive, default=decay, metavar="X", help=f"between steps of --sched step{shares[0]}"
    )
    group.add_argument(
        "--decay-milestones",
        type=not_negative,
        nargs="+",
        default=milestones,
        metavar="X",
        help=f"{unit} of the steps of --sched multistep{shares[1]}",
    )
    group.add_argument("--decay-rate", type=not_negative, default=0.1, metavar="X", help="factor of the rate at a step")


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


def _kd_off(text: str) -> str | float:
    if text in ("surpass", "running", "never"):
        return text
    try:
        return not_negative(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"takes surpass, running, never or a number of 0 or more, got {text}"
        ) from None
