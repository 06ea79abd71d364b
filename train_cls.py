#!/usr/bin/env python
r"""Train an image classifier, sooner with a weaker teacher's help.

One GPU or CPU  python train_cls.py -c recipes/quickstart_w2s.yaml
One GPU, bf16   accelerate launch --mixed_precision bf16 train_cls.py \
                    -c recipes/cifar10_r50_w2s.yaml
Two on a CPU    accelerate launch --config_file \
                    recipes/accelerate/cpu_two.yaml train_cls.py -c RECIPE
8 GPUs          accelerate launch --config_file \
                    recipes/accelerate/one_node_8gpu.yaml train_cls.py -c RECIPE
Two nodes       accelerate launch --machine_rank 0|1 --main_process_ip HOST \
                    --config_file recipes/accelerate/two_nodes.yaml \
                    train_cls.py -c RECIPE
Resume          the same command with --resume auto
Evaluate        the same command with --eval-only

Without --teacher this trains a baseline, which is also how a teacher is made.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.utils.data import Dataset

from w2s.engine.errors import InputError
from w2s.engine.evaluation import parse_options
from w2s.engine.main import call_main
from w2s.engine.optim import build_optimizer, scaled_lr
from w2s.engine.options import (
    add_kd_options,
    add_optimizer_options,
    add_run_options,
    run_name,
)
from w2s.engine.parsing import Parser
from w2s.engine.plan import Plan, accumulation_dtype, grid_point, plan_updates
from w2s.engine.prepare import prepare_job
from w2s.engine.run import Run
from w2s.engine.targets import check_targets
from w2s.engine.teaching import early_phase, kd_window, start_distillation
from w2s.engine.training import Job
from w2s.images.augmentation import build_criterion, build_data_config, build_mixup
from w2s.images.chance import warn_of_guessing
from w2s.images.data import ImageData, load_data, set_config
from w2s.images.loading import eval_loader, train_batches
from w2s.images.models import (
    checkpoint_gradients,
    create_model,
    export,
    find_model,
    load_weights,
    pretrained_cfg,
    student_flops,
)
from w2s.images.options import (
    add_augmentation_options,
    add_classification_data_options,
    add_classifier_options,
    add_classifier_training_options,
    add_term_options,
)
from w2s.images.teacher import ImageTeacher, build_image_teacher
from w2s.images.terms import TERMS_OF_FEATURES, Term, build_term, check_term, forward_flops, hits, update_flops

COMMON_OPTIONS = (  # --help begins with these
    *("dataset", "data_dir", "model", "epochs", "batch_size", "lr", "teacher", "teacher_model", "target", "resume"),
)
# what fits small grey digits; an option given by the user or a recipe wins
DIGITS_DEFAULTS = {"img_size": 32, "hflip": 0.0, "mean": [0.5], "std": [0.5], "val_split": "test"}


def build_parser() -> Parser:
    """The options of classification stand in w2s/images/options.py, those of all tasks in w2s/engine/options.py."""
    parser = Parser(__doc__, COMMON_OPTIONS)
    add_run_options(parser)
    add_classification_data_options(parser)
    add_classifier_options(parser)
    add_kd_options(
        parser,
        "a run folder, weights file, folder of transformers, timm name, torchvision/NAME, hf-hub: or transformers:NAME",
        controls=("shuffled", "uniform", "labels", "random"),
    )
    add_term_options(parser)
    add_optimizer_options(parser)
    add_classifier_training_options(parser)
    add_augmentation_options(parser)
    parser.describe_defaults(lr="from --lr-base")
    return parser


def resolve(args) -> dict:
    """Fill in defaults that depend on other options; returns timm's data config (size, mean, std, crop)."""
    if args.dataset == "digits":
        for option, value in DIGITS_DEFAULTS.items():
            if getattr(args, option) is None:
                setattr(args, option, value)
    args.val_split = args.val_split or "validation"
    args.hflip = 0.5 if args.hflip is None else args.hflip
    args.name = args.name or run_name(args)
    if args.teacher:
        args.kd_warmup, args.kd_hold, args.kd_decay = kd_window(args, args.epochs)
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise InputError(f"--mixup and --cutmix pair images: --batch-size {args.batch_size} must be even")
    own = create_model(args.model, 0).pretrained_cfg if ":" in args.model else pretrained_cfg(args.model)
    data_config = build_data_config(args, own)
    args.mean, args.std = list(data_config["mean"]), list(data_config["std"])
    return data_config


