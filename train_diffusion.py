#!/usr/bin/env python
r"""Train a diffusion model of images (DDPM), sooner with a weaker teacher's help. Progress is counted in updates.

One GPU or CPU      python train_diffusion.py -c recipes/digits_diffusion_w2s.yaml
One GPU, bf16       accelerate launch --mixed_precision bf16 train_diffusion.py -c recipes/cifar10_nc128rb3_w2s.yaml
One node, 8 GPUs    accelerate launch --config_file recipes/accelerate/one_node_8gpu.yaml train_diffusion.py -c RECIPE
Two nodes           accelerate launch --config_file recipes/accelerate/two_nodes.yaml --machine_rank 0|1 \
                        --main_process_ip HOST train_diffusion.py -c RECIPE
Resume              the same command with --resume auto

Without --teacher this trains a baseline, which is also how a teacher is made. Samples are judged by the Frechet
distance of their features from those of real images: lower is better.
"""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import nn

from w2s.diffusion.data import PixelData, load_pixels
from w2s.diffusion.denoisers import build_denoiser, check_same, export, load_denoiser
from w2s.diffusion.judge import Judge
from w2s.diffusion.process import (
    BETAS,
    PREDICTIONS,
    SAMPLERS,
    as_epsilon,
    denoising_loss,
    draw_noise,
    noise_schedule,
)
from w2s.diffusion.teacher import DenoiserTeacher
from w2s.distillation import Distillation
from w2s.engine.errors import InputError, on_one_line
from w2s.engine.main import call_main
from w2s.engine.optim import build_ema, build_optimizer, scaled_lr
from w2s.engine.options import (
    KeyValues,
    Parser,
    add_data_options,
    add_kd_options,
    add_optimizer_options,
    add_run_options,
    add_switch,
    add_weights_options,
    check_targets,
    natural_int,
    not_negative,
    positive_int,
    probability,
    run_name,
)
from w2s.engine.plan import count_flops, plan_updates
from w2s.engine.run import Run
from w2s.engine.teaching import early_phase, kd_window, start_distillation
from w2s.engine.trackers import log_picture
from w2s.engine.training import Job
from w2s.images.loading import train_batches
from w2s.losses import mse_epsilon

DIGITS_DEFAULTS = {"img_size": 8, "in_chans": 1, "hflip": 0.0}


