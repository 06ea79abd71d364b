#!/usr/bin/env python
r"""Train a diffusion model of images (DDPM), sooner with a weaker teacher's help.

Progress is counted in updates.

One GPU or CPU  python train_diffusion.py -c recipes/digits_diffusion_w2s.yaml
One GPU, bf16   accelerate launch --mixed_precision bf16 train_diffusion.py \
                    -c recipes/cifar10_nc128rb3_w2s.yaml
Two on a CPU    accelerate launch --config_file \
                    recipes/accelerate/cpu_two.yaml train_diffusion.py -c RECIPE
8 GPUs          accelerate launch --config_file \
                    recipes/accelerate/one_node_8gpu.yaml train_diffusion.py \
                    -c RECIPE
Two nodes       accelerate launch --machine_rank 0|1 --main_process_ip HOST \
                    --config_file recipes/accelerate/two_nodes.yaml \
                    train_diffusion.py -c RECIPE
Resume          any of these commands with --resume auto
Evaluate        any of these commands with --eval-only

Without --teacher this trains a baseline, which is also how a teacher is made.
Denoisers are judged by the Frechet distance of their samples' features from
those of real images; lower is better.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from w2s.diffusion.convert import load_teacher_denoiser
from w2s.diffusion.data import DiffusionData, load_diffusion_data
from w2s.diffusion.denoisers import build_denoiser, denoiser_flops
from w2s.diffusion.exports import export_denoiser, load_compatible
from w2s.diffusion.judge import Judge, add_judge_options, build_judge, resolve_sample_steps
from w2s.diffusion.options import add_denoiser_options, add_diffusion_data_options, add_diffusion_training_options
from w2s.diffusion.process import as_epsilon, denoising_loss, draw_noise, noise_schedule
from w2s.diffusion.teacher import DenoiserTeacher
from w2s.distillation import Distillation
from w2s.engine.errors import InputError, on_one_line
from w2s.engine.evaluation import parse_options
from w2s.engine.main import call_main
from w2s.engine.optim import build_optimizer, scaled_lr
from w2s.engine.options import add_kd_options, add_optimizer_options, add_run_options, run_name
from w2s.engine.parsing import Parser
from w2s.engine.plan import Plan, plan_updates
from w2s.engine.prepare import prepare_job
from w2s.engine.run import Run
from w2s.engine.targets import check_targets
from w2s.engine.teaching import early_phase, kd_window, start_distillation
from w2s.engine.trackers import log_picture
from w2s.engine.training import Job
from w2s.images.loading import train_batches
from w2s.losses import mse_epsilon

COMMON_OPTIONS = (  # --help begins with these
    *("dataset", "data_dir", "model", "updates", "batch_size", "lr", "teacher", "fd_features", "target", "resume"),
)


def build_parser() -> Parser:
    """The options of diffusion stand in w2s/diffusion/options.py, those of all tasks in w2s/engine/options.py."""
    parser = Parser(__doc__, COMMON_OPTIONS)
    add_run_options(parser)
    add_diffusion_data_options(parser)
    add_denoiser_options(parser)
    add_kd_options(parser, "a run folder or a diffusers pipeline folder", unit="updates", balance=True)
    add_optimizer_options(parser, unit="updates")

    add_diffusion_training_options(parser)
    add_judge_options(parser)

    parser.set_defaults(opt="adam", lr_base=None, weight_decay=0.0, sched="constant")
    parser.describe_defaults(lr="2e-4, or from --lr-base", lr_base="not used")
    parser.set_defaults(switch_split="0", kd_temperature=[1.0])
    return parser


def resolve(args) -> None:
    """Fill in the defaults that depend on other options, and refuse options that do not go together."""
    is_digits = args.dataset == "digits"
    args.img_size = args.img_size or (8 if is_digits else 32)
    args.in_chans = args.in_chans or (1 if is_digits else 3)
    if args.hflip is None:
        args.hflip = 0.0 if is_digits else 0.5
    args.name = args.name or run_name(args)
    if args.teacher:
        args.kd_warmup, args.kd_hold, args.kd_decay = kd_window(args, args.updates)
    args.fd_cache = args.fd_cache or str(Path(args.output) / "fd-cache")
    if args.decay_updates is None:
        args.decay_updates = 0.3 * args.updates
    args.decay_milestones = args.decay_milestones or [0.3 * args.updates, 0.6 * args.updates]
    if args.lr_base is None:
        args.lr_base = 0.1
        args.lr = 2e-4 if args.lr is None else args.lr
    args.sample_steps = resolve_sample_steps(args.sample_steps, args.sampler, args.diffusion_steps)

    if args.fd_samples < 2:
        raise InputError(f"--fd-samples {args.fd_samples}: a Frechet distance needs at least two images")
    if args.min_snr == 0:
        raise InputError("--min-snr 0 would weight every loss by 0; give more, e.g. 5, or leave it out")
    if set(args.kd_temperature) != {1.0}:
        raise InputError("--kd-temperature: the term on epsilon has no temperature; leave it at 1")
    if args.teacher_model or args.teacher_kwargs or args.teacher_classes:
        raise InputError("--teacher-model, -kwargs and -classes: the teacher's folder says what it is; leave them out")
    if args.dry_run:
        args.sample_steps = min(args.sample_steps, 2)


def build_student(args, num_classes: int, process: DDPMScheduler) -> nn.Module:
    """The denoiser of this run, with the weights of --initial-checkpoint if that is given."""
    student = build_denoiser(
        args.model,
        args.img_size,
        args.in_chans,
        num_classes=num_classes if args.class_cond else None,
        model_kwargs=args.model_kwargs,
    )
    if args.initial_checkpoint:
        model, _ = load_compatible(
            args.initial_checkpoint, student, process, source=f"--initial-checkpoint {args.initial_checkpoint}"
        )
        try:
            student.load_state_dict(model.state_dict())
        except RuntimeError as error:
            reason = on_one_line(error, limit=200)
            raise InputError(f"--initial-checkpoint {args.initial_checkpoint} does not fit: {reason}") from None
    return student


def build_teacher(args, run: Run, spec: str, student: nn.Module, process: DDPMScheduler) -> DenoiserTeacher:
    """The frozen teacher of a name in --teacher, whose epsilon at x_t and t means what the student's does."""
    model, folder = load_teacher_denoiser(spec, student, process, source=f"--teacher {spec}")
    return DenoiserTeacher(model, process=process, source=folder, channels_last=args.channels_last, **run.placement)


