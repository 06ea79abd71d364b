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
from accelerate.utils import broadcast
from diffusers import DDPMScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from w2s.controls import Control, make_control, untrain
from w2s.diffusion.data import PixelData, Reference, load_pixels, save_grid
from w2s.diffusion.denoisers import build_denoiser, check_same, export, load_denoiser, rebuild
from w2s.diffusion.frechet import (
    Statistics,
    cached_statistics,
    frechet_distance,
    kernel_distance,
    load_features,
    measure,
    metric_labels,
)
from w2s.diffusion.process import (
    BETAS,
    PREDICTIONS,
    SAMPLERS,
    as_epsilon,
    denoising_loss,
    draw_noise,
    generate,
    noise_schedule,
)
from w2s.distillation import score_teacher
from w2s.engine.errors import InputError
from w2s.engine.files import check_writable
from w2s.engine.optim import build_optimizer, scaled_lr
from w2s.engine.options import (
    KeyValues,
    Parser,
    add_data_options,
    add_kd_options,
    add_optimizer_options,
    add_run_options,
    add_switch,
    backend,
    early_phase,
    natural_int,
    not_negative,
    parse_targets,
    positive_int,
    probability,
    share,
)
from w2s.engine.randomness import mix_seed
from w2s.engine.run import Run, call_main
from w2s.engine.trackers import log_picture
from w2s.engine.training import Job, count_flops, wide
from w2s.images.loading import train_batches
from w2s.losses import mse_epsilon
from w2s.record import RunRecord
from w2s.teacher import Teacher

DIGITS_DEFAULTS = {"img_size": 8, "in_chans": 1, "hflip": 0.0}


def build_parser() -> Parser:
    """All options; shared groups come from w2s.engine.options."""
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
    add_switch(group, "--model-ema", "evaluate, compare and export the moving average of the weights (on)")
    group.add_argument("--model-ema-decay", type=share, default=0.999, metavar="D", help="(0.999)")
    add_switch(
        group, "--model-ema-warmup",
        "at most 1 - n^(-2/3) after n updates (on): 0.99 from 1,000 updates on, 0.999 from 31,600, 0.9999 from 1 M",
    )  # fmt: skip
    add_switch(group, "--channels-last", "NHWC memory format (default)", default=True)
    group.add_argument("--torchcompile", type=backend, nargs="?", const="inductor", metavar="BACKEND")

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
        model_ema=True, model_ema_warmup=True, opt="adam", lr_base=None, weight_decay=0.0, sched="constant"
    )
    parser.set_defaults(switch_split="0", kd_temperature=[1.0])
    return parser


def resolve(args) -> None:
    """Fill in defaults that depend on other options."""
    defaults = DIGITS_DEFAULTS if args.dataset == "digits" else {"img_size": 32, "in_chans": 3, "hflip": 0.5}
    for option, value in defaults.items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    args.name = args.name or f"{Path(args.config).stem if args.config else args.model}-seed{args.seed}"
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
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"--initial-checkpoint {args.initial_checkpoint} does not fit: {reason}") from None
    return student


def train(job: Job, stop: int, batches: Iterator, process: DDPMScheduler, control: Control | None = None) -> None:
    """Train until `stop` updates are done, or a signal asks to end."""
    args, accum = job.run.args, job.run.args.grad_accum_steps
    place = job.run.accelerator.process_index, job.run.accelerator.num_processes
    for update in job.updates(stop):
        losses = torch.zeros(3, device=job.run.device)
        for micro in range(accum):
            images, labels = next(batches)
            labels = labels if args.class_cond else None
            noise, t = draw_noise(images, args.diffusion_steps, (args.seed, update, micro), *place)
            x_t = process.add_noise(images, noise, t)
            if args.channels_last:
                x_t = x_t.contiguous(memory_format=torch.channels_last)

            with job.accumulating(last=micro == accum - 1):
                prediction = job.model(x_t, t, labels)
                task_loss = denoising_loss(process, prediction, images, noise, t, args.min_snr)
                kd_loss = task_loss.new_zeros(())
                loss = task_loss
                if job.kd_weight > 0:  # L = L_task + lambda(u) L_kd, teacher and student at the same x_t and t
                    pair = prediction, job.teacher(x_t, t, labels)
                    epsilon, taught = (as_epsilon(process, output, x_t, t) for output in pair)
                    if control:  # --kd-control
                        taught = control.shuffle(taught, (update, micro))
                    kd_loss = mse_epsilon(epsilon, taught)
                    loss = task_loss + job.kd_weight * kd_loss
                job.run.accelerator.backward(loss / accum)
            losses += torch.stack([loss, task_loss, kd_loss]).detach() / accum
        job.step(*losses)


