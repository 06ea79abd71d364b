"""From a student to a `Job`: its moving average, compilation, precision and processes."""

from collections.abc import Callable
from pathlib import Path

import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn

from w2s.distillation import Distillation
from w2s.engine.optim import build_ema
from w2s.engine.plan import Plan
from w2s.engine.run import Run
from w2s.engine.sharding import exporting_whole, shard
from w2s.engine.training import Job


def prepare_job(
    args,
    run: Run,
    plan: Plan,
    kd: Distillation,
    *,
    student: nn.Module,
    compiled: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler,
    flops: dict[str, int],
    export: Callable[[nn.Module, Path], None],
    terms: tuple[str, ...] = (),
    trained: nn.Module | None = None,
) -> Job:
    """The student ready for its first update. The teacher is compiled beside it and never prepared by Accelerate.

    Args:
        args: resolved options; this reads --model-ema* and --torchcompile, and `Job` its own.
        student: on its device, in its memory format.
        compiled: the part of the student that --torchcompile compiles.
        trained: the student with what is trained beside it; None for the student alone.
        export: writes a model into a folder.
        run, plan, kd, optimizer, scheduler, flops, terms: see `Job`.
    """
    ema, accelerator = build_ema(args, student), run.accelerator
    if args.torchcompile:
        compiled.compile(backend=args.torchcompile)
        kd.compile(args.torchcompile)
    if run.shards:
        export = exporting_whole(export, student, run.is_main)
        model, optimizer = shard(accelerator, student, ema and ema.module, optimizer)
        run.stopping.keep_in_step(ema.module if ema else student)
    else:
        model, optimizer = accelerator.prepare(trained or student, optimizer)
    return Job(
        args,
        run,
        plan,
        kd,
        student=student,
        model=model,
        ema=ema,
        optimizer=optimizer,
        scheduler=scheduler,
        flops=flops,
        export=export if run.shards or run.is_main else lambda model, folder: None,
        terms=terms,
    )
