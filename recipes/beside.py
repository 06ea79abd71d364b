"""Times an update of our loops beside one of the library's own training example, in one process and in turns.

    python recipes/beside.py cls -c recipes/cifar10_cpu_w2s.yaml --teacher RUN
    python recipes/beside.py det -c recipes/digits_det_w2s.yaml --teacher RUN
    python recipes/beside.py diffusion -c recipes/digits_diffusion_w2s.yaml --teacher RUN

cls         train.py of timm, alone and with timm's own distillation. Each side loads the recipe's images with its own
            loader.
det         references/detection of torchvision.
diffusion   examples/unconditional_image_generation of diffusers. Sampling is timed beside diffusers' DDIMPipeline.

Model, weights, batch, precision and optimiser are the recipe's on all sides. Two things differ from the recipe: in
classification timm crops as it does by default, and in diffusion all sides clip gradients at 1, as the example does.
The examples' loops stand in reference_loops.py.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import Bench, Timer, median_ratio, parse_options
from bench_tasks import Classification, Detection, Diffusion, Task
from diffusers import DDIMPipeline, DDIMScheduler
from reference_loops import bare_loop, diffusers_loop, diffusers_unet, timm_batches, timm_loop, torchvision_loop

from w2s.diffusion.denoisers import UNet
from w2s.diffusion.process import generate
from w2s.engine.errors import InputError
from w2s.engine.main import call_main

KINDS = {"cls": Classification, "det": Detection, "diffusion": Diffusion}


def measure_classification(bench: Bench, rounds: int, count: int) -> dict:
    """Images a second of our loop and of timm's, loaders included, of the loaders alone, and of the bare arithmetic.

    Args:
        bench: of the recipe.
        rounds: that medians are taken over.
        count: updates of a round.
    """
    task, batch = bench.task, bench.task.plan.batch
    our_batches, their_batches, held_batches = task.batches(), timm_batches(task), bench.loaded_batches()
    timers = {
        "plain": bench.job_timer(task.job(taught=False), source=lambda: our_batches),
        "teacher": bench.job_timer(task.job(taught=True), source=lambda: our_batches),
        "reference": bench.timer(timm_loop(task, taught=False), source=lambda: their_batches),
        "reference_teacher": bench.timer(timm_loop(task, taught=True), source=lambda: their_batches),
        "plain_held": bench.job_timer(task.job(taught=False), source=held_batches),
        "bare_held": bench.timer(bare_loop(task), source=held_batches),
    }
    seconds = bench.take_turns(timers, rounds=rounds, count=count)

    def only_load(count: int, batches: Iterator) -> None:
        for _ in range(count):
            next(batches)

    loaders = {
        "ours": bench.timer(only_load, source=lambda: our_batches),
        "reference": bench.timer(only_load, source=lambda: their_batches),
    }
    # more batches than workers can have ready when their turn comes
    loading = bench.take_turns(loaders, rounds=rounds, count=4 * count)
    return {
        "images_per_second": {name: batch / statistics.median(values) for name, values in seconds.items()},
        "reference_ratio": median_ratio(seconds["plain"], seconds["reference"]),
        "reference_teacher_ratio": median_ratio(seconds["teacher"], seconds["reference_teacher"]),
        "bare_ratio": median_ratio(seconds["plain_held"], seconds["bare_held"]),
        "loader_images_per_second": batch / statistics.median(loading["ours"]),
        "loader_images_per_second_reference": batch / statistics.median(loading["reference"]),
        "loader_ratio": median_ratio(loading["ours"], loading["reference"]),
        "cache": task.cache,
        "workers": task.args.workers,
        "batch": batch,
        "threads": torch.get_num_threads(),
    }


def measure_updates(bench: Bench, build_reference: Callable[[Task], Callable], rounds: int, count: int) -> dict:
    """Seconds of our updates, alone and with the teacher, and of those of a reference, on the same batches.

    Args:
        bench: of the recipe.
        build_reference: makes the loop of the reference from the task.
        rounds: that medians are taken over.
        count: updates of a round.
    """
    source = bench.loaded_batches()
    plain, taught = bench.task.job(taught=False), bench.task.job(taught=True)
    timers = {
        "plain": bench.job_timer(plain, source),
        "teacher": bench.job_timer(taught, source),
        "reference": bench.timer(build_reference(bench.task), source),
    }
    seconds = bench.take_turns(timers, rounds=rounds, count=count)
    return {
        "seconds_per_update": {name: statistics.median(values) for name, values in seconds.items()},
        "teacher_ratio": median_ratio(seconds["plain"], seconds["teacher"]),
        "flops_bound": 1 + taught.flops["teacher_forward"] / taught.flops["student_update"],
        "reference_ratio": median_ratio(seconds["plain"], seconds["reference"]),
        "batch": bench.task.plan.batch,
    }


def samplers(bench: Bench, student: UNet) -> dict[str, Timer]:
    """Timers of our sampling and of diffusers': seconds an image. Each call samples one batch, whatever its count."""
    task, args, run = bench.task, bench.task.args, bench.run
    images = min(args.fd_samples, args.validation_batch_size)
    student = student.eval()
    pipeline = DDIMPipeline(diffusers_unet(student).to(run.device), DDIMScheduler.from_config(task.process.config))
    pipeline.set_progress_bar_config(disable=True)
    our_samples = partial(
        generate,
        student,
        task.process,
        run.accelerator,
        shape=(args.in_chans, args.img_size, args.img_size),
        count=images,
        seed=0,
        sampler="ddim",
        steps=task.sample_steps,
        batch_size=images,
    )
    their_samples = partial(pipeline, batch_size=images, num_inference_steps=task.sample_steps, output_type="np")

    def ours(_: int) -> float:
        return bench.seconds(our_samples) / images

    def theirs(_: int) -> float:
        with run.accelerator.autocast():
            return bench.seconds(their_samples) / images

    return {"ours": ours, "reference": theirs}


