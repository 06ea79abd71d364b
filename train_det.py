#!/usr/bin/env python
r"""Train an object detector, sooner with a weaker teacher's help.

One GPU or CPU      python train_det.py -c recipes/digits_det_w2s.yaml
One node, 8 GPUs    accelerate launch --config_file recipes/accelerate/one_node_8gpu.yaml train_det.py \
                        -c recipes/coco_retinanet_r50_w2s.yaml --data coco
Two nodes           accelerate launch --config_file recipes/accelerate/two_nodes.yaml --machine_rank 0|1 \
                        --main_process_ip HOST train_det.py -c RECIPE
Resume              the same command with --resume auto
Evaluate            python train_det.py --eval-only --initial-checkpoint RUN --data coco

Without --teacher this trains a baseline, which is also how a teacher is made. Schedule and losses are those of
torchvision's reference: SGD at 0.01 (RetinaNet) or 0.02 (Faster R-CNN) for 16 images, 1,000 updates of linear warm-up,
steps at epochs 16 and 22 of 26.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from timm.layers import convert_sync_batchnorm
from torch import nn

from w2s.detection.data import DetectionData, load_detection
from w2s.detection.digits import keep_digits
from w2s.detection.loading import DetectionSplit, eval_loader, train_batches
from w2s.detection.metric import NUMBERS, draw_predictions, gather, record, shared_numbers, write_detections
from w2s.detection.models import DETECTORS, TERMS, DetectorConfig, build_detector, export, load_detector, read_config
from w2s.detection.teacher import DetectorTeacher, load_detector_teacher
from w2s.detection.terms import distillation_terms
from w2s.distillation import Distillation
from w2s.engine.errors import InputError
from w2s.engine.main import call_main
from w2s.engine.optim import build_ema, build_optimizer, scaled_lr
from w2s.engine.options import (
    KeyValues,
    Parser,
    add_kd_options,
    add_optimizer_options,
    add_run_options,
    add_switch,
    add_training_options,
    add_weights_options,
    check_targets,
    natural_int,
    positive_int,
    run_name,
)
from w2s.engine.plan import count_flops, grid_point, plan_updates
from w2s.engine.run import Run
from w2s.engine.teaching import early_phase, kd_window, start_distillation
from w2s.engine.trackers import log_picture
from w2s.engine.training import Job
from w2s.images.models import find_model, load_weights

METRICS = NUMBERS[:6]
LR = {"retinanet": 0.01, "fasterrcnn": 0.02}  # of torchvision's reference, for a global batch of 16


def build_parser() -> Parser:
    """All options; shared groups come from w2s/engine/options.py."""
    parser = Parser(__doc__)
    add_run_options(parser)

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", metavar="FOLDER", help="COCO's layout (train2017/ val2017/ annotations/), digits_det, hfds/..."
    )
    group.add_argument("--train-images", metavar="DIR", help="in place of --data, with the three options below")
    group.add_argument("--train-json", metavar="FILE")
    group.add_argument("--val-images", metavar="DIR")
    group.add_argument("--val-json", metavar="FILE", help="reported on, decides nothing")
    group.add_argument("--train-split", default="train", metavar="NAME", help="of hfds/...")
    group.add_argument("--val-split", default="validation", metavar="NAME", help="of hfds/...")
    group.add_argument("--input-key", metavar="KEY", help="column of the image (image)")
    group.add_argument("--target-key", metavar="KEY", help="column of the objects (objects)")
    group.add_argument("--bbox-format", choices=["xywh", "xyxy"], default="xywh", help="of hfds/... (xywh)")
    add_switch(group, "--fix-boxes", "drop boxes without area and clip those that reach outside, instead of stopping")
    add_switch(group, "--keep-empty", "train on images without boxes, too")
    group.add_argument(
        "--check-images", type=int, default=2000, metavar="N", help="decode N a split first, spread evenly (-1: all)"
    )
    group.add_argument("-j", "--workers", type=natural_int, default=4, metavar="N", help="loader workers a process")

    group = parser.add_argument_group("model (timm backbone, torchvision detector)")
    group.add_argument("--detector", choices=list(DETECTORS), default="retinanet")
    group.add_argument("--model", default="resnet50", metavar="NAME", help="timm backbone")
    add_switch(group, "--pretrained-backbone", "start from timm's pretrained weights")
    group.add_argument("--initial-checkpoint", metavar="PATH", help="start from a run folder or a weights file")
    group.add_argument("--norm", metavar="KIND", help="frozen_bn (default if pretrained), bn (default if not) or gn")
    group.add_argument(
        "--trainable-layers", type=natural_int, metavar="N", help="last stages to train (3 if pretrained, else all)"
    )
    group.add_argument("--strides", type=positive_int, nargs="+", metavar="N", help="levels: 8 16 32, or 4 8 16 32")
    group.add_argument(
        "--extra-levels", type=natural_int, metavar="N", help="above them: 2 (RetinaNet), 1 (Faster R-CNN)"
    )
    group.add_argument("--anchor-scale", type=float, metavar="X", help="anchor side over stride: 4, or 8")
    group.add_argument("--fpn-channels", type=positive_int, default=256, metavar="N")
    group.add_argument("--min-size", type=positive_int, metavar="PX", help="images: shorter side (800)")
    group.add_argument("--max-size", type=positive_int, metavar="PX", help="and longer side at most (1333)")
    group.add_argument("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="timm's")
    group.add_argument(
        "--detector-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="torchvision's"
    )
    add_weights_options(group, compiled="the backbone")

    add_kd_options(
        parser, "a run folder, exported folder, or .safetensors/.pth file with its backbone as --teacher-model"
    )
    add_optimizer_options(parser)

    group = add_training_options(parser, epochs=26, batch_size=2)
    group.add_argument(
        "--switch-metric", choices=["AP50", "AP"], default="AP50", help="of --target, --teacher-score and switch-off"
    )
    add_switch(group, "--group-aspect", "batches of images of one aspect ratio (default)")

    group = parser.add_argument_group("augmentation (torchvision)")
    group.add_argument("--hflip", type=float, default=0.5)
    group.add_argument("--scale-jitter", type=positive_int, nargs=2, metavar="PX", help="shorter side from LOW to HIGH")
    group.add_argument("--lsj", type=positive_int, metavar="PX", help="large-scale jitter on a canvas of this size")
    add_switch(group, "--photometric", "distort colours, as SSD does")
    # torchvision's reference; see `resolve` and `reference_warmup` for the rest
    parser.set_defaults(group_aspect=True, opt="momentum", lr_base=None, lr_base_size=16, weight_decay=1e-4)
    parser.set_defaults(sched="multistep", decay_milestones=[16.0, 22.0], warmup_epochs=None, warmup_lr=None)
    return parser


def resolve(args) -> DetectorConfig:
    """Fill in defaults that depend on other options; returns the student's build, its classes still to come.

    Raises:
        InputError: options that exclude each other.
    """
    pretrained = args.pretrained_backbone
    if args.lr_base is None:
        args.lr_base = LR[args.detector]
    if args.opt == "momentum":  # torchvision's SGD, which decays biases and norms, too; timm would spare them
        args.opt_kwargs = {"filter_bias_and_bn": False, **args.opt_kwargs}
    args.norm = args.norm or ("frozen_bn" if pretrained else "bn")
    if args.trainable_layers is None and pretrained:
        args.trainable_layers = 3
    if not 0 <= args.hflip <= 1:
        raise InputError(f"--hflip {args.hflip:g}: a probability lies in [0, 1]")
    if args.lsj and args.scale_jitter:
        raise InputError("--lsj and --scale-jitter exclude each other")
    if args.scale_jitter and args.scale_jitter[0] > args.scale_jitter[1]:
        raise InputError(f"--scale-jitter takes LOW and HIGH, got {args.scale_jitter[0]} {args.scale_jitter[1]}")
    args.min_size = args.min_size or min(800, args.max_size or 800)
    args.max_size = args.max_size or max(1333, args.min_size)
    args.name = args.name or run_name(args)
    if args.teacher:
        args.kd_warmup, args.kd_hold, args.kd_decay = kd_window(args, args.epochs)
    config = DetectorConfig(
        detector=args.detector,
        backbone=args.model,
        classes=[],
        norm=args.norm,
        strides=args.strides or [],
        extra_levels=args.extra_levels,
        anchor_scale=args.anchor_scale,
        fpn_channels=args.fpn_channels,
        min_size=args.min_size,
        max_size=args.max_size,
        trainable_layers=args.trainable_layers,
        model_kwargs=args.model_kwargs,
        detector_kwargs=args.detector_kwargs,
    )
    args.strides, args.extra_levels, args.anchor_scale = config.strides, config.extra_levels, config.anchor_scale
    return config


def reference_warmup(args, lr: float, updates_per_epoch: int) -> dict[str, float]:
    """torchvision's warm-up where none is given: from lr / 1000, over 1,000 updates or the first epoch."""
    warmup = {}
    if args.warmup_epochs is None:
        warmup["warmup"] = min(1000, updates_per_epoch - 1) / updates_per_epoch
    if args.warmup_lr is None:
        warmup["warmup_lr"] = lr / 1000
    return warmup