def build_parser() -> Parser:
    """All options; shared groups come from w2s/engine/options.py."""
    parser = Parser(__doc__)
    add_run_options(parser)

    group = add_data_options(parser, "digits, hfds/NAME_OR_FOLDER, torch/...", "image folder with train/")
    group.add_argument("--img-size", type=positive_int, metavar="N", help="default: 32; 8 for digits")
    group.add_argument("--in-chans", type=positive_int, metavar="N", help="default: 3; 1 for digits")
    group.add_argument("--hflip", type=probability, metavar="P", help="default: 0.5; 0 for digits")

    group = parser.add_argument_group("denoiser and process")
    group.add_argument("--model", default="nc128-rb3", metavar="NAME", help="ncN-rbM, or a timm VisionTransformer")
    group.add_argument(
        "--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V",
        help="ncN-rbM: channel_mult, attention, dropout, head_dim; else timm's: patch_size, embed_dim, depth, ...",
    )  # fmt: skip
    group.add_argument("--initial-checkpoint", metavar="PATH", help="start from a run folder or pipeline folder")
    add_switch(group, "--class-cond", "condition on the class; otherwise no labels are needed")
    group.add_argument("--betas", choices=BETAS, default="linear")
    group.add_argument("--diffusion-steps", type=positive_int, default=1000, metavar="N", help="(1000)")
    group.add_argument("--prediction", choices=PREDICTIONS, default="epsilon")
    group.add_argument("--min-snr", type=not_negative, metavar="GAMMA", help="min-SNR weighting of the loss, e.g. 5")
    add_weights_options(group, sync_bn=False)

    add_kd_options(parser, "a run folder or a diffusers pipeline folder", unit="updates")
    add_optimizer_options(parser, unit="updates")

    group = parser.add_argument_group("training")
    group.add_argument("--updates", type=positive_int, default=100_000, metavar="N")
    group.add_argument("--eval-interval", type=positive_int, default=1000, metavar="N", help="updates (1000)")
    group.add_argument("-b", "--batch-size", type=positive_int, default=128, metavar="N", help="per process")
    group.add_argument("--grad-accum-steps", type=positive_int, default=1, metavar="N")

    group = parser.add_argument_group("samples and their distance")
    group.add_argument("--fd-split", metavar="NAME", help="real images to compare with (default: the training images)")
    group.add_argument("--fd-samples", type=positive_int, default=10_000, metavar="N", help="(10000)")
    group.add_argument("--fd-features", metavar="RUN", help="a run of train_cls.py for features, not Inception")
    group.add_argument("--fid-weights", metavar="FILE", help="torch-fidelity's Inception weights (default: downloaded)")
    group.add_argument("--fd-cache", metavar="DIR", help="statistics of the real images (default: OUTPUT/fd-cache)")
    group.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="ddpm takes as many forwards as steps")
    group.add_argument(
        "--sample-steps", type=positive_int, metavar="N",
        help="of --diffusion-steps; default: ddim 50 or the next fewer that divide them, ddpm all (then slow)",
    )  # fmt: skip
    group.add_argument("--sample-seed", type=natural_int, default=0, help="of the noise; the same in all arms (0)")
    group.add_argument("--validation-batch-size", type=positive_int, default=256, metavar="N", help="per process (256)")

    parser.set_defaults(
        model_ema=True,
        model_ema_decay=0.999,
        model_ema_warmup=True,
        opt="adam",
        lr_base=None,
        weight_decay=0.0,
        sched="constant",
    )
    parser.set_defaults(switch_split="0", kd_temperature=[1.0])
    return parser


def resolve(args) -> None:
    """Fill in defaults that depend on other options."""
    defaults = DIGITS_DEFAULTS if args.dataset == "digits" else {"img_size": 32, "in_chans": 3, "hflip": 0.5}
    for option, value in defaults.items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    args.name = args.name or run_name(args)
    if args.teacher:
        args.kd_warmup, args.kd_hold, args.kd_decay = kd_window(args, args.updates)
    args.fd_cache = args.fd_cache or str(Path(args.output) / "fd-cache")
    steps = args.diffusion_steps
    even = max(n for n in range(1, min(args.sample_steps or 50, steps) + 1) if steps % n == 0)
    args.sample_steps = args.sample_steps or (even if args.sampler == "ddim" else steps)
    if args.decay_updates is None:
        args.decay_updates = 0.3 * args.updates
    args.decay_milestones = args.decay_milestones or [0.3 * args.updates, 0.6 * args.updates]
    if args.lr_base is None:
        args.lr, args.lr_base = 2e-4 if args.lr is None else args.lr, 0.1
    if args.fd_samples < 2:
        raise InputError(f"--fd-samples {args.fd_samples}: a Frechet distance needs at least two images")
    if args.sample_steps > steps:
        raise InputError(f"--sample-steps {args.sample_steps} exceeds --diffusion-steps {steps}")
    if args.sampler == "ddim" and steps % args.sample_steps:
        raise InputError(
            f"--sample-steps {args.sample_steps}: ddim's steps are all alike, so they must divide --diffusion-steps "
            f"{steps}; {even} do"
        )
    if args.min_snr == 0:
        raise InputError("--min-snr 0 would weigh every loss by 0; give more, e.g. 5, or leave it out")
    if set(args.kd_temperature) != {1.0}:
        raise InputError("--kd-temperature: the term on epsilon has no temperature; leave it at 1")
    if args.teacher_model or args.teacher_kwargs:
        raise InputError("--teacher-model and --teacher-kwargs: the teacher's folder says what it is; leave them out")
    if args.dry_run:
        args.sample_steps = min(args.sample_steps, 2)