class Judge:
    """Samples from a denoiser and measures their distance from real images, the same way for everyone.

    The statistics of the real images take long and are made by `measure_references`, once all input is checked.
    """

    def __init__(self, args, run: Run, data: PixelData, process: DDPMScheduler) -> None:
        self.args, self.accelerator, self.process, self.data = args, run.accelerator, process, data
        self.folder = None if args.dry_run else Path(args.fd_cache)
        if self.folder:
            check_writable(self.folder, "--fd-cache")
        self.count = min(args.fd_samples, 8) if args.dry_run else args.fd_samples
        self.classes = data.num_classes if args.class_cond else None
        self.features = load_features(args.fd_features, args.fid_weights, args.in_chans).to(run.device)
        self.labels = metric_labels(self.features, args.fd_samples)
        if run.state and (there := features_of(run.checkpoint)) not in (None, self.features.digest):
            raise InputError(f"the run was judged on features {there}, these are {self.features.digest}: keep to those")

    def measure_references(self, switch: bool) -> None:
        """The statistics of the images to compare with; of those for the switch-off only where asked for."""
        self.report = self._reference(self.data.report)
        if switch:
            same = self.data.switch.key == self.data.report.key
            self.switch = self.report if same else self._reference(self.data.switch)

    def _reference(self, images: Reference) -> Statistics:
        key = {**images.key, "features": self.features.digest}
        return cached_statistics(self.folder, key, lambda: self._statistics(images, len(images)), self.accelerator)

    def _statistics(self, images, count: int) -> Statistics:
        return measure(self.features, images, count, self.accelerator, self.args.validation_batch_size)

    def samples(self, model: nn.Module, stream: int) -> Tensor | None:
        """--fd-samples images (8 in a dry run); a stream's noise is the same at every evaluation and in all arms."""
        args = self.args
        return generate(
            *(model, self.process, self.count, mix_seed(args.sample_seed, stream), self.accelerator),
            *((args.in_chans, args.img_size, args.img_size), args.sampler, args.sample_steps),
            *(args.validation_batch_size, self.classes),
        )

    def validate(self, model: nn.Module, picture: Path | None = None) -> dict[str, float]:
        """The reported distances; a grid of samples goes to `picture`."""
        images = self.samples(model, 0)
        if picture and images is not None:
            save_grid(images, picture)
        values = self._distances(images, self.report, frechet_distance, kernel_distance)
        return dict(zip(self.labels, values, strict=True))

    def switch_distance(self, model: nn.Module) -> float:
        """The distance that decides on the switch-off: other noise than the reported one's."""
        return self._distances(self.samples(model, 1), self.switch, frechet_distance)[0]

    def _distances(self, images: Tensor | None, reference: Statistics, *measures) -> list[float]:
        """NaN where there are no images. The first process measures: what all decide on must be one number."""
        values = torch.full((len(measures),), math.nan, dtype=wide(self.accelerator.device))
        if images is not None:
            statistics = self._statistics(images, len(images))
            if self.accelerator.is_main_process:
                values = values.new_tensor([measure(statistics, reference) for measure in measures])
        return broadcast(values.to(self.accelerator.device)).tolist()