def build_student(args, config: DetectorConfig) -> nn.Module:
    """The student, with the weights it starts from."""
    student = build_detector(config, args.pretrained_backbone)
    if args.initial_checkpoint:
        path = Path(args.initial_checkpoint)
        if path.is_dir():
            folder = find_model(str(path))
            read_config(folder)  # which refuses what is no detector in clearer words
            path = folder / "model.safetensors"
        load_weights(student, path)
    if args.lsj or args.scale_jitter:
        student.transform._skip_resize = True  # in training only: the jitter has sized the images
    return student


def train(args, job: Job, stop: int, batches: Iterator) -> None:
    """Train until `stop` updates are done, or a signal asks to end."""
    kd, accum = job.distillation, args.grad_accum_steps
    for _ in job.updates(stop):
        losses = torch.zeros(3 + len(job.terms), device=job.run.device)
        for micro in range(accum):
            images, targets = next(batches)

            with job.accumulating(last=micro == accum - 1):
                parts, seen = job.model(images, targets)  # torchvision's losses, and what the terms need
                task_loss = sum(parts.values())
                kd_parts = dict.fromkeys(TERMS[args.detector], task_loss.new_zeros(()))
                kd_loss = task_loss.new_zeros(())
                loss = task_loss
                if kd.weight > 0:  # L = L_task + lambda(u) L_kd(T(u)), on the batch as the student resized it
                    kd_parts = distillation_terms(seen, kd.teach(seen), kd.temperature)
                    kd_loss = sum(kd_parts.values())
                    loss = task_loss + kd.weight * kd_loss
                job.run.accelerator.backward(loss / accum)
            seen = None  # its activations would stay through the next forward
            losses += torch.stack([loss, task_loss, kd_loss, *parts.values(), *kd_parts.values()]).detach() / accum
        job.step(losses)