def open_data(args, run: Run) -> PixelData:
    """The images of this run; args.yaml will say what `--cache auto` came to."""
    data = load_pixels(args, run.accelerator, cache=run.options["cache"])
    run.options["cache"] = data.cache
    return data


def build_student(args, num_classes: int, process: DDPMScheduler) -> nn.Module:
    """The denoiser of this run, from --initial-checkpoint where given."""
    classes = num_classes if args.class_cond else None
    student = build_denoiser(args.model, args.img_size, args.in_chans, classes, args.model_kwargs)
    if args.initial_checkpoint:
        model, others, folder = load_denoiser(args.initial_checkpoint)
        check_same(student, process, model, others, str(folder))
        try:
            student.load_state_dict(model.state_dict())
        except RuntimeError as error:
            reason = on_one_line(error, limit=200)
            raise InputError(f"--initial-checkpoint {args.initial_checkpoint} does not fit: {reason}") from None
    return student


def start_batches(args, job: Job, data: PixelData) -> Iterator:
    """The training batches from the job's next micro-batch on."""
    accum = args.grad_accum_steps
    return train_batches(data.train, args, job.run.accelerator, job.update * accum, job.plan.updates_per_epoch * accum)


def train(args, job: Job, stop: int, batches: Iterator, process: DDPMScheduler) -> None:
    """Train until `stop` updates are done, or a signal asks to end."""
    kd, accum = job.distillation, args.grad_accum_steps
    accelerator = job.run.accelerator
    for update in job.updates(stop):
        losses = torch.zeros(3, device=job.run.device)
        for micro in range(accum):
            images, labels = next(batches)
            labels = labels if args.class_cond else None
            noise, t = draw_noise(
                images,
                steps=args.diffusion_steps,
                key=(args.seed, update, micro),
                rank=accelerator.process_index,
                world=accelerator.num_processes,
            )
            x_t = process.add_noise(images, noise, t)
            if args.channels_last:
                x_t = x_t.contiguous(memory_format=torch.channels_last)

            with job.accumulating(last=micro == accum - 1):
                prediction = job.model(x_t, t, labels)
                task_loss = denoising_loss(process, prediction, images, noise, t, args.min_snr)
                kd_loss = task_loss.new_zeros(())
                loss = task_loss
                if kd.weight > 0:  # L = L_task + lambda(u) L_kd, teacher and student at the same x_t and t
                    kd_loss = mse_epsilon(as_epsilon(process, prediction, x_t, t), kd.teach(x_t, t, labels))
                    loss = task_loss + kd.weight * kd_loss
                accelerator.backward(loss / accum)
            losses += torch.stack([loss, task_loss, kd_loss]).detach() / accum
        job.step(losses)


def evaluate_only(args, run: Run, student: nn.Module, process: DDPMScheduler, judge: Judge) -> None:
    """--eval-only: print the distances of --initial-checkpoint or the run's own model."""
    if not args.initial_checkpoint:
        model, others, folder = load_denoiser(str(run.folder))
        check_same(student, process, model, others, str(folder))
        student = model.to(run.device)
    judge.measure_references(switch=False)
    metrics = judge.validate(student.eval())
    if run.is_main:
        print(json.dumps(metrics))


def build_teacher(args, run: Run, student: nn.Module, process: DDPMScheduler) -> DenoiserTeacher:
    """The frozen teacher, whose epsilon is that of the student's process."""
    model, others, folder = load_denoiser(args.teacher)
    check_same(student, process, model, others, f"--teacher {args.teacher}")
    return DenoiserTeacher(
        model, process=process, source=folder, accelerator=run.accelerator, channels_last=args.channels_last
    )


def score(judge: Judge, teacher: DenoiserTeacher, split: str) -> float:
    """The teacher's distance from the images of the reporting or the switch split."""
    judge.measure_references(switch=True)
    model = teacher.model
    return judge.validate(model)[judge.labels[0]] if split == "report" else judge.switch_distance(model)