def flops_of(student: nn.Module, kd: Distillation, batch: int) -> dict:
    """FLOPs of one update: those of the student, and those of the teacher's forward."""
    return {
        "student_update": denoiser_flops(student, batch, backward=True),
        "teacher_forward": denoiser_flops(kd.teacher.model, batch, backward=False) if kd.needs_forward else 0,
    }


def build_job(
    args,
    run: Run,
    plan: Plan,
    kd: Distillation,
    *,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler,
    flops: dict[str, int],
    process: DDPMScheduler,
) -> Job:
    """The student ready for training, in its memory format."""
    if args.channels_last:
        student = student.to(memory_format=torch.channels_last)
    job = prepare_job(
        args,
        run,
        plan,
        kd,
        student=student,
        compiled=student,
        optimizer=optimizer,
        scheduler=scheduler,
        flops=flops,
        export=lambda module, folder: export_denoiser(module, process, folder),
    )
    if job.ema and (reached := job.ema.get_decay(args.updates)) < args.model_ema_decay:
        run.log(f"the EMA's warm-up ends this run at a decay of {reached:.4g}, not --model-ema-decay")
    return job


def train(args, job: Job, stop: int, batches: Iterator, process: DDPMScheduler) -> None:
    """Train the denoiser until `stop` updates are done or a signal asks to end."""
    kd, accelerator = job.distillation, job.run.accelerator
    for update in job.updates(stop):
        losses = torch.zeros(3, device=job.run.device)
        for micro in job.micro_batches():
            images, labels = next(batches)
            place = {"micro": micro, "micro_batches": job.accum}
            noise, t = draw_noise(images, accelerator, steps=args.diffusion_steps, key=(args.seed, update, 0), **place)
            x_t = process.add_noise(images, noise, t)
            if args.channels_last:
                x_t = x_t.contiguous(memory_format=torch.channels_last)
            inputs = (x_t, t, labels if args.class_cond else None)

            with job.accumulating():
                prediction = job.model(*inputs)
                task_loss = denoising_loss(process, prediction, images=images, noise=noise, t=t, min_snr=args.min_snr)
                loss, kd_loss = task_loss, torch.zeros_like(task_loss)
                if kd.weight > 0:  # L = L_task + lambda(u) L_kd, teacher and student at the same x_t and t
                    epsilon, taught = as_epsilon(process, prediction, x_t=x_t, t=t), kd.teach(*inputs)
                    kd_loss = mse_epsilon(epsilon, taught)
                    kd.compare(mse_epsilon, epsilon, taught, noise)  # for --kd-off running
                    kd.balance(task_loss, kd_loss, outputs=[prediction])  # ratio and scale are 1 without --kd-balance
                    loss = kd.scale * (task_loss + kd.weight * kd.ratio * kd_loss)
                accelerator.backward(loss / job.accum)
            losses += torch.stack([loss, task_loss, kd_loss]).detach() / job.accum
        job.step(losses)