def build_student(args, data_config: dict, data: ImageData) -> nn.Module:
    """The student, with the data config of this run as its pretrained_cfg, so that an export is complete."""
    options = {"drop_rate": args.drop, "drop_path_rate": args.drop_path, "global_pool": args.gp}
    student = create_model(
        args.model,
        data.num_classes,
        args.in_chans,
        img_size=data_config["input_size"][-1],
        small_stem=args.small_stem,
        pretrained=args.pretrained,
        model_kwargs=args.model_kwargs | {k: v for k, v in options.items() if v is not None},
    )
    if start := args.initial_checkpoint:
        load_weights(student, find_model(start) / "model.safetensors" if Path(start).is_dir() else Path(start))
    if args.grad_checkpointing:
        checkpoint_gradients(student)
    set_config(student, data_config, data.classes)
    return student


def build_teacher(args, run: Run, spec: str, data_config: dict, data: ImageData) -> ImageTeacher:
    """The frozen teacher of a name in --teacher, fitted to the student's batches."""
    return build_image_teacher(
        spec,
        model_name=args.teacher_model,
        model_kwargs=args.teacher_kwargs,
        classes=data.classes,
        data_config=data_config,
        map_file=args.teacher_classes,
        channels_last=args.channels_last,
        features=args.kd_term in TERMS_OF_FEATURES,
        **run.placement,
    )


def build_job(
    args,
    run: Run,
    plan: Plan,
    term: Term,
    *,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler,
    flops: dict[str, int],
) -> Job:
    """The student ready for training, in its memory format."""
    if args.sync_bn:
        student = convert_sync_batchnorm(student)
    if args.channels_last:
        student = student.to(memory_format=torch.channels_last)
    return prepare_job(
        args,
        run,
        plan,
        term.kd,
        student=student,
        trained=term.model,
        compiled=student,
        optimizer=optimizer,
        scheduler=scheduler,
        flops=flops,
        export=export,
    )


def train(args, job: Job, term: Term, stop: int, batches: Iterator, criterion: nn.Module, mixup: Mixup | None) -> None:
    """Train until `stop` updates are done or a signal asks to end."""
    kd = job.distillation
    for _ in job.updates(stop):
        if mixup and args.mixup_off_epoch and job.epoch >= args.mixup_off_epoch:
            mixup.mixup_enabled = False
        losses = torch.zeros(3, device=job.run.device)
        for _ in job.micro_batches():
            images, targets = next(batches)
            if mixup:
                images, targets = mixup(images, targets)

            with job.accumulating():
                logits = job.model(images)
                task_loss = criterion(logits.float(), targets)
                kd_loss = task_loss.new_zeros(())
                loss = task_loss
                if kd.weight > 0:  # L = L_task + lambda(u) L_kd(T(u)), teacher and student on the same pixels
                    taught = kd.teach(images, targets=targets)
                    kd_loss = term(logits, taught, targets)
                    kd.compare(hits, logits, taught, targets)  # for --kd-off running
                    kd.balance(task_loss, kd_loss, outputs=[logits])  # ratio and scale are 1 without --kd-balance
                    loss = kd.scale * (task_loss + kd.weight * kd.ratio * kd_loss)
                job.run.accelerator.backward(loss / job.accum)
            losses += torch.stack([loss, task_loss, kd_loss]).detach() / job.accum
        job.step(losses)


@torch.no_grad()
def validate(args, run: Run, model: Callable[[Tensor], Tensor], dataset: Dataset) -> dict[str, float]:
    """top1 and top5 in percent and the cross entropy, over every image exactly once, whatever the processes.

    `model` is anything that maps a batch to logits: the student, its moving average, the teacher.
    """
    accelerator, device = run.accelerator, run.device
    batch_size = args.validation_batch_size or args.batch_size
    sums = torch.zeros(4, dtype=accumulation_dtype(device), device=device)
    loader = eval_loader(dataset, accelerator, batch_size=batch_size, workers=args.workers)
    for images, targets in run.stopping.polled(loader):
        with accelerator.autocast():
            logits = model(images).float()
        found = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        sums += torch.stack([found[:, 0].sum(), found.sum(), loss, torch.full_like(loss, len(targets))])
    run.stopping.end_evaluation()
    top1, top5, loss, count = accelerator.reduce(sums, "sum").tolist()
    expected = getattr(dataset, "total", None) or len(dataset)
    if count == 0 or (expected and count != expected):
        raise InputError(f"an evaluation counted {count:.0f} images instead of {expected}: check the split's length")
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "eval_loss": loss / count}


