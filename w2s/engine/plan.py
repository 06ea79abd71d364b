"""How a run is cut into updates, and what an update costs."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from w2s.engine.errors import InputError
from w2s.engine.run import Run


@dataclass(frozen=True)
class Plan:
    """How a run is cut into updates.

    Attributes:
        batch: examples of one update, over all processes and micro-batches.
        updates_per_epoch: whole batches in one pass over the training data.
        total: updates of the whole run.
        unit: what u counts, "epoch" or "update".
    """

    batch: int
    updates_per_epoch: int
    total: int
    unit: str = "epoch"


def plan_updates(args, run: Run, samples: int, *, epochs: int | None = None, updates: int | None = None) -> Plan:
    """The updates of a run over `samples` training examples, whose length is given in epochs or in updates.

    Raises:
        InputError: fewer examples than one update takes.
    """
    batch = args.batch_size * args.grad_accum_steps * run.accelerator.num_processes
    updates_per_epoch = samples // batch
    if updates_per_epoch == 0:
        raise InputError(f"{samples} training images are fewer than one update of {batch}: lower --batch-size")
    total = updates if epochs is None else epochs * updates_per_epoch
    if args.dry_run:
        total = min(3, total if epochs is None else updates_per_epoch)
    return Plan(batch, updates_per_epoch=updates_per_epoch, total=total, unit="update" if epochs is None else "epoch")


def grid_point(update: int, updates_per_epoch: int, evals_per_epoch: float) -> int:
    """The first update after `update` at which an evaluation is due: evenly spread over an epoch, or epochs apart."""
    if evals_per_epoch < 1:
        apart = round(1 / evals_per_epoch) * updates_per_epoch
        return (update // apart + 1) * apart
    epoch, within = divmod(update, updates_per_epoch)
    grid = (round(k * updates_per_epoch / evals_per_epoch) for k in range(1, evals_per_epoch + 1))
    return epoch * updates_per_epoch + next(point for point in grid if point > within)


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """The widest float type of a device, for sums over many values."""
    return torch.float32 if device.type == "mps" else torch.float64


def count_flops(step: Callable[[], object]) -> int:
    """Floating-point operations of a call (torch.utils.flop_counter: matrix products, convolutions, attention)."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def compilations() -> int:
    """How many graphs torch.compile has compiled in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # imported by the first compilation
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0
