"""train_diffusion.py from its command line to what it leaves: real runs of tiny denoisers on the 8 px digits."""

import contextlib
import hashlib
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from helpers import (
    call_script,
    checkpoint_tensors,
    read_rows,
    read_summary,
    signal_in_evaluation,
    start_script,
    timeless,
    under_a_scaler,
    watching_forwards,
)
from huggingface_hub import ModelCard
from PIL import Image

import train_diffusion
from w2s.compare import __main__ as compare
from w2s.diffusion.denoisers import UNet, ViT
from w2s.diffusion.exports import export_denoiser, load_denoiser
from w2s.diffusion.frechet import feature_statistics
from w2s.engine.errors import InputError, NonFiniteLoss, Preempted
from w2s.engine.optim import build_optimizer
from w2s.engine.sharing import share_folder

# 4 updates an epoch
SMALL = (
    "--dataset digits --train-samples 64 --batch-size 16 --workers 0 --updates 8 --eval-interval 2 --fd-samples 12 "
    "--sample-steps 2 --validation-batch-size 8 --opt adamw --lr 3e-3"
)
UNET = "--model nc8-rb1 --model-kwargs channel_mult=(1,2) attention=(4,)"
VIT = "--model vit_tiny_patch16_224 --model-kwargs patch_size=4 embed_dim=16 depth=1 num_heads=2"
PHASE = "--kd-weight 2 --kd-warmup 2 --kd-hold 2 --kd-decay 2 --no-kd-fade"
LABEL = "fd12_digits-resnet10t"
# Computed by other kernels or in another order, predictions differ in their last bits, and so a few of the 768 pixels
# of 12 samples are rounded to the uint8 value beside theirs: that moves a distance by some 1e-4 of itself, never 1 %.
PIXEL_ROUNDING = 1e-2


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_teacher):
    """A run in this process: run(output, name, options...) returns its folder."""
    cache = tmp_path_factory.mktemp("cache")

    def start(output: Path, name: str, *parts: object) -> Path:
        options = [*parts, "--fd-features", tiny_teacher, "--fd-cache", cache, "--output", output, "--name", name]
        call_script(train_diffusion.main, SMALL, UNET, *options)
        return output / name

    return start


class Forward(NamedTuple):
    """One forward of a denoiser."""

    params: int  # of the denoiser
    training: bool
    digest: str  # of x_t and t


@contextlib.contextmanager
def recorded_forwards(before_training_forward: Callable[[int], None] = lambda count: None) -> Iterator[list[Forward]]:
    """Record all forwards of denoisers in the block.

    `before_training_forward` is called with the number of training forwards so far.
    """
    forwards, count = [], 0

    def see(module: torch.nn.Module, inputs: tuple) -> None:
        nonlocal count
        if not isinstance(module, UNet | ViT) or inputs[0].device.type == "meta":  # where FLOPs are counted
            return
        if module.training:
            before_training_forward(count)
            count += 1
        digest = hashlib.sha256(inputs[0].contiguous().numpy().tobytes() + inputs[1].numpy().tobytes()).hexdigest()
        forwards.append(Forward(sum(p.numel() for p in module.parameters()), module.training, digest))

    with watching_forwards(see):
        yield forwards