def evaluate_only(args, run: Run, student: nn.Module, data: ImageData) -> None:
    """--eval-only: print the metrics of a model."""
    metrics = validate(args, run, student.eval(), data.report)
    if run.is_main:
        print(json.dumps({name: metrics[name] for name in data.metrics}))


def data_batches(args, run: Run, plan: Plan, data: ImageData, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The training batches of this process from micro-batch `start` on."""
    return train_batches(
        data.train,
        run.accelerator,
        batch_size=args.batch_size,
        batches_per_epoch=plan.updates_per_epoch * args.grad_accum_steps,
        start=start,
        seed=args.seed,
        workers=args.workers,
    )


def fit(args, job: Job, term: Term, data: ImageData) -> None:
    """Train to the end of the run, with its evaluations and checkpoints."""
    run, plan, kd = job.run, job.plan, job.distillation
    criterion, mixup = build_criterion(args), build_mixup(args, data.num_classes)
    batches = data_batches(args, run, plan, data, start=job.update * args.grad_accum_steps)
    while not job.done:
        stop = job.next_stop(grid_point(job.update, plan.updates_per_epoch, args.evals_per_epoch))
        train(args, job, term, stop, batches, criterion, mixup)
        with job.saved() as evaluation_due:
            if evaluation_due:
                student = job.model_to_evaluate()
                metrics = validate(args, run, student, data.report)
                if kd.active:  # is the student better than the teacher on the switch split?
                    switch = validate(args, run, student, data.switch)["top1"] if kd.needs_split else None
                    kd.observe(switch, update=job.update)
                job.evaluated({name: metrics[name] for name in data.metrics})
                warn_of_guessing(job, metrics, data.guess)


def main(argv: list[str] | None = None) -> None:
    args = parse_options(build_parser(), argv)
    data_config = resolve(args)
    targets = check_targets(args, metric="top1", low=0.0, high=100.0)
    phase = early_phase(args, length=args.epochs, mode="max")
    run = Run(args, task="cls")

    # images and student
    data = load_data(args, data_config, run.accelerator, cache=run.options["cache"])
    run.settle(cache=data.cache)
    run.seed_all()
    student = build_student(args, data_config, data).to(run.student_device)
    if args.eval_only:
        evaluate_only(args, run, student, data)
        return

    # updates, optimiser, learning rate
    plan, shape = plan_updates(args, run, data.samples, epochs=args.epochs), data_config["input_size"]
    student_update = student_flops(args, student, shape, batch=plan.batch)
    check_term(args, student, shape)
    lr = scaled_lr(args, plan.batch)
    steps = {"length": args.epochs, "updates_per_unit": plan.updates_per_epoch, "fused": run.fuses}
    optimizer, scheduler = build_optimizer(args, student, lr=lr, **steps)

    # the method: a frozen teacher, loaded only while its phase lasts and never prepared by Accelerate
    kd = start_distillation(
        args,
        run,
        plan,
        phase=phase,
        load=lambda spec: build_teacher(args, run, spec, data_config, data),
        count_flops=lambda teacher: forward_flops(teacher, student, batch=plan.batch),
        evaluate=lambda model, split: validate(args, run, model, split)["top1"],
        report=data.report,
        switch=data.switch,
        metric="top1",
        switch_images=data.sizes["switch"],
    )
    term = build_term(
        args, run, plan, kd, student=student, data=data, train_batches=lambda: data_batches(args, run, plan, data)
    )
    if term.has_branches:  # they are trained, too; wrong options were refused before the teacher came
        optimizer, scheduler = build_optimizer(args, term.model, lr=lr, **steps)
    flops = run.state["flops"] if run.state else update_flops(term, student, plan.batch, student_update)

    # the run
    job = build_job(args, run, plan, term, student=student, optimizer=optimizer, scheduler=scheduler, flops=flops)
    job.resume()
    job.describe(args.model, f"{args.opt} lr {lr:.4g} {args.sched}", data.sizes, targets, metric="top1")
    reported, facts = data.metrics, {**job.facts(), "data": data.sizes}
    run.open(metric="top1", mode="max", targets=targets, reported=reported, facts=facts)
    fit(args, job, term, data)
    job.finish()


if __name__ == "__main__":
    call_main(main)