def evaluate(job: Job, judge: Judge) -> None:
    """Measure and report the job's model; while the teacher is active, also compare the two for the switch-off."""
    run, kd = job.run, job.distillation
    picture = run.folder / "samples.png" if run.keeps and run.is_main else None
    model = job.model_to_evaluate()
    metrics = judge.reported_distances(model, picture)
    if kd.active:  # the switch-off: nearer to the data than the teacher's samples?
        kd.observe(judge.distance(model, judge.switch) if kd.needs_split else None, update=job.update)
    job.evaluated(metrics)
    if picture:
        log_picture(run.accelerator, "samples", picture, job.update)


def evaluate_only(run: Run, student: nn.Module, judge: Judge) -> None:
    """--eval-only: print the distances of a model."""
    metrics = judge.reported_distances(student.eval())
    if run.is_main:
        print(json.dumps(metrics))


def fit(args, job: Job, data: DiffusionData, process: DDPMScheduler, judge: Judge) -> None:
    """Train to the end of the run, with its evaluations and checkpoints."""
    batches = train_batches(
        data.train,
        job.run.accelerator,
        batch_size=args.batch_size,
        batches_per_epoch=job.plan.updates_per_epoch * job.accum,
        start=job.update * job.accum,
        seed=args.seed,
        workers=args.workers,
    )
    while not job.done:
        stop = job.next_stop((job.update // args.eval_interval + 1) * args.eval_interval)
        train(args, job, stop, batches, process)
        with job.saved() as evaluation_due:
            if evaluation_due:
                evaluate(job, judge)


def main(argv: list[str] | None = None) -> None:
    args = parse_options(build_parser(), argv)
    resolve(args)
    phase = early_phase(args, length=args.updates, mode="min")
    process = noise_schedule(args.betas, args.diffusion_steps, args.prediction)
    run = Run(args, task="diffusion")

    # images, denoiser, judge
    data = load_diffusion_data(args, run.accelerator, cache=run.options["cache"])
    run.settle(cache=data.cache)
    run.seed_all()
    student = build_student(args, data.num_classes, process).to(run.student_device)
    judge = build_judge(
        args, run.accelerator, data=data, process=process, checkpoint=run.checkpoint, stopping=run.stopping
    )
    targets = check_targets(args, metric=judge.metric, low=0.0, high=math.inf)
    if args.eval_only:
        evaluate_only(run, student, judge)
        return

    # updates, optimiser, learning rate
    plan = plan_updates(args, run, data.samples, updates=args.updates)
    lr = scaled_lr(args, plan.batch)
    optimizer, scheduler = build_optimizer(
        args, student, lr=lr, length=args.updates, updates_per_unit=1, unit="updates", fused=run.fuses
    )

    # the method: a frozen teacher, loaded only while it is needed
    kd = start_distillation(
        args,
        run,
        plan,
        phase=phase,
        load=lambda spec: build_teacher(args, run, spec, student, process),
        count_flops=lambda teacher: denoiser_flops(teacher.model, plan.batch, backward=False),
        evaluate=judge.distance,
        report=judge.report,
        switch=judge.switch,
        metric=judge.metric,
    )
    judge.measure_references(switch=kd.needs_split)

    flops = run.state["flops"] if run.state else flops_of(student, kd, plan.batch)

    # the run
    job = build_job(
        args,
        run,
        plan,
        kd,
        student=student,
        optimizer=optimizer,
        scheduler=scheduler,
        flops=flops,
        process=process,
    )
    job.resume()
    job.describe(args.model, f"{args.opt} lr {lr:.4g} {args.sched}", data.sizes, targets, metric=judge.metric)
    facts = {**job.facts(), "data": data.sizes, "features": judge.facts()}
    run.open(metric=judge.metric, mode="min", targets=targets, reported=judge.metric_names, facts=facts)
    fit(args, job, data, process, judge)
    job.finish()


if __name__ == "__main__":
    call_main(main)