def weights(folder: Path, part: str = "model") -> bytes:
    return (folder / part / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


# ---- a baseline ----


@pytest.fixture(scope="module")
def baseline(run, tmp_path_factory) -> tuple[Path, list[Forward]]:
    with recorded_forwards() as forwards:
        folder = run(tmp_path_factory.mktemp("baseline"), "baseline", "--target 1e9 1e-9")
    return folder, forwards


def test_baseline_leaves_metrics_and_summary(baseline):
    rows, summary = read_rows(baseline[0]), read_summary(baseline[0])
    assert [int(row["update"]) for row in rows] == [2, 4, 6, 8]
    assert [float(row["epoch"]) for row in rows] == [0.5, 1, 1.5, 2]
    assert list(rows[0])[-3:] == [LABEL, "mmd12_digits-resnet10t", f"switch_{LABEL}"]
    assert (summary["task"], summary["metric"], summary["mode"]) == ("diffusion", LABEL, "min")
    assert summary["best"] == min(float(row[LABEL]) for row in rows)
    assert summary["targets"]["1000000000"]["first"]["update"] == 2
    assert summary["targets"]["1e-09"]["first"] is None
    assert summary["features"]["samples"] == 12 and len(summary["features"]["digest"]) == 12
    assert summary["data"] == {"train": 64, "switch": 0, "report": 64}
    flops = summary["flops"]["student_update"]
    assert [float(row["pflops"]) for row in rows] == pytest.approx([n * flops / 1e15 for n in (2, 4, 6, 8)])


def test_baseline_exports_are_pipelines_with_the_moving_average(baseline):
    folder = baseline[0]
    for kind in (DDPMPipeline, DDIMPipeline):
        assert kind.from_pretrained(folder / "model").unet.config.sample_size == 8
    best = min(read_rows(folder), key=lambda row: float(row[LABEL]))
    assert (weights(folder) == weights(folder, "best")) == (best["update"] == "8")
    checkpoint = folder / "checkpoints" / "update-00000008"
    ema = checkpoint_tensors(checkpoint, "ema")
    exported = load_denoiser(str(folder))[0].state_dict()
    assert all(torch.equal(ema[name], tensor) for name, tensor in exported.items())
    raw = checkpoint_tensors(checkpoint)
    assert any(not torch.equal(raw[name], tensor) for name, tensor in exported.items())


def test_a_shared_run_is_a_pipeline(baseline, tmp_path):
    folder = share_folder(shutil.copytree(baseline[0], tmp_path / "run"))
    state = DDPMPipeline.from_pretrained(folder).unet.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in load_denoiser(str(folder))[0].state_dict().items())
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.eval_results[0].metric_name) == ("diffusers", LABEL)
    assert 'DDPMPipeline.from_pretrained("FOLDER")' in card.text and "lower is better" in card.text


def test_samples_are_a_picture_of_twelve(baseline):
    grid = np.asarray(Image.open(baseline[0] / "samples.png"))
    assert grid.shape == (6 * 22, 6 * 82, 3) and len(np.unique(grid)) > 10


def test_eval_only_prints_the_last_evaluation(baseline, capsys):
    folder = baseline[0]
    call_script(train_diffusion.main, "--eval-only --workers 0 --output", folder.parent, "--name", folder.name)
    row, printed = read_rows(folder)[-1], json.loads(capsys.readouterr().out)
    assert set(printed) == {LABEL, "mmd12_digits-resnet10t"}
    for name, value in printed.items():  # the exported model is in another memory format than the trained one was
        assert value == pytest.approx(float(row[name]), rel=PIXEL_ROUNDING), name


def test_args_yaml_is_a_recipe_that_repeats_the_run(baseline, tmp_path):
    options = yaml.safe_load((baseline[0] / "args.yaml").read_text())
    assert set(options) == set(vars(train_diffusion.build_parser().parse_args([]))) - {"config"}
    recipe = ["-c", baseline[0] / "args.yaml", "--output", tmp_path, "--name", "again"]
    call_script(train_diffusion.main, recipe)
    assert timeless(tmp_path / "again") == timeless(baseline[0])
    assert weights(tmp_path / "again") == weights(baseline[0])


# ---- with a teacher ----


@pytest.fixture(scope="module")
def teacher(run, tmp_path_factory) -> Path:
    """A weak teacher of the other family."""
    return run(tmp_path_factory.mktemp("teacher"), "teacher", VIT, "--updates 4 --eval-interval 4 --seed 7")


@pytest.fixture(scope="module")
def treated(run, teacher, tmp_path_factory) -> tuple[Path, list[Forward]]:
    options = f"{PHASE} --kd-patience 99 --target 1e9 --eval-interval 1"
    with recorded_forwards() as forwards:
        folder = run(tmp_path_factory.mktemp("treated"), "treated", options, "--teacher", teacher)
    return folder, forwards


def test_lambda_follows_the_updates_and_losses_add_up(run, teacher, tmp_path):
    options = f"{PHASE} --no-kd-balance --kd-patience 99 --eval-interval 1 --teacher"
    folder = run(tmp_path, "fixed", options, teacher)
    for row in read_rows(folder):
        u = int(row["update"])
        assert float(row["kd_weight"]) == pytest.approx(np.interp(u, [0, 2, 4, 6], [0, 2, 2, 0]))
        assert row["kd_active"] == str(int(u < 6))
        assert (row[f"switch_{LABEL}"] != "") == (u < 6)
        weight = np.interp(u - 1, [0, 2, 4, 6], [0, 2, 2, 0])  # of the update that this row is about
        assert (row["kd_loss"] != "") == (weight > 0)
        total = float(row["task_loss"]) + weight * float(row["kd_loss"] or 0)
        assert float(row["train_loss"]) == pytest.approx(total, rel=1e-5)
    assert read_summary(folder)["kd_off"] == {"epoch": 1.5, "update": 6, "reason": "window"}
    card = (share_folder(folder) / "README.md").read_text()
    assert "`--no-kd-fade --no-kd-balance`" in card  # what is not the default of diffusion