@torch.no_grad()
def validate(args, run: Run, model: Callable, split: DetectionSplit) -> tuple[dict[str, float], list]:
    """COCO's 12 numbers in percent over every image exactly once, whatever the processes; and all detections.

    `model` maps a list of images to detections: the student, its moving average, the teacher.
    """
    records = []
    for images, targets in eval_loader(split, args, run.accelerator):
        with run.accelerator.autocast():
            detections = model(send_to_device(images, run.device))
        records += record(detections, targets)
    found = gather(records, split)
    return shared_numbers(found, split, run.accelerator), found


def open_data(args, config: DetectorConfig) -> DetectionData:
    """The data, whose classes complete the config; not before it is certain that a model can be built of the rest.

    Raises:
        InputError: of either.
    """
    build_detector(dataclasses.replace(config, classes=["any"]))
    data = load_detection(args, DETECTORS[config.detector].first_label)
    config.classes = data.classes
    return data


def evaluate_only(args, run: Run, config: DetectorConfig, named: bool, sizes: dict[str, int]) -> None:
    """--eval-only: print the 12 numbers, write detections.json and predictions.png.

    They go into the run folder of a name that was given (`named`), or else beside the model. An exported model sees
    images of its own size but for the `sizes` that the command line itself names.
    """
    path = Path(args.initial_checkpoint or run.folder)
    folder = run.folder if named else path.parent if path.is_file() else path
    if path.is_file():
        data = open_data(args, config)
        model = build_student(args, config)
    else:
        model, _ = load_detector(str(path), **sizes)
        data = load_detection(args, model.first_label)
        if model.config.classes != data.classes:
            raise InputError(
                f"{path} has {len(model.config.classes)} classes, which are not the {len(data.classes)} of the data"
            )
    numbers, found = validate(args, run, model.to(run.device).eval(), data.report)
    if run.is_main:
        print(json.dumps(numbers), flush=True)
        write_detections(folder / "detections.json", found, data.report)
        draw_predictions(folder / "predictions.png", found, data.report)


def build_teacher(args, run: Run, student: nn.Module) -> DetectorTeacher:
    """The frozen teacher, anchor by anchor in line with the student."""
    model, source = load_detector_teacher(args.teacher, args.teacher_model, args.teacher_kwargs, student.config)
    return DetectorTeacher(
        model, source=source, accelerator=run.accelerator, student=student, channels_last=args.channels_last
    )