def features_of(checkpoint: Path) -> str | None:
    """The digest of the features that judged the run of a checkpoint, None where it is not known."""
    try:
        summary = json.loads((checkpoint.resolve().parent.parent / "summary.json").read_text())
        return summary["features"]["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def set_up_teacher(args, run: Run, student: nn.Module, process: DDPMScheduler) -> Teacher:
    """The frozen teacher, whose epsilon is that of the student's process."""
    model, teachers, folder = load_denoiser(args.teacher)
    check_same(student, process, model, teachers, f"--teacher {args.teacher}")
    return Teacher(model, model.name, str(folder), run.accelerator, args.channels_last)


def flops_of(student: nn.Module, teacher: Teacher | None, args, images: int) -> dict:
    """FLOPs of one update of the student and of the teacher's forward in it, counted on meta copies."""

    def count(model: nn.Module, train: bool) -> int:
        model = copy.deepcopy(model).to("meta").train(train)
        x = torch.empty(2, args.in_chans, args.img_size, args.img_size, device="meta")
        t = torch.empty(2, dtype=torch.long, device="meta")
        labels = t if args.class_cond else None
        return count_flops(lambda: model(x, t, labels).sum().backward() if train else model(x, t, labels)) * images // 2

    return {
        "student_update": count(student, True),
        "teacher_forward": count(teacher.model, False) if teacher else 0,
    }


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_recipe(argv)
    resolve(args)
    phase = early_phase(args, args.updates, "min") if args.teacher else None
    process = noise_schedule(args.betas, args.diffusion_steps, args.prediction)
    run = Run(args, "diffusion")
    accelerator = run.accelerator
    control = make_control(args, accelerator.process_index)

    # data and student
    data = load_pixels(args, accelerator)
    run.seed()
    student = build_student(args, data.num_classes, process).to(run.device)
    judge = Judge(args, run, data, process)
    metric = judge.labels[0]
    targets = parse_targets(args.target, metric, 0.0, math.inf)
    if args.teacher_score is not None:
        parse_targets([str(args.teacher_score)], metric, 0.0, math.inf, option="--teacher-score")
    if args.eval_only:
        if not args.initial_checkpoint:
            model, others, folder = load_denoiser(str(run.folder))
            check_same(student, process, model, others, str(folder))
            student = model.to(run.device)
        judge.measure_references(switch=False)
        metrics = judge.validate(student.eval())
        if run.is_main:
            print(json.dumps(metrics))
        return

    # updates, optimiser, schedule
    images = args.batch_size * args.grad_accum_steps * accelerator.num_processes
    updates_per_epoch = data.samples // images
    if updates_per_epoch == 0:
        raise InputError(f"{data.samples} training images are fewer than one update of {images}: lower --batch-size")
    lr = scaled_lr(args, images)
    optimizer, scheduler = build_optimizer(args, student, lr, args.updates, 1, unit="updates")

    # teacher: loaded only while its phase lasts, never prepared
    teacher, teacher_facts = None, run.state and run.state["teacher"]
    if phase and run.state:
        phase.load_state_dict(run.state["phase"])
    if phase and phase.active:
        teacher = set_up_teacher(args, run, student, process)
    judge.measure_references(switch=teacher is not None)
    if teacher:
        teacher_facts = teacher_facts or score_teacher(
            *(teacher, run, metric),
            report=lambda: judge.validate(teacher)[metric],
            switch=lambda: judge.switch_distance(teacher),
            mode="min",
        )
        if args.kd_control == "random":
            untrain(teacher, lambda: rebuild(teacher.model), args.seed)
    flops = run.state["flops"] if run.state else flops_of(student, teacher, args, images)

    # precision, processes, compilation
    if args.channels_last:
        student = student.to(memory_format=torch.channels_last)
    ema = ModelEmaV3(student, args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
    if ema and (reached := ema.get_decay(args.updates)) < args.model_ema_decay:
        run.log(f"the EMA's warm-up ends this run at a decay of {reached:.4g}, not --model-ema-decay")
    if args.torchcompile:
        student.compile(backend=args.torchcompile)
        if teacher:
            teacher.model.compile(backend=args.torchcompile)
    model, optimizer = accelerator.prepare(student, optimizer)

    total = min(3, args.updates) if args.dry_run else args.updates
    job = Job(
        *(run, model, student, ema, optimizer, scheduler, phase, teacher, teacher_facts, flops),
        *(updates_per_epoch, total, images, lambda module, folder: export(module, process, folder)),
        unit="update",
    )
    job.resume()
    job.describe(args.model, data.facts, targets, metric, lr)
    run.open(
        lambda folder, facts, log: RunRecord(folder, metric, "min", targets, judge.labels, facts, log),
        teacher=teacher_facts,
        kd_off=job.kd_off,
        flops=flops,
        params=sum(p.numel() for p in student.parameters()),
        data=data.facts,
        weights="ema" if ema else "raw",
        features={"name": judge.features.name, "digest": judge.features.digest, "samples": args.fd_samples},
    )
    accum = args.grad_accum_steps
    batches = train_batches(data.train, args, accelerator, job.update * accum, updates_per_epoch * accum)
    picture = run.folder / "samples.png" if run.keeps and run.is_main else None
    while job.update < total:
        stop, evaluation_due = job.next_stop((job.update // args.eval_interval + 1) * args.eval_interval)
        train(job, stop, batches, process, control)
        with run.clock.paused():
            if evaluation_due and job.update == stop:
                metrics = judge.validate(job.evaluated_model.eval(), picture)
                switch = judge.switch_distance(job.evaluated_model) if job.teacher else None
                job.evaluated(metrics, switch)
                if picture:
                    log_picture(accelerator, "samples", picture, job.update)
            job.save()
    job.finish()


if __name__ == "__main__":
    call_main(main)