def test_lambda_is_a_ratio_of_gradients_by_default(treated):
    """So the losses are not added up with the weight of the window."""
    taught = [row for row in read_rows(treated[0]) if row["kd_loss"]]
    assert len(taught) == 5
    for row in taught:
        weight = np.interp(int(row["update"]) - 1, [0, 2, 4, 6], [0, 2, 2, 0])
        fixed = float(row["task_loss"]) + weight * float(row["kd_loss"])
        assert abs(float(row["train_loss"]) - fixed) > 1e-3 * fixed
    assert "`--no-kd-fade`" in (share_folder(treated[0]) / "README.md").read_text()


def training_start(forwards: list[Forward]) -> int:
    """How many forwards there were before the first training one."""
    return next(i for i, forward in enumerate(forwards) if forward.training)


def test_teacher_is_scored_first_and_sees_what_the_student_sees(treated, baseline):
    forwards, score = treated[1], read_summary(treated[0])["teacher"]
    start = training_start(forwards)
    # two distances, two steps, two batches of samples
    assert [forward.params == score["params"] for forward in forwards[:start]] == [True] * 2 * 2 * 2
    trained = [forward.digest for forward in forwards if forward.training]
    taught = [forward.digest for forward in forwards[start:] if forward.params == score["params"]]
    assert taught == trained[1:6]  # the same x_t and t, while lambda is above 0
    assert trained == [forward.digest for forward in baseline[1] if forward.training]  # and both arms the same


def test_reported_and_deciding_samples_come_from_other_noise(treated):
    forwards, score = treated[1], read_summary(treated[0])["teacher"]
    digests = [forward.digest for forward in forwards[: training_start(forwards)]]
    assert len(set(digests)) == len(digests)
    assert score["switch"] != score["report"] and score["model"] == "vit_tiny_patch16_224"
    evaluated = [forward.digest for forward in forwards if not forward.training]
    assert evaluated.count(digests[0]) == 1 + 8  # the same start noise at every evaluation, for teacher and student


def test_student_that_surpasses_drops_the_teacher_for_good(run, teacher, tmp_path):
    options = (PHASE, "--kd-hold 4 --teacher-score 1e9 --kd-patience 2 --recovery-interval 5 --teacher", teacher)

    def stop(count: int) -> None:
        if count == 4:
            signal.raise_signal(signal.SIGTERM)

    with recorded_forwards(stop) as forwards, pytest.raises(Preempted):
        run(tmp_path, "run", *options)
    folder = tmp_path / "run"
    assert read_summary(folder)["kd_off"] == {"epoch": 1.0, "update": 4, "reason": "surpass"}
    params = read_summary(folder)["teacher"]["params"]
    last = max(i for i, forward in enumerate(forwards) if forward.params == params)
    assert sum(forward.training for forward in forwards[:last]) == 4  # the fifth update is without it
    hidden = teacher.rename(teacher.with_name("hidden"))
    in_sampling = signal_in_evaluation(0, lambda module: isinstance(module, UNet))
    try:
        with in_sampling as sampled, pytest.raises(Preempted, match="saved at update 6"):
            run(tmp_path, "run", *options, "--resume auto")
        assert sampled == [8]  # the first of two steps, of the first of two batches
        with recorded_forwards() as forwards:
            run(tmp_path, "run", *options, "--resume auto")
    finally:
        hidden.rename(teacher)
    assert params not in {forward.params for forward in forwards}
    assert read_summary(folder)["status"] == "finished"
    assert [row["kd_active"] for row in read_rows(folder)] == ["1", "0", "0", "0"]