def measure_sampling(bench: Bench, rounds: int) -> dict:
    """Images a second of our sampling and of diffusers'."""
    student = bench.task.job(taught=False).student
    seconds = bench.take_turns(samplers(bench, student), rounds=rounds, count=1)
    return {
        "images_per_second_sampled": 1 / statistics.median(seconds["ours"]),
        "images_per_second_sampled_reference": 1 / statistics.median(seconds["reference"]),
        "sampling_reference_ratio": median_ratio(seconds["ours"], seconds["reference"]),
    }


def check_comparable(kind: str, args: argparse.Namespace) -> None:
    """Refuse a recipe that the library's example cannot train.

    Raises:
        InputError: an update has several micro-batches, or the example lacks the data, the model or the loss.
    """
    if args.grad_accum_steps > 1:
        raise InputError("the reference loops are of one process and one micro-batch an update")
    if kind == "cls" and (args.dataset == "digits" or args.mixup or args.cutmix):
        raise InputError("timm's loop is fed by timm: give a data set of timm's, and no mixup")
    is_unet = args.model.startswith("nc")
    if kind == "diffusion" and (
        args.class_cond or args.prediction != "epsilon" or args.sampler != "ddim" or not is_unet
    ):
        raise InputError("the reference trains U-Nets to predict epsilon without classes, and samples with ddim")


def measure(kind: str, args: argparse.Namespace) -> dict:
    """All figures of a comparison.

    Raises:
        InputError: as the script does, or there are several processes.
    """
    if kind == "diffusion":
        args.clip_grad = 1.0
    bench = Bench(KINDS[kind](args))
    if bench.run.accelerator.num_processes > 1:
        raise InputError("the reference loops are of one process and one micro-batch an update")
    rounds, count = args.rounds, args.round_updates
    if kind == "cls":
        return measure_classification(bench, rounds=rounds, count=count)
    if kind == "det":
        return measure_updates(bench, torchvision_loop, rounds=rounds, count=count)
    updates = measure_updates(bench, diffusers_loop, rounds=rounds, count=count)
    return {**updates, **measure_sampling(bench, rounds=rounds)}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    kind = argv[0] if argv else ""
    if kind not in KINDS:
        raise InputError(f"the first word is cls, det or diffusion, not '{kind}'")
    args = parse_options(argv[1:], KINDS[kind], description=__doc__)
    check_comparable(kind, args)
    figures = json.dumps(measure(kind, args), indent=2)
    print(figures)
    if args.json:
        Path(args.json).write_text(figures + "\n")


if __name__ == "__main__":
    call_main(main)