def flops_of(args, student: nn.Module, kd: Distillation, batch: int) -> dict:
    """FLOPs of one update of the student and of the teacher's forward in it, counted on meta copies."""

    def count(model: nn.Module, train: bool) -> int:
        model = copy.deepcopy(model).to("meta").train(train)
        x = torch.empty(2, args.in_chans, args.img_size, args.img_size, device="meta")
        t = torch.empty(2, dtype=torch.long, device="meta")
        labels = t if args.class_cond else None
        return count_flops(lambda: model(x, t, labels).sum().backward() if train else model(x, t, labels)) * batch // 2

    return {
        "student_update": count(student, train=True),
        "teacher_forward": count(kd.teacher.model, train=False) if kd.needs_forward else 0,
    }


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_recipe(argv)
    resolve(args)
    phase = early_phase(args, length=args.updates, mode="min")
    process = noise_schedule(args.betas, args.diffusion_steps, args.prediction)
    run = Run(args, task="diffusion")

    # data, student, judge
    data = open_data(args, run)
    run.seed_all()
    student = build_student(args, data.num_classes, process).to(run.device)
    judge = Judge(args, run.accelerator, data, process, checkpoint=run.checkpoint)
    metric = judge.labels[0]
    targets = check_targets(args, metric=metric, low=0.0, high=math.inf)
    if args.eval_only:
        evaluate_only(args, run, student, process, judge)
        return

    # updates, optimiser, schedule
    plan = plan_updates(args, run, data.samples, updates=args.updates)
    lr = scaled_lr(args, plan.batch)
    optimizer, scheduler = build_optimizer(
        args, student, lr=lr, length=args.updates, updates_per_unit=1, unit="updates"
    )

    # the method: a frozen teacher, loaded only while its phase lasts and never prepared
    kd = start_distillation(
        args,
        run,
        plan,
        phase=phase,
        load=lambda: build_teacher(args, run, student, process),
        evaluate=lambda teacher, split: score(judge, teacher, split),
        report="report",
        switch="switch",
        metric=metric,
    )
    judge.measure_references(switch=kd.active)
    flops = run.state["flops"] if run.state else flops_of(args, student, kd, plan.batch)

    # memory format, compilation, precision, processes
    if args.channels_last:
        student = student.to(memory_format=torch.channels_last)
    ema = build_ema(args, student)
    if ema and (reached := ema.get_decay(args.updates)) < args.model_ema_decay:
        run.log(f"the EMA's warm-up ends this run at a decay of {reached:.4g}, not --model-ema-decay")
    if args.torchcompile:
        student.compile(backend=args.torchcompile)
        kd.compile(args.torchcompile)
    model, optimizer = run.accelerator.prepare(student, optimizer)

    job = Job(
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
        export=lambda module, folder: export(module, process, folder),
    )
    job.resume()
    job.describe(args.model, f"{args.opt} lr {lr:.4g} {args.sched}", data.sizes, targets, metric=metric)
    facts = {**job.facts(), "data": data.sizes, "features": judge.facts()}
    run.open(metric=metric, mode="min", targets=targets, reported=judge.labels, facts=facts)

    batches = start_batches(args, job, data)
    picture = run.folder / "samples.png" if run.keeps and run.is_main else None
    while job.update < plan.total:
        stop, evaluation_due = job.next_stop((job.update // args.eval_interval + 1) * args.eval_interval)
        train(args, job, stop, batches, process)
        with run.clock.paused():
            if evaluation_due and job.update == stop:
                evaluated = job.model_to_evaluate()
                metrics = judge.validate(evaluated, picture)
                if kd.active:  # the switch-off: nearer to the data than the teacher's samples?
                    kd.observe(judge.switch_distance(evaluated), update=job.update)
                job.evaluated(metrics)
                if picture:
                    log_picture(run.accelerator, "samples", picture, job.update)
            job.save()
    job.finish()


if __name__ == "__main__":
    call_main(main)