def flops_of(student: nn.Module, kd: Distillation, data: DetectionData, batch: int) -> dict:
    """FLOPs of one update of the student and of the teacher's forward in it, counted on two training images."""
    device = next(student.parameters()).device
    items = data.train.__getitems__([(0, position) for position in range(min(2, len(data.train)))])
    model, seen = copy.deepcopy(student).train(), []

    def update() -> None:
        losses, outputs = model(*send_to_device(tuple(map(list, zip(*items, strict=True))), device))
        sum(losses.values()).backward()
        seen.append(outputs)

    return {
        "student_update": count_flops(update) * batch // len(items),
        "teacher_forward": count_flops(lambda: kd.teacher(seen[0])) * batch // len(items) if kd.needs_forward else 0,
    }


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_recipe(argv)
    named = bool(args.name)
    config = resolve(args)
    metric = args.switch_metric
    targets = check_targets(args, metric=metric, low=0.0, high=100.0)
    phase = early_phase(args, length=args.epochs, mode="max")
    run = Run(args, task="det")
    if args.eval_only:
        typed = vars(parser.parse_args(argv))  # a recipe's sizes are those of a training
        sizes = {name: typed[name] for name in ("min_size", "max_size") if typed[name]}
        evaluate_only(args, run, config, named=named, sizes=sizes)
        return

    # data and student
    data = open_data(args, config)
    run.seed_all()
    student = build_student(args, config).to(run.device)

    # updates, optimiser, schedule
    plan = plan_updates(args, run, len(data.train), epochs=args.epochs)
    lr = scaled_lr(args, plan.batch)
    optimizer, scheduler = build_optimizer(
        args,
        student,
        lr=lr,
        length=args.epochs,
        updates_per_unit=plan.updates_per_epoch,
        **reference_warmup(args, lr, plan.updates_per_epoch),
    )

    # the method: a frozen teacher, loaded only while its phase lasts and never prepared
    kd = start_distillation(
        args,
        run,
        plan,
        phase=phase,
        load=lambda: build_teacher(args, run, student),
        evaluate=lambda teacher, split: validate(args, run, teacher, split)[0][metric],
        report=data.report,
        switch=data.switch,
        metric=metric,
        # roughly: as that of a share of the images
        standard_error=lambda score: math.sqrt(max(score, 0) * (100 - score) / data.sizes["switch"]),
    )
    flops = run.state["flops"] if run.state else flops_of(student, kd, data, plan.batch)

    # memory format, compilation, precision, processes
    if args.sync_bn:
        student = convert_sync_batchnorm(student)
    if args.channels_last:
        student = student.to(memory_format=torch.channels_last)
        student.backbone.memory_format = torch.channels_last
    ema = build_ema(args, student)
    if args.torchcompile:
        student.backbone.compile(backend=args.torchcompile)
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
        export=export,
        terms=(*student.losses, *(f"kd_{name}" for name in TERMS[args.detector])),
    )
    job.resume()
    name = f"{args.detector} {args.model}"
    job.describe(name, f"{args.opt} lr {lr:.4g} {args.sched}", data.sizes, targets, metric=metric)
    facts = {**job.facts(), "data": data.sizes}
    run.open(metric=metric, mode="max", targets=targets, reported=(*METRICS, *job.terms), facts=facts)
    if run.keeps and run.is_main:
        keep_digits(Path(args.output) / "digits_det")

    accum = args.grad_accum_steps
    batches = train_batches(data.train, args, run.accelerator, job.update * accum, plan.updates_per_epoch * accum)
    while job.update < plan.total:
        stop, evaluation_due = job.next_stop(grid_point(job.update, plan.updates_per_epoch, args.evals_per_epoch))
        train(args, job, stop, batches)
        with run.clock.paused():
            if evaluation_due and job.update == stop:
                evaluated = job.model_to_evaluate()
                numbers, found = validate(args, run, evaluated, data.report)
                if kd.active:  # the switch-off: better than the teacher on the switch split?
                    kd.observe(validate(args, run, evaluated, data.switch)[0][metric], update=job.update)
                job.evaluated({name: numbers[name] for name in METRICS})
                if run.keeps and run.is_main:
                    draw_predictions(run.folder / "predictions.png", found, data.report)
                    log_picture(run.accelerator, "predictions", run.folder / "predictions.png", job.update)
            job.save()
    job.finish()


if __name__ == "__main__":
    call_main(main)