def test_teachers_hand_over_to_one_another(run, teacher, baseline, tmp_path):
    """The second one, of another family, begins at the start of its own window, at a hand-over between evaluations."""
    options = f"{PHASE} --kd-warmup 1 --kd-hold 2 --kd-decay 0 --kd-patience 99 --target 1e9"
    folder = run(tmp_path, "run", options, "--eval-interval 2 --teacher", teacher, baseline[0])
    summary, rows = read_summary(folder), read_rows(folder)
    weak, strong = summary["teachers"]
    assert (weak["model"], strong["since"]["update"]) == ("vit_tiny_patch16_224", 3)
    assert [rung["off"]["update"] for rung in (weak, strong)] == [3, 6] and summary["kd_off"] == strong["off"]
    assert [rung["updates"] for rung in (weak, strong)] == [2, 2], "lambda is 0 in the first update of each"
    assert [float(row["kd_weight"]) for row in rows] == [2, 2, 0, 0]
    assert strong["report"] == pytest.approx(read_summary(baseline[0])["last"], rel=PIXEL_ROUNDING)
    flops = 8 * summary["flops"]["student_update"] / 1e15 + weak["pflops"] + strong["pflops"]
    assert float(rows[-1]["pflops"]) == pytest.approx(flops)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_pipeline_of_another_prediction_teaches(prediction, run, tmp_path):
    torch.manual_seed(0)
    plain = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    DDPMPipeline(plain, DDPMScheduler(prediction_type=prediction)).save_pretrained(tmp_path / "pipeline")
    folder = run(tmp_path, "run", PHASE, "--kd-warmup 0 --kd-patience 99 --teacher", tmp_path / "pipeline")
    assert f"the teacher predicts {prediction} over 1000 steps" in (folder / "log.txt").read_text()
    row = read_rows(folder)[0]
    assert 0 < float(row["kd_loss"]) < float("inf") and int(row["kd_active"]) == 1
    assert 0 < read_summary(folder)["teacher"]["report"] < float("inf")


def test_losses_in_training_switch_off_without_a_switch_split(run, tmp_path):
    """A student that learns to predict the noise passes a teacher that never learnt it."""
    weak = run(tmp_path, "weak", "--updates 1 --lr 1e-9")
    options = (
        "--kd-weight 0.1 --kd-warmup 0 --kd-hold 8 --kd-decay 0 --kd-off running --kd-patience 1 --eval-interval 4"
    )
    folder = run(tmp_path, "taught", options, "--teacher", weak)
    student, teacher = map(
        float, re.search(r"; in training (\S+), teacher (\S+)", (folder / "log.txt").read_text()).groups()
    )
    assert student < teacher and read_summary(folder)["kd_off"]["reason"] == "surpass"
    assert read_summary(folder)["teacher"]["switch"] is None


def test_teacher_equal_to_the_student_has_nothing_to_say(run, baseline, tmp_path):
    options = "--kd-warmup 0 --kd-hold 1 --kd-decay 0 --updates 1 --eval-interval 1 --kd-weight 5"
    folder = run(tmp_path, "run", options, "--initial-checkpoint", baseline[0], "--teacher", baseline[0])
    (row,) = read_rows(folder)
    # 0 but for rounding: the two may use other kernels, as the teacher's forward keeps nothing for a backward. In
    # float32 an epsilon of magnitude 1 is off by some 1e-6 after a few layers; the term is the square of that
    assert float(row["kd_loss"]) < 1e-10


def test_compare_takes_these_runs(treated, run, tmp_path, capsys):
    plain = run(tmp_path, "plain", "--target 1e9 --eval-interval 1")
    argv = ["--baseline", str(plain), "--treated", str(treated[0]), "--out", str(tmp_path / "out")]
    assert compare.main(argv) == 0
    result = json.loads((tmp_path / "out" / "speedup.json").read_text())
    assert result["mode"] == "min" and result["targets"]["1000000000"]["speedup"]["update"] == 1
    assert f"{LABEL} <= tau" in capsys.readouterr().out


# ---- resumed, on several processes ----

EVERYTHING = (
    "--model-kwargs channel_mult=(1,2) attention=(4,) dropout=0.3 --grad-accum-steps 2 --batch-size 8 --hflip 0.5 "
    "--clip-grad 1 --class-cond --prediction v --min-snr 5 --betas cosine --sampler ddpm --warmup-updates 3 "
    "--sched cosine --switch-split 0.1 --recovery-interval 3"
)


