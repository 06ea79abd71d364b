"""timm's optimisers and schedules from the shared options; the learning rate is a function of the update."""

import inspect

import torch
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from w2s.engine.errors import InputError, on_one_line
from w2s.engine.parsing import announce


def scaled_lr(args, samples: int) -> float:
    """--lr, or timm's rule: --lr-base at a global batch of --lr-base-size, scaled to `samples` an update."""
    if args.lr is not None:
        return args.lr
    ratio = samples / args.lr_base_size
    adaptive = any(kind in args.opt.lower() for kind in ("ada", "lamb"))
    scale = args.lr_base_scale or ("sqrt" if adaptive else "linear")
    return args.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def build_optimizer(
    args,
    model: nn.Module,
    *,
    lr: float,
    length: float,
    updates_per_unit: int,
    unit: str = "epochs",
    warmup: float | None = None,
    warmup_lr: float | None = None,
    fused: bool = True,
) -> tuple[torch.optim.Optimizer, Scheduler]:
    """The optimiser and its schedule, both timm's. Do not `prepare` the schedule: call `step_update(update)`.

    Args:
        args: resolved options; this reads those of the group "optimiser and schedule".
        model: the student.
        lr: the peak learning rate.
        length: of the run, in `unit`.
        updates_per_unit: updates of an epoch, or 1 where `unit` is "updates".
        warmup, warmup_lr: in place of --warmup-* and --warmup-lr.
        fused: whether it may be one kernel for all tensors, see `Run.fuses`.

    Raises:
        InputError: unknown names, arguments they do not take, or a schedule that needs a metric.
    """
    if args.sched in ("plateau", "none"):
        raise InputError(f"--sched {args.sched}: the learning rate must be a function of the update; try constant")
    warmup = getattr(args, f"warmup_{unit}") if warmup is None else warmup
    decay = getattr(args, f"decay_{unit}")
    if warmup > length:
        raise InputError(f"--warmup-{unit} {warmup:g} is longer than the run of {length:g} {unit}")
    if args.sched == "multistep" and sorted(args.decay_milestones) != args.decay_milestones:
        raise InputError(f"--decay-milestones {' '.join(map(str, args.decay_milestones))}: the first one comes first")
    step = {"step": decay, "multistep": args.decay_milestones[0]}.get(args.sched, 0)
    if step >= length:
        announce(f"warning: --sched {args.sched} first lowers the rate at {step:g} {unit}, and the run has {length:g}")
    optimizer = _create_optimizer(args, model, lr, fused)
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=args.sched,
            num_epochs=length,
            decay_epochs=decay,
            decay_milestones=args.decay_milestones,
            decay_rate=args.decay_rate,
            warmup_epochs=warmup,
            warmup_lr=args.warmup_lr if warmup_lr is None else warmup_lr,
            min_lr=args.min_lr,
            step_on_epochs=False,
            updates_per_epoch=updates_per_unit,
        )
    except Exception as error:
        raise InputError(f"--sched {args.sched}: {on_one_line(error)}") from None
    return optimizer, scheduler


def _create_optimizer(args, model: nn.Module, lr: float, fused: bool) -> torch.optim.Optimizer:
    """timm's optimiser of the name --opt, if `fused` one kernel for all tensors where torch has that.

    Under a gradient scaler, torch's fused SGD takes uninitialised memory for its momentum where the first step
    overflows, and a skipped step of any fused optimiser looks like one that was made.
    """
    options = {"eps": args.opt_eps, "betas": args.opt_betas, "layer_decay": args.layer_decay}
    try:
        parameters = inspect.signature(get_optimizer_class(args.opt.removeprefix("lookahead_"))).parameters
        betas = getattr(parameters.get("betas"), "default", ())
        if args.opt_betas and isinstance(betas, tuple) and len(args.opt_betas) != len(betas):
            raise ValueError(f"it takes {len(betas) or 'no'} betas")
        options = {**options, "fused": True if fused and "fused" in parameters else None, **args.opt_kwargs}
        optimizer = create_optimizer_v2(
            model,
            opt=args.opt,
            lr=lr,
            weight_decay=args.weight_decay,
            momentum=args.momentum,
            **{k: v for k, v in options.items() if v is not None},
        )
    except Exception as error:  # every optimiser checks its arguments in its own way
        given = {"--opt-eps": args.opt_eps, "--opt-betas": args.opt_betas, "--opt-kwargs": args.opt_kwargs or None}
        words = ", ".join([args.opt, *(f"{flag} {value}" for flag, value in given.items() if value is not None)])
        raise InputError(f"--opt {words}: {on_one_line(error)}") from None
    if getattr(optimizer, "is_second_order", False):
        raise InputError(f"--opt {args.opt}: second-order optimisers are not supported")
    return optimizer


def clipped_parameters(student: nn.Module, trained: nn.Module, *, mode: str) -> list[nn.Parameter]:
    """What --clip-grad clips: the student and what is trained beside it, for AGC without the student's classifier.

    Args:
        student: the bare module.
        trained: the same, perhaps with branches.
        mode: --clip-mode.
    """
    own = {id(parameter) for parameter in student.parameters()}
    beside = [parameter for parameter in trained.parameters() if id(parameter) not in own]
    return [*model_parameters(student, exclude_head="agc" in mode), *beside]


def build_ema(args, student: nn.Module) -> ModelEmaV3 | None:
    """The moving average of the student's weights, None without --model-ema."""
    return LocalEma(student, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None


class LocalEma(ModelEmaV3):
    """timm's moving average, of the parts of the weights that this process has where they are sharded."""

    def _foreach_lerp_(self, ema_values: list[Tensor], model_values: list[Tensor], weight: float) -> None:
        parts = [
            [value.to_local() if isinstance(value, DTensor) else value for value in values]
            for values in (ema_values, model_values)
        ]
        super()._foreach_lerp_(*parts, weight)
