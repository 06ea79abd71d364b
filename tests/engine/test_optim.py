"""timm's optimisers and schedules, built from the options."""

import math
import random

import numpy as np
import pytest
import torch
from helpers import refused
from timm.optim import list_optimizers
from timm.scheduler import (
    CosineLRScheduler,
    MultiStepLRScheduler,
    PolyLRScheduler,
    StepLRScheduler,
    TanhLRScheduler,
)
from torch import nn

from train_cls import build_parser
from w2s.engine.errors import InputError
from w2s.engine.optim import build_ema, build_optimizer, scaled_lr
from w2s.engine.run import Run


def parse(*words: str):
    return build_parser().parse_recipe(list(words))


@pytest.mark.parametrize(
    ("words", "samples", "expected"),
    [
        ("--lr 0.3", 1024, 0.3),
        ("--lr 0.3 --lr-base 7", 64, 0.3),
        ("--opt sgd", 256, 0.1),
        ("--opt sgd", 1024, 0.4),
        ("--opt sgd --lr-base 0.05 --lr-base-size 512", 128, 0.0125),
        ("--opt adamw --lr-base 0.001", 1024, 0.002),
        ("--opt AdamW --lr-base 0.001", 64, 0.0005),
        ("--opt lamb --lr-base 0.005", 4096, 0.02),
        ("--opt adafactor --lr-base 0.001", 1024, 0.002),
        ("--opt sgd --lr-base-scale sqrt", 1024, 0.2),
        ("--opt adamw --lr-base 0.001 --lr-base-scale linear", 1024, 0.004),
    ],
)
def test_the_learning_rate_scales_with_the_global_batch_as_in_timm(words, samples, expected):
    """lr_base x ratio, with the ratio's square root for names with "ada" or "lamb", as in timm's train.py."""
    assert scaled_lr(parse(*words.split()), samples) == pytest.approx(expected, rel=1e-12)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))


def built(words: str, epochs: int = 10, updates_per_epoch: int = 8, model: nn.Module | None = None, fused: bool = True):
    args, lengths = parse(*words.split()), {"length": epochs, "updates_per_unit": updates_per_epoch}
    return build_optimizer(args, model or tiny(), lr=args.lr or 0.1, fused=fused, **lengths)


def rates(words: str, updates: int = 80) -> list[float]:
    """The learning rate of each update, as the training loop sets it."""
    optimizer, scheduler = built(words)
    values = []
    for update in range(updates):
        scheduler.step_update(update)
        values.append(optimizer.param_groups[0]["lr"])
    return values


def test_cosine_falls_from_the_rate_to_the_minimum_along_half_a_wave():
    expected = [0.01 + 0.5 * 0.39 * (1 + math.cos(math.pi * update / 80)) for update in range(80)]
    assert rates("--lr 0.4 --min-lr 0.01") == pytest.approx(expected, rel=1e-12)


def test_warm_up_rises_in_a_line_and_joins_the_cosine():
    values = rates("--lr 0.4 --warmup-epochs 2 --warmup-lr 0.08")
    assert values[:16] == pytest.approx([0.08 + 0.32 * update / 16 for update in range(16)], rel=1e-12)
    assert values[16:] == pytest.approx([0.2 * (1 + math.cos(math.pi * u / 80)) for u in range(16, 80)], rel=1e-12)


def test_a_warm_up_of_half_an_epoch_is_counted_in_updates():
    values = rates("--lr 0.4 --warmup-epochs 0.5 --warmup-lr 0")
    assert values[:5] == pytest.approx([0, 0.1, 0.2, 0.3, 0.2 * (1 + math.cos(math.pi * 4 / 80))])