def test_resumed_within_an_epoch_it_ends_in_the_same_bits(run, tmp_path):
    weak = run(tmp_path, "weak", EVERYTHING, "--updates 2 --warmup-updates 0 --seed 7")
    options = (EVERYTHING, PHASE, "--kd-patience 99 --teacher", weak)
    whole = run(tmp_path, "whole", *options)

    def stop(count: int) -> None:
        if count == 4 * 2:  # the first micro-batch of the fifth update
            signal.raise_signal(signal.SIGTERM)

    with recorded_forwards(stop), pytest.raises(Preempted, match="saved at update 5"):
        run(tmp_path, "run", *options)
    folder = run(tmp_path, "run", *options, "--resume auto")
    assert timeless(folder) == timeless(whole)
    for part in ("model", "best"):
        assert weights(folder, part) == weights(whole, part)


LONG = (
    f"{PHASE} --kd-balance --kd-hold 24 --kd-control shuffled --updates 30 --eval-interval 15 --recovery-interval 5 "
    "--resume auto --teacher"
)


@pytest.fixture(scope="module")
def long(run, teacher, tmp_path_factory) -> Path:
    """Long enough to be hit by a signal from outside."""
    return run(tmp_path_factory.mktemp("long"), "run", LONG, teacher)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)])
def test_killed_it_ends_in_the_same_bits(number, code, run, long, teacher, tiny_teacher, tmp_path):
    parts = (SMALL, UNET, LONG, teacher, "--fd-features", tiny_teacher, "--output", tmp_path, "--name run")
    started = start_script("train_diffusion", tmp_path / "log", *parts)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert started.wait_for(lambda: any(checkpoints.glob("update-*/state.json"))), started.text
    started.kill(number)
    assert started.wait() == [code], started.text
    if code == 75:
        assert read_summary(tmp_path / "run")["status"] == "preempted"
    folder = run(tmp_path, "run", LONG, teacher)
    assert "resumed from" in (folder / "log.txt").read_text()
    assert weights(folder) == weights(long) and timeless(folder) == timeless(long)


def test_two_processes_train_as_one(run, treated, teacher, tiny_teacher, tmp_path):
    """Data, noise and time steps are the same. Gradients are summed in another order, which changes losses by some 1e-6
    of themselves, and distances by the rounding of pixels."""
    options = (SMALL, UNET, PHASE, "--kd-patience 99 --eval-interval 1 --batch-size 8 --fd-features", tiny_teacher)
    log = tmp_path / "log"
    started = start_script(
        "train_diffusion", log, *options, "--teacher", teacher, "--name two --output", tmp_path, processes=2
    )
    assert started.wait() == [0, 0], started.text
    rows, others = read_rows(treated[0]), read_rows(tmp_path / "two")
    assert len(rows) == len(others) == 8
    for row, other in zip(rows, others, strict=True):
        for column in ("epoch", "update", "samples", "lr", "kd_weight", "kd_active", "pflops"):
            assert row[column] == other[column], column
        for column in ("train_loss", "task_loss", "kd_loss"):
            assert float(row[column] or 0) == pytest.approx(float(other[column] or 0), rel=1e-4), column
        for column in (LABEL, f"switch_{LABEL}"):
            assert float(row[column] or 0) == pytest.approx(float(other[column] or 0), rel=PIXEL_ROUNDING), column
    ours, theirs = read_summary(treated[0])["teacher"], read_summary(tmp_path / "two")["teacher"]
    for split in ("report", "switch"):
        assert ours[split] == pytest.approx(theirs[split], rel=PIXEL_ROUNDING), split


# ---- the other options ----


def test_vit_student_with_classes_on_uncached_enlarged_images(run, tmp_path):
    options = (
        "--class-cond --cache none --img-size 16 --updates 2 --channels-last --fd-split test --log-with tensorboard"
    )
    folder = run(tmp_path, "vit", VIT, options)
    model, process, _ = load_denoiser(str(folder))
    assert isinstance(model, ViT) and model.signature == (16, 1, 10) and process.config.num_train_timesteps == 1000
    assert read_summary(folder)["data"]["report"] == 597
    shared = share_folder(folder)
    assert load_denoiser(str(shared))[0].signature == model.signature
    assert "w2s.diffusion.exports import load_denoiser" in (shared / "README.md").read_text()
    assert b"samples" in b"".join(path.read_bytes() for path in folder.rglob("events.out*"))


def test_dry_run_leaves_nothing(run, teacher, tmp_path, capfd):
    run(tmp_path, "dry", PHASE, "--dry-run --fd-samples 1000 --target fd1k_digits-resnet10t=5 --teacher", teacher)
    assert not list(tmp_path.iterdir())
    said = capfd.readouterr().err
    assert "3 updates" in said and "done: fd1k_digits-resnet10t" in said and "nothing kept" in said


