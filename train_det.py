#!/usr/bin/env python
r"""Train an object detector, sooner with a weaker teacher's help.

One GPU or CPU  python train_det.py -c recipes/digits_det_w2s.yaml
Two on a CPU    accelerate launch --config_file \
                    recipes/accelerate/cpu_two.yaml train_det.py -c RECIPE
8 GPUs          accelerate launch --config_file \
                    recipes/accelerate/one_node_8gpu.yaml train_det.py \
                    -c recipes/coco_retinanet_r50_w2s.yaml --data coco
Two nodes       accelerate launch --machine_rank 0|1 --main_process_ip HOST \
                    --config_file recipes/accelerate/two_nodes.yaml \
                    train_det.py -c RECIPE
Resume          any of these with --resume auto
Evaluate        any of these with --eval-only

Without --teacher this trains a baseline, which is also how a teacher is made.
Schedule and losses are those of torchvision's reference: SGD at 0.01
(RetinaNet) or 0.02 (Faster R-CNN) for 16 images, 1,000 updates of linear
warm-up, steps at epochs 16 and 22 of 26.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from timm.scheduler.scheduler import Scheduler
from torch import nn

from w2s.detection.config import DETECTOR_KINDS, DetectorConfig, check_classes
from w2s.detection.data import DetectionData
from w2s.detection.digits import keep_digits
from w2s.detection.flops import detection_flops
from w2s.detection.loading import DetectionSplit, eval_loader, train_batches
from w2s.detection.metric import COCO_METRICS, detection_rows, draw_predictions, score_detections, write_detections
from w2s.detection.models import (
    build_detector,
    check_buildable,
    export_detector,
    load_detector,
    load_detector_weights,
    prepare_layout,
)
from w2s.detection.options import (
    add_detection_augmentation_options,
    add_detection_data_options,
    add_detection_optimizer_options,
    add_detection_training_options,
    add_detector_options,
    check_augmentation,
    detector_config,
    open_report,
    open_training_data,
    reference_warmup,
)
from w2s.detection.teacher import DetectorTeacher, build_detector_teacher
from w2s.detection.terms import compared_loss, distillation_terms
from w2s.distillation import Distillation
from w2s.engine.evaluation import parse_options
from w2s.engine.main import call_main
from w2s.engine.optim import build_optimizer, scaled_lr
from w2s.engine.options import add_kd_options, add_run_options, run_name
from w2s.engine.parsing import Parser
from w2s.engine.plan import Plan, grid_point, plan_updates
from w2s.engine.prepare import prepare_job
from w2s.engine.run import Run
from w2s.engine.targets import check_targets
from w2s.engine.teaching import early_phase, kd_window, start_distillation
from w2s.engine.trackers import log_picture
from w2s.engine.training import Job

METRICS = COCO_METRICS[:6]  # which a training reports
COMMON_OPTIONS = (  # --help begins with these
    *("data", "detector", "model", "pretrained_backbone", "epochs", "batch_size", "lr", "teacher", "target", "resume"),
)


def build_parser() -> Parser:
    """The options of detection stand in w2s/detection/options.py, those of all tasks in w2s/engine/options.py."""
    parser = Parser(__doc__, COMMON_OPTIONS)
    add_run_options(parser)
    add_detection_data_options(parser)
    add_detector_options(parser)
    add_kd_options(parser, "a run folder, a weights file with its backbone as --teacher-model, or torchvision/NAME")
    add_detection_optimizer_options(parser)
    add_detection_training_options(parser)
    add_detection_augmentation_options(parser)
    return parser


def resolve(args) -> DetectorConfig:
    """Fill in defaults that depend on other options; returns the student's config, still without its classes.

    Raises:
        InputError: an impossible value, or options that exclude each other.
    """
    if args.lr_base is None:
        args.lr_base = DETECTOR_KINDS[args.detector].lr
    if args.opt == "momentum":  # torchvision's SGD, which decays biases and norms, too; timm would spare them
        args.opt_kwargs = {"filter_bias_and_bn": False, **args.opt_kwargs}
    args.norm = args.norm or ("frozen_bn" if args.pretrained_backbone else "bn")
    if args.trainable_layers is None and args.pretrained_backbone:
        args.trainable_layers = 3
    check_augmentation(args)
    args.min_size = args.min_size or min(800, args.max_size or 800)
    args.max_size = args.max_size or max(1333, args.min_size)
    args.name = args.name or run_name(args)
    if args.teacher:
        args.kd_warmup, args.kd_hold, args.kd_decay = kd_window(args, args.epochs)
    config = detector_config(args)
    args.strides, args.extra_levels, args.anchor_scale = config.strides, config.extra_levels, config.anchor_scale
    return config


def build_student(args, config: DetectorConfig, classes: list[str]) -> nn.Module:
    """The student for data of these classes, with the weights it starts from."""
    student = build_detector(dataclasses.replace(config, classes=classes), args.pretrained_backbone)
    if args.initial_checkpoint:
        load_detector_weights(student, args.initial_checkpoint)
    if args.lsj or args.scale_jitter:
        student.transform._skip_resize = True  # in training only: the jitter has sized the images
    return student


def build_teacher(args, run: Run, spec: str, student: nn.Module) -> DetectorTeacher:
    """The frozen teacher of a name in --teacher, in line with the student anchor by anchor."""
    return build_detector_teacher(
        spec,
        backbone=args.teacher_model,
        model_kwargs=args.teacher_kwargs,
        student=student,
        map_file=args.teacher_classes,
        channels_last=args.channels_last,
        **run.placement,
    )


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
) -> Job:
    """The student ready for training, in its memory format."""
    student = prepare_layout(student, channels_last=args.channels_last, sync_bn=args.sync_bn)
    return prepare_job(
        args,
        run,
        plan,
        kd,
        student=student,
        compiled=student.backbone,
        optimizer=optimizer,
        scheduler=scheduler,
        flops=flops,
        export=export_detector,
        terms=student.config.kind.loss_columns,
    )


def train(args, job: Job, stop: int, batches: Iterator) -> None:
    """Train until `stop` updates are done, or a signal asks to end."""
    kd, accelerator, term_names = job.distillation, job.run.accelerator, DETECTOR_KINDS[args.detector].terms
    for _ in job.updates(stop):
        losses = torch.zeros(3 + len(job.terms), device=job.run.device)
        for _ in job.micro_batches():
            images, targets = next(batches)
            with job.accumulating():
                task_terms, view = job.model(images, targets)  # torchvision's losses, and what the teacher needs
                task_loss = sum(task_terms.values())
                loss, kd_loss = task_loss, torch.zeros_like(task_loss)
                kd_terms = dict.fromkeys(term_names, kd_loss)
                if kd.weight > 0:  # L = L_task + lambda(u) L_kd(T(u)), on the batch as the student resized it
                    taught = kd.teach(view)
                    kd_terms = distillation_terms(view, taught, kd.temperature, kd.teacher.known)
                    kd.compare(compared_loss, view.outputs, taught, view, job.student)  # for --kd-off running
                    kd_loss = sum(kd_terms.values())
                    kd.balance(task_loss, kd_loss, outputs=view.heads)  # ratio and scale are 1 without --kd-balance
                    loss = kd.scale * (task_loss + kd.weight * kd.ratio * kd_loss)
                accelerator.backward(loss / job.accum)
            view = None  # frees the activations that it holds before the next forward
            values = torch.stack([loss, task_loss, kd_loss, *task_terms.values(), *kd_terms.values()])
            losses += values.detach() / job.accum
        job.step(losses)


@torch.no_grad()
def validate(args, run: Run, model: Callable, split: DetectionSplit) -> tuple[dict[str, float], list]:
    """COCO's 12 metrics in percent over every image exactly once, whatever the processes; and all detections.

    `model` maps a list of images to detections: the student, its moving average, the teacher.
    """
    rows = []
    batch_size = args.validation_batch_size or args.batch_size
    loader = eval_loader(split, run.accelerator, batch_size=batch_size, workers=args.workers)
    for images, targets in run.stopping.polled(loader):
        with run.accelerator.autocast():
            detections = model(send_to_device(images, run.device))
        rows += detection_rows(detections, targets)
    run.stopping.end_evaluation()
    return score_detections(rows, split, run.accelerator)


def evaluate(args, job: Job, data: DetectionData) -> None:
    """Report on the student and, while the teacher is active, compare the two on the switch split."""
    run, kd, evaluated = job.run, job.distillation, job.model_to_evaluate()
    metrics, detections = validate(args, run, evaluated, data.report)
    if kd.active:
        switch = validate(args, run, evaluated, data.switch)[0][args.switch_metric] if kd.needs_split else None
        kd.observe(switch, update=job.update)
    job.evaluated({name: metrics[name] for name in METRICS})
    if run.keeps and run.is_main:
        draw_predictions(run.folder / "predictions.png", detections, data.report)
        log_picture(run.accelerator, "predictions", run.folder / "predictions.png", job.update)


def evaluate_only(args, run: Run, config: DetectorConfig, *, named: bool, sizes: dict[str, int]) -> None:
    """--eval-only: print the 12 metrics, write detections.json and predictions.png.

    They go into the run folder if the run was `named`, and otherwise beside the model. An exported model gets images of
    its own size, except for the `sizes` that are asked for.
    """
    path = Path(args.initial_checkpoint)
    if path.is_file():
        check_buildable(config)
        report = open_report(args, config.kind.first_label)
        model = build_student(args, config, report.source.classes)
    else:
        model, _ = load_detector(str(path), **sizes)
        report = open_report(args, model.first_label)
        check_classes(model.config, report.source.classes, source=path)
    metrics, detections = validate(args, run, model.to(run.device).eval(), report)
    if run.is_main:
        print(json.dumps(metrics), flush=True)
        folder = run.folder if named else path.parent if path.is_file() else path
        write_detections(folder / "detections.json", detections, report)
        draw_predictions(folder / "predictions.png", detections, report)


def fit(args, job: Job, data: DetectionData) -> None:
    """Train until the run is complete; evaluate and save on the way."""
    plan = job.plan
    batches = train_batches(
        data.train,
        job.run.accelerator,
        batch_size=args.batch_size,
        batches_per_epoch=plan.updates_per_epoch * job.accum,
        micro_batches=job.accum,
        start=job.update * job.accum,
        seed=args.seed,
        workers=args.workers,
        group_aspect=args.group_aspect,
    )
    while not job.done:
        stop = job.next_stop(grid_point(job.update, plan.updates_per_epoch, args.evals_per_epoch))
        train(args, job, stop, batches)
        with job.saved() as evaluation_due:
            if evaluation_due:
                evaluate(args, job, data)


def main(argv: list[str] | None = None) -> None:
    args = parse_options(build_parser(), argv)
    named, sizes = bool(args.name), {name: getattr(args, name) for name in ("min_size", "max_size")}
    config = resolve(args)
    metric = args.switch_metric
    targets = check_targets(args, metric=metric, low=0.0, high=100.0)
    phase = early_phase(args, length=args.epochs, mode="max", running="min")
    run = Run(args, task="det")
    if args.eval_only:
        evaluate_only(args, run, config, named=named, sizes={name: size for name, size in sizes.items() if size})
        return

    # data and student; the config is checked before the data, which may take minutes to read
    check_buildable(config)
    data = open_training_data(args, config.kind.first_label)
    run.seed_all()
    student = build_student(args, config, data.classes).to(run.student_device)

    # updates, optimiser and schedule
    plan = plan_updates(args, run, len(data.train), epochs=args.epochs)
    lr = scaled_lr(args, plan.batch)
    optimizer, scheduler = build_optimizer(
        args,
        student,
        lr=lr,
        length=args.epochs,
        updates_per_unit=plan.updates_per_epoch,
        fused=run.fuses,
        **reference_warmup(args, lr, plan.updates_per_epoch),
    )

    # the method: a frozen teacher, loaded only while its phase lasts and never prepared by the accelerator
    kd = start_distillation(
        args,
        run,
        plan,
        phase=phase,
        load=lambda spec: build_teacher(args, run, spec, student),
        count_flops=lambda teacher: detection_flops(student, teacher, data.train, batch=plan.batch)["teacher_forward"],
        evaluate=lambda model, split: validate(args, run, model, split)[0][metric],
        report=data.report,
        switch=data.switch,
        metric=metric,
        switch_images=data.sizes["switch"],
    )
    flops = run.state["flops"] if run.state else detection_flops(student, kd.teacher, data.train, batch=plan.batch)

    # the run
    job = build_job(args, run, plan, kd, student=student, optimizer=optimizer, scheduler=scheduler, flops=flops)
    job.resume()
    model_name, optimizer_name = f"{args.detector} {args.model}", f"{args.opt} lr {lr:.4g} {args.sched}"
    job.describe(model_name, optimizer_name, data.sizes, targets, metric=metric)
    reported, facts = (*METRICS, *job.terms), {**job.facts(), "data": data.sizes}
    run.open(metric=metric, mode="max", targets=targets, reported=reported, facts=facts)
    if run.keeps and run.is_main:
        keep_digits(Path(args.output) / "digits_det")
    fit(args, job, data)
    job.finish()


if __name__ == "__main__":
    call_main(main)