def test_step_falls_every_so_many_epochs_and_constant_never():
    stairs = [0.4 * 0.1 ** (update // 24) for update in range(80)]
    assert rates("--lr 0.4 --sched step --decay-epochs 3") == pytest.approx(stairs)
    assert rates("--lr 0.4 --sched constant") == [0.4] * 80


def test_multistep_falls_at_its_milestones():
    """timm counts to the update after: it falls one update before the epoch's end."""
    stairs = [0.4] * 15 + [0.2] * 24 + [0.1] * 41
    assert rates("--lr 0.4 --sched multistep --decay-milestones 2 5 --decay-rate 0.5") == pytest.approx(stairs)


@pytest.mark.parametrize(
    ("sched", "scheduler", "own"),
    [
        ("cosine", CosineLRScheduler, {"t_initial": 80, "lr_min": 0.01}),
        ("tanh", TanhLRScheduler, {"t_initial": 80, "lr_min": 0.01}),
        ("poly", PolyLRScheduler, {"t_initial": 80, "lr_min": 0.01, "power": 0.5}),
        ("step", StepLRScheduler, {"decay_t": 24, "decay_rate": 0.5}),
        ("multistep", MultiStepLRScheduler, {"decay_t": [16, 40], "decay_rate": 0.5}),
        ("constant", StepLRScheduler, {"decay_t": 24, "decay_rate": 1.0}),
    ],
)
def test_every_update_has_the_rate_of_timms_scheduler(sched, scheduler, own):
    optimizer = torch.optim.SGD(tiny().parameters(), 0.4)
    warm_up = {"warmup_t": 12, "warmup_lr_init": 0.02, "warmup_prefix": False}
    timms = scheduler(optimizer, **own, **warm_up, t_in_epochs=False)
    expected = []
    for update in range(80):
        timms.step_update(update)
        expected.append(optimizer.param_groups[0]["lr"])
    words = "--lr 0.4 --min-lr 0.01 --warmup-epochs 1.5 --warmup-lr 0.02 --decay-epochs 3 --decay-milestones 2 5"
    assert rates(f"{words} --decay-rate 0.5 --sched {sched}") == expected


def test_the_rate_is_a_function_of_the_update_so_that_a_resume_needs_no_state():
    optimizer, scheduler = built("--lr 0.4 --warmup-epochs 2")
    scheduler.step_update(37)
    assert optimizer.param_groups[0]["lr"] == rates("--lr 0.4 --warmup-epochs 2")[37]


def test_layer_decay_scales_the_rates_of_early_layers():
    from w2s.images.models import create_model

    model = create_model("resnet10t", 10, model_kwargs={"channels": (8, 8, 16, 16), "stem_width": 8})
    optimizer, scheduler = built("--lr 0.4 --sched constant --layer-decay 0.5", model=model)
    scheduler.step_update(0)
    values = sorted({group["lr"] for group in optimizer.param_groups})
    assert values[-1] == pytest.approx(0.4) and values[0] < 0.1


@pytest.mark.parametrize("sched", ["plateau", "none", "sawtooth"])
def test_a_schedule_that_is_no_function_of_the_update_is_refused(sched):
    with refused("--sched", sched):
        built(f"--sched {sched}")


@pytest.mark.parametrize(
    "words", ["--warmup-epochs 11", "--sched wsd --decay-epochs 30", "--sched step --decay-epochs 0"]
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(words):
    with refused("epochs"):
        rates(words)


def test_milestones_that_go_back_are_refused():
    with refused("--decay-milestones 5.0 3.0"):
        rates("--sched multistep --decay-milestones 5 3")


@pytest.mark.parametrize(("words", "told"), [("step", True), ("multistep", True), ("cosine", False)])
def test_a_step_that_never_comes_is_told(words, told, capsys):
    rates(f"--sched {words}")
    assert ("first lowers the rate at 30 epochs" in capsys.readouterr().err) == told


# --- optimisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opt", ["sgd", "momentum", "adamw", "lamb", "muon", "adafactor", "lion"])
def test_an_optimiser_takes_a_step_that_lowers_the_loss(opt):
    model = tiny()
    optimizer, scheduler = built(f"--opt {opt} --lr 1e-3 --sched constant", model=model)
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 2
    losses = []
    for update in range(5):
        scheduler.step_update(update)
        loss = nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_options_reach_the_optimiser():
    words = "--opt adamw --opt-betas 0.8 0.9 --opt-eps 1e-6 --weight-decay 0.3 --opt-kwargs amsgrad=True"
    optimizer, _ = built(words)
    decayed = [group for group in optimizer.param_groups if group["weight_decay"]]
    assert {group["weight_decay"] for group in decayed} == {0.3}
    assert (tuple(decayed[0]["betas"]), decayed[0]["eps"], decayed[0]["amsgrad"]) == ((0.8, 0.9), 1e-6, True)
    assert built("--opt sgd --momentum 0.7")[0].param_groups[0]["momentum"] == 0.7


def test_biases_and_norms_are_not_decayed():
    optimizer, _ = built("--opt adamw --weight-decay 0.3")
    plain = [p for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]]
    assert len(plain) == 4 and all(p.ndim == 1 for p in plain)


def after_steps(opt: str, rank: int, alike: bool) -> tuple[list[torch.Tensor], bool]:
    """The weights after some updates on a process, and whether a step drew from a global generator.

    All processes see the same gradients; `alike` seeds each step as a run does.
    """
    model = tiny()
    optimizer, _ = built(f"--opt {opt} --lr 1e-3", model=model)
    run, drew = Run.__new__(Run), False
    run.seed = 0
    for update in range(4):
        torch.manual_seed(100 * update + rank), random.seed(100 * update + rank), np.random.seed(100 * update + rank)
        for k, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(10 * update + k)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if alike:
            run.seed_step(update)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        optimizer.step()
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        drew = drew or not torch.equal(before[0], after[0]) or before[1:] != after[1:]
    return list(model.parameters()), drew


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def test_no_optimiser_of_timm_drifts_apart_between_processes():
    """Those that draw random numbers would, from the generators of the processes, which differ."""
    torch.compiler.set_stance("force_eager")  # kron compiles itself, which takes minutes
    drawing, drifting = set(), set()
    for opt in list_optimizers(exclude_filters=["bnb*", "apex*", "fused*"]):
        try:
            weights, drew = after_steps(opt, rank=0, alike=True)
        except (InputError, AttributeError, ImportError, RuntimeError):  # second-order, or closures
            continue
        others, _ = after_steps(opt, rank=1, alike=True)
        assert equal(weights, others), opt
        drawing |= {opt} if drew else set()
        if not equal(after_steps(opt, rank=0, alike=False)[0], after_steps(opt, rank=1, alike=False)[0]):
            drifting.add(opt)
    torch.compiler.set_stance("default")
    assert drawing == drifting == {opt for opt in list_optimizers() if opt.startswith("kron")}


def test_a_gradient_scaler_gets_no_fused_optimiser():
    assert built("--opt momentum")[0].defaults["fused"] and built("--opt adamw")[0].defaults["fused"]
    for opt in ("momentum", "adamw"):
        optimizer, _ = built(f"--opt {opt}", fused=False)
        assert not optimizer.defaults["fused"]
        assert not getattr(optimizer, "_step_supports_amp_scaling", False)


def test_a_first_step_that_overflows_leaves_no_trace():
    """torch's fused SGD would take uninitialised memory for its momentum."""

    def trained(overflow: bool) -> list[torch.Tensor]:
        model, scaler = tiny(), torch.amp.GradScaler("cpu", init_scale=1.0)
        optimizer, _ = built("--opt momentum --lr 0.1", model=model, fused=False)
        for update in range(0 if overflow else 1, 3):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, math.inf if update == 0 else 1.0)
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer)
            scaler.update(1.0)
        return list(model.parameters())

    assert equal(trained(overflow=True), trained(overflow=False))