def test_no_step_is_fused_under_a_scaler(run, tmp_path):
    with under_a_scaler() as steps:
        run(tmp_path, "run", "--dry-run")
    assert steps == [False] * 3


def test_loss_that_is_not_finite_ends_the_run(run, tmp_path):
    with pytest.raises(NonFiniteLoss):
        run(tmp_path, "run", "--opt sgd --lr 1e30")
    assert read_summary(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("", 50),
        ("--diffusion-steps 4000", 50),
        ("--diffusion-steps 40", 40),
        ("--diffusion-steps 120", 40),
        ("--sampler ddpm --diffusion-steps 120", 120),
        ("--sampler ddpm --sample-steps 25", 25),
    ],
)
def test_default_sample_steps_divide_the_process(options, steps):
    args = train_diffusion.build_parser().parse_recipe(options.split())
    train_diffusion.resolve(args)
    assert args.sample_steps == steps


@pytest.mark.parametrize(("options", "lr"), [("", 2e-4), ("--lr 1e-3", 1e-3), ("--lr-base 0.2 --opt sgd", 0.1)])
def test_learning_rate_is_given_or_scaled(options, lr):
    args = train_diffusion.build_parser().parse_recipe(options.split())
    train_diffusion.resolve(args)
    assert train_diffusion.scaled_lr(args, 128) == pytest.approx(lr)
    assert "any timm optimiser (default: adam)" in " ".join(train_diffusion.build_parser().format_help().split())


def test_steps_of_the_learning_rate_are_shares_of_the_run():
    def rates(options: str) -> list[float]:
        args = train_diffusion.build_parser().parse_recipe(f"--lr 1 --decay-rate 0.5 {options}".split())
        train_diffusion.resolve(args)
        model = torch.nn.Linear(1, 1)
        optimizer, scheduler = build_optimizer(
            args, model, lr=args.lr, length=args.updates, updates_per_unit=1, unit="updates"
        )
        rates = []
        for update in range(args.updates):
            scheduler.step_update(update)
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    assert rates("--updates 20 --sched step") == [1.0] * 6 + [0.5] * 6 + [0.25] * 6 + [0.125] * 2
    assert rates("--updates 20 --sched multistep") == [1.0] * 5 + [0.5] * 6 + [0.25] * 9  # timm is one update early
    assert rates("--updates 5 --sched step --decay-updates 2") == [1.0, 1.0, 0.5, 0.5, 0.25]
    with pytest.raises(InputError, match="--decay-updates: takes a finite number above 0"):
        rates("--updates 5 --decay-updates 0")


# ---- bad input ----


@pytest.fixture
def unmeasured():
    """Inside it, measuring real images is an error."""
    return mock.patch("w2s.diffusion.judge.cached_statistics", side_effect=AssertionError("real images are measured"))


def test_cache_that_cannot_be_written_is_refused(tiny_teacher, unmeasured, tmp_path):
    (tmp_path / "file").touch()
    options = ["--fd-features", tiny_teacher, "--fd-cache", tmp_path / "file" / "cache", "--output", tmp_path]
    with unmeasured, pytest.raises(InputError, match="choose another --fd-cache"):
        call_script(train_diffusion.main, SMALL, UNET, "--name run", options)


def test_resume_keeps_to_the_features(baseline, run, tmp_path):
    shutil.copytree(baseline[0], tmp_path / "run")
    summary = read_summary(baseline[0])
    for digest, status in ((summary["features"]["digest"], None), ("abc", "judged on features abc")):
        text = json.dumps({**summary, "status": "preempted", "features": {**summary["features"], "digest": digest}})
        (tmp_path / "run" / "summary.json").write_text(text)
        with pytest.raises(InputError, match=status) if status else contextlib.nullcontext():
            run(tmp_path, "run", "--target 1e9 1e-9 --resume auto")


def test_teacher_whose_samples_are_not_finite_is_refused(run, teacher, tmp_path):
    broken, process, _ = load_denoiser(str(teacher))
    torch.nn.init.constant_(broken.head.bias, torch.inf)
    export_denoiser(broken, process, tmp_path / "broken")
    with pytest.raises(InputError, match=r"broken scores .* nan"):
        run(tmp_path, "run", PHASE, "--teacher", tmp_path / "broken")
    assert not (tmp_path / "run").exists()


def test_only_what_is_compared_with_is_measured(tiny_teacher, tmp_path):
    options = ["--fd-features", tiny_teacher, "--fd-cache", tmp_path / "cache", "--output", tmp_path]
    with mock.patch("w2s.diffusion.judge.feature_statistics", wraps=feature_statistics) as measure:
        call_script(train_diffusion.main, SMALL, UNET, "--updates 1 --switch-split 0.1 --name run", options)
    assert [call.kwargs["count"] for call in measure.call_args_list] == [64, 12]  # the training images, the samples


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model nc8", "ncN-rbM"),
        ("--model-kwargs widths=3", "widths"),
        ("--model-kwargs channel_mult=5", "channel_mult=5 must be a list"),
        ("--model-kwargs attention=8", r"attention=8 must be a list, as in 'attention=\[8\]'"),
        ("--betas quadratic", "--betas"),
        ("--diffusion-steps 10", "too few"),
        ("--sample-steps 2000", "exceeds --diffusion-steps"),
        ("--sample-steps 30", "must divide --diffusion-steps 1000; 25 do"),
        ("--min-snr 0", "--min-snr 0"),
        ("--kd-temperature 6 1", "no temperature"),
        ("--fid-weights x.pth", "give one"),
        ("--fd-samples 1", r"--fd-samples 1: .* two images"),
        ("--target 0", "lies above 0"),
        ("--teacher-score -5", f"--teacher-score -5.0: {LABEL} lies above 0"),
        ("--hflip 1.5", r"--hflip: takes a number in \[0, 1\], got 1.5"),
        ("--target fid10k=5", LABEL),
        ("--batch-size 100", "fewer than one update"),
        ("--warmup-updates 9", "--warmup-updates 9 is longer"),
        ("--opt nothing", "--opt nothing"),
        ("--torchcompile nothing", "--torchcompile: nothing: torch has .*inductor"),
        ("--fd-split val", "train and test"),
        ("--initial-checkpoint nowhere", "holds no denoiser"),
        ("--teacher nowhere", "holds no denoiser"),
        ("--teacher-model nc8-rb1", "--teacher-model"),
        ("--train-samples 5000", "--train-samples"),
        ("--updatess 5", "--updatess"),
    ],
)
def test_bad_input_is_one_line_before_any_work(options, message, run, unmeasured, tmp_path):
    with recorded_forwards() as forwards, unmeasured, pytest.raises(InputError, match=message) as error:
        run(tmp_path, "run", options)
    assert "\n" not in str(error.value) and not forwards and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--img-size 16", "image size 8"),
        ("--in-chans 3", "channels 1"),
        ("--class-cond", "classes"),
        ("--betas cosine", "--betas"),
        ("--diffusion-steps 400", "--diffusion-steps"),
        ("--kd-warmup 9", "longer than the run"),
    ],
)
def test_teacher_that_does_not_fit_is_refused(options, message, run, teacher, unmeasured, tmp_path):
    with recorded_forwards() as forwards, unmeasured, pytest.raises(InputError, match=message):
        run(tmp_path, "run", options, "--teacher", teacher)
    assert not forwards and not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--teacher", "--initial-checkpoint"])
def test_classifier_is_no_denoiser(option, run, tiny_teacher, unmeasured, tmp_path):
    with unmeasured, pytest.raises(InputError, match=f"{tiny_teacher} holds no denoiser"):
        run(tmp_path, "run", option, tiny_teacher)
    assert not (tmp_path / "run").exists()


def test_distance_without_any_inception_weights_says_what_to_do(tmp_path):
    where = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    with mock.patch(where, side_effect=OSError("no route")), pytest.raises(InputError, match="--fd-features RUN"):
        call_script(train_diffusion.main, SMALL, UNET, "--name run --output", tmp_path)
    assert not (tmp_path / "run").exists()


def test_controls_teach_in_the_teachers_place(run, tmp_path, baseline, capsys):
    """A few updates each; the term is there, and another one each time."""
    terms = set()
    for kind in ("--kd-control shuffled", "--kd-control random"):
        run(tmp_path, "run", "--kd-warmup 0 --log-interval 1 --dry-run --teacher", baseline[0], kind)
        terms.add(tuple(re.findall(r"x kd ([\d.]+)", capsys.readouterr().err)))
    assert len(terms) == 2 and all(len(run) == 3 and all(float(term) > 0 for term in run) for run in terms)