@pytest.mark.parametrize(
    "words", ["--opt sdg", "--opt sgd --opt-kwargs nonsense=1", "--opt adamw --opt-betas 0.9 1.5", "--opt sgd --lr -1"]
)
def test_an_optimiser_that_cannot_be_built_is_refused(words):
    with refused("--opt", words.split()[1]):
        built(words)


def test_the_refusal_names_the_arguments_of_the_optimiser():
    with refused("--opt adamw, --opt-eps 1e-08, --opt-betas [0.9]: "):
        built("--opt adamw --opt-eps 1e-8 --opt-betas 0.9")


@pytest.mark.parametrize(
    ("words", "count"),
    [("lion --opt-betas 0.9 0.9 0.9", "2"), ("adamw --opt-betas 1", "2"), ("sgd --opt-betas 1", "no")],
)
def test_betas_of_another_number_are_refused(words, count):
    with refused(f"--opt {words.split()[0]}", f"it takes {count} betas"):
        built(f"--opt {words}")


def test_the_moving_average_is_timms_and_only_where_asked_for():
    assert build_ema(parse(), tiny()) is None
    ema = build_ema(parse("--model-ema", "--model-ema-decay", "0.9", "--model-ema-warmup"), tiny())
    assert (ema.decay, ema.use_warmup) == (0.9, True)
