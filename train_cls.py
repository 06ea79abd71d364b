#!/usr/bin/env python
"""Train an image classifier, sooner with a weaker teacher's help.

One GPU or CPU      python train_cls.py -c recipes/digits_w2s.yaml
One GPU, bf16       accelerate launch --mixed_precision bf16 train_cls.py -c recipes/cifar10_r50_w2s.yaml
One node, 8 GPUs    accelerate launch --config_file recipes/accelerate/one_node_8gpu.yaml train_cls.py -c RECIPE
Two nodes           accelerate launch --config_file recipes/accelerate/two_nodes.yaml --machine_rank 0|1 \
                        --main_process_ip HOST train_cls.py -c RECIPE
Resume              the same command with --resume auto

Without --teacher this trains a baseline, which is also how a teacher is made.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup, resolve_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, ParseKwargs, dispatch_clip_grad
from torch import Tensor, nn
from tqdm import tqdm

from w2s.crossing import RunRecord, target_key
from w2s.data import DIGITS_DEFAULTS, ImageData, eval_loader, load_data, train_batches
from w2s.losses import kl_softmax
from w2s.models import create_model, export, find_model, load_weights
from w2s.options import (
    InputError,
    Parser,
    add_kd_options,
    add_optimizer_options,
    add_run_options,
    add_switch,
    early_phase,
    not_negative,
    parse_targets,
    positive_int,
)
from w2s.run import Preempted, Run, call_main, count_flops
from w2s.schedule import EarlyPhase
from w2s.teacher import Teacher, load_teacher

METRICS = ("top1", "top5", "eval_loss")
WARMUP_UPDATES = 2  # left out of train seconds after each start: compilation, allocator, autotuning


def build_parser() -> Parser:
    """All options; shared groups come from w2s.options."""
    parser = Parser(__doc__)
    add_run_options(parser)

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="", help="digits, hfds/NAME_OR_FOLDER, wds/..., torch/...; '' for a folder")
    group.add_argument("--data-dir", metavar="DIR", help="image folder with train/ and val/, or root of the dataset")
    group.add_argument("--train-split", default="train", metavar="NAME")
    group.add_argument("--val-split", metavar="NAME", help="reported on, decides nothing (default: validation)")
    group.add_argument("--input-key", metavar="KEY", help="column of the image")
    group.add_argument("--target-key", metavar="KEY", help="column of the label")
    group.add_argument("--train-samples", type=positive_int, metavar="N", help="a seeded, class-balanced subset")
    group.add_argument("--train-num-samples", type=positive_int, metavar="N", help="length of a streamed train split")
    group.add_argument("--val-num-samples", type=positive_int, metavar="N", help="length of a streamed val split")
    group.add_argument(
        "--check-images", type=int, default=20000, metavar="N", help="decode N images a split first (-1: all)"
    )
    group.add_argument("-j", "--workers", type=int, default=4, metavar="N", help="loader workers a process")

    group = parser.add_argument_group("model (timm)")
    group.add_argument("--model", default="resnet50", metavar="NAME")
    add_switch(group, "--pretrained", "start from timm's pretrained weights")
    group.add_argument("--initial-checkpoint", metavar="PATH", help="start from a run folder or a weights file")
    group.add_argument("--num-classes", type=positive_int, metavar="N", help="default: from the data")
    group.add_argument("--img-size", type=positive_int, metavar="N", help="default: the model's own")
    group.add_argument("--in-chans", type=positive_int, default=3, metavar="N")
    group.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V")
    add_switch(group, "--small-stem", "3x3 stride 1 and no pooling in the stem, for small images")
    group.add_argument("--drop", type=float, metavar="P", help="dropout of the classifier")
    group.add_argument("--drop-path", type=float, metavar="P")
    add_switch(group, "--model-ema", "evaluate, compare and export the moving average of the weights")
    group.add_argument("--model-ema-decay", type=float, default=0.9998)
    add_switch(group, "--model-ema-warmup", "a smaller decay at first")
    add_switch(group, "--channels-last", "NHWC memory format")
    add_switch(group, "--sync-bn", "BatchNorm over all GPUs")
    group.add_argument("--torchcompile", nargs="?", const="inductor", metavar="BACKEND")

    add_kd_options(parser)
    add_optimizer_options(parser)

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive_int, default=100)
    group.add_argument("-b", "--batch-size", type=positive_int, default=128, metavar="N", help="per process")
    group.add_argument("--validation-batch-size", type=positive_int, metavar="N", help="per process; decides nothing")
    group.add_argument("--grad-accum-steps", type=positive_int, default=1, metavar="N")
    group.add_argument("--evals-per-epoch", type=positive_int, default=1, metavar="N")
    group.add_argument("--smoothing", type=not_negative, default=0.1)
    add_switch(group, "--bce-loss", "binary cross entropy instead of softmax cross entropy")
    group.add_argument("--bce-target-thresh", type=float)

    group = parser.add_argument_group("augmentation (timm)")
    add_switch(group, "--no-aug", "none")
    group.add_argument("--pad-crop", type=int, metavar="N", help="for small images: pad by N, crop, flip")
    group.add_argument("--scale", type=float, nargs=2, default=[0.08, 1.0])
    group.add_argument("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3])
    group.add_argument("--hflip", type=float, help="default: 0.5")
    group.add_argument("--vflip", type=float, default=0.0)
    group.add_argument("--color-jitter", type=float, default=0.4)
    group.add_argument("--aa", metavar="POLICY", help="AutoAugment or RandAugment, e.g. rand-m9-mstd0.5")
    group.add_argument("--reprob", type=float, default=0.0, help="random erasing")
    group.add_argument("--remode", default="pixel")
    group.add_argument("--mixup", type=not_negative, default=0.0)
    group.add_argument("--cutmix", type=not_negative, default=0.0)
    group.add_argument("--mixup-prob", type=float, default=1.0)
    group.add_argument("--mixup-switch-prob", type=float, default=0.5)
    group.add_argument("--mixup-mode", choices=["batch", "pair", "elem"], default="batch")
    group.add_argument("--mixup-off-epoch", type=int, default=0, help="0: never off")
    group.add_argument("--train-interpolation", metavar="MODE")
    group.add_argument("--interpolation", metavar="MODE")
    group.add_argument("--crop-pct", type=float, help="of evaluation (default: the model's; 1 up to 64 px)")
    group.add_argument("--mean", type=float, nargs="+")
    group.add_argument("--std", type=float, nargs="+")
    return parser


def resolve(args) -> dict:
    """Fill in defaults that depend on other options; returns timm's data config (size, mean, std, crop)."""
    if args.dataset == "digits":
        for option, value in DIGITS_DEFAULTS.items():
            if getattr(args, option) is None:
                setattr(args, option, value)
    args.val_split = args.val_split or "validation"
    args.hflip = 0.5 if args.hflip is None else args.hflip
    args.name = args.name or f"{Path(args.config).stem if args.config else args.model}-seed{args.seed}"
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise InputError(f"--mixup and --cutmix pair images: --batch-size {args.batch_size} must be even")
    if args.sched in ("plateau", "none"):
        raise InputError(f"--sched {args.sched}: the learning rate must be a function of the update; use constant")
    if ":" in args.model:
        own = create_model(args.model, 0).pretrained_cfg
    else:
        own = timm.get_pretrained_cfg(args.model)
        own = own.to_dict() if own else {}  # an unknown name is reported by create_model
    config = resolve_data_config(
        {k: getattr(args, k) for k in ("img_size", "in_chans", "mean", "std", "interpolation", "crop_pct")},
        pretrained_cfg=own,
    )
    for name in ("mean", "std"):  # RGB statistics for grey images: their average
        if len(config[name]) != args.in_chans:
            config[name] = (sum(config[name]) / len(config[name]),) * args.in_chans
    if args.crop_pct is None and max(config["input_size"][-2:]) <= 64:
        config["crop_pct"] = 1.0
    return config


def build_student(args, config: dict, num_classes: int) -> nn.Module:
    """The student, carrying the data config of this run as its pretrained_cfg, so that an export is complete."""
    kwargs = {**args.model_kwargs, "drop_rate": args.drop, "drop_path_rate": args.drop_path}
    student = create_model(
        args.model,
        num_classes,
        args.in_chans,
        config["input_size"][-1],
        args.small_stem,
        args.pretrained,
        {k: v for k, v in kwargs.items() if v is not None},
    )
    if args.initial_checkpoint:
        path = Path(args.initial_checkpoint)
        load_weights(student, find_model(args.initial_checkpoint) / "model.safetensors" if path.is_dir() else path)
    student.pretrained_cfg = {
        **{k: v for k, v in student.pretrained_cfg.items() if not k.startswith("test_")},
        **{k: config[k] for k in ("input_size", "mean", "std", "interpolation", "crop_pct")},
    }
    return student


def task_criterion(args) -> nn.Module:
    """The task's own loss, as timm's train.py chooses it."""
    mixes = args.mixup > 0 or args.cutmix > 0
    if args.bce_loss:
        return BinaryCrossEntropy(smoothing=0.0 if mixes else args.smoothing, target_threshold=args.bce_target_thresh)
    if mixes:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


@dataclass
class Job:
    """What the loop works on."""

    args: object
    run: Run
    model: nn.Module  # prepared by Accelerate: autocast, DDP
    student: nn.Module  # the bare timm model inside it
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: object
    criterion: nn.Module
    mixup: Mixup | None
    phase: EarlyPhase | None
    teacher: Teacher | None
    updates_per_epoch: int
    update: int = 0  # updates done
    kd_updates: int = 0  # of these, with the teacher
    meter: Tensor | None = None  # sums since the last evaluation: loss, task, kd, updates, kd updates

    def switch_off(self) -> None:
        """Drop the teacher for good."""
        if self.teacher:
            self.run.clock.teacher_seconds += self.teacher.take_seconds()
            self.teacher.release()
            self.teacher = None
        place = self.phase.kd_off
        off = {"epoch": place["at"], "update": round(place["at"] * self.updates_per_epoch), "reason": place["reason"]}
        self.run.record.write_summary(kd_off=off)
        self.run.log(f"distillation off for good at epoch {off['epoch']:g} ({off['reason']})")


def train_until(job: Job, stop: int, batches: Iterator, bar: tqdm) -> bool:
    """Run updates until `stop` of them are done; True if a signal ended it earlier, after a whole update."""
    args, run, device = job.args, job.run, job.run.device
    parameters = [p for p in job.student.parameters() if p.requires_grad]
    first = job.update
    job.model.train()
    while job.update < stop:
        epoch = job.update / job.updates_per_epoch
        run.seed_update(job.update)
        job.scheduler.step_update(job.update)
        if job.phase and job.phase.active and not job.phase.advance(epoch):
            job.switch_off()
        kd_weight = job.phase.weight(epoch) if job.phase else 0.0
        if job.mixup and args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            job.mixup.mixup_enabled = False

        for micro in range(args.grad_accum_steps):
            images, targets = next(batches)
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            if args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            if job.mixup:
                images, targets = job.mixup(images, targets)

            with run.accumulating(job.model, last=micro == args.grad_accum_steps - 1):
                logits = job.model(images)
                task_loss = job.criterion(logits.float(), targets)
                kd_loss = task_loss.new_zeros(())
                loss = task_loss
                if kd_weight > 0:  # L = L_task + lambda(u) L_kd(T(u)), on the very same pixels
                    kd_loss = kl_softmax(logits, job.teacher(images), job.phase.temperature(epoch))
                    loss = task_loss + kd_weight * kd_loss
                run.accelerator.backward(loss / args.grad_accum_steps)
            job.meter[:3] += torch.stack([loss, task_loss, kd_loss]).detach() / args.grad_accum_steps

        if args.clip_grad is not None:
            run.accelerator.unscale_gradients()
            dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
        job.optimizer.step()
        job.optimizer.zero_grad()
        job.update += 1
        if job.ema:
            job.ema.update(job.student, step=job.update)
        job.kd_updates += kd_weight > 0
        job.meter[3:] += job.meter.new_tensor([1.0, float(kd_weight > 0)])

        bar.update()
        if not run.clock.running and job.update - first >= WARMUP_UPDATES:
            run.clock.start()
            if job.teacher:
                job.teacher.restart_timer()
        if run.should_stop(job.update, loss, now=job.update == stop):
            return True
        if job.update % args.log_interval == 0:
            log_progress(job, epoch, kd_weight, loss, task_loss, kd_loss, bar)
    return False


def log_progress(job: Job, epoch: float, kd_weight: float, loss, task_loss, kd_loss, bar: tqdm) -> None:
    """One line of the log: loss terms, lambda, T, learning rate, images/s."""
    seconds = job.run.clock.train_seconds
    then, bar.last_seen = getattr(bar, "last_seen", (0, 0.0)), (job.update, seconds)
    rate = (job.update - then[0]) * samples_per_update(job) / (seconds - then[1]) if seconds > then[1] > 0 else math.nan
    terms = f"loss {loss:.4f}"
    if kd_weight > 0:
        terms += f" = task {task_loss:.4f} + {kd_weight:.3g} x kd {kd_loss:.4f} (T {job.phase.temperature(epoch):.2f})"
    bar.set_postfix_str(f"{terms} {rate:.0f} images/s")
    lr = job.optimizer.param_groups[0]["lr"]
    job.run.log(f"epoch {epoch:.2f} update {job.update}/{bar.total} {terms} lr {lr:.3g} {rate:.0f} images/s")


def samples_per_update(job: Job) -> int:
    """Images of one update over all processes."""
    return job.args.batch_size * job.args.grad_accum_steps * job.run.accelerator.num_processes


@torch.no_grad()
def validate(model, dataset, args, accelerator) -> dict[str, float]:
    """top1 and top5 in percent and the cross entropy, over every image exactly once, whatever the processes.

    `model` is anything that maps a batch to logits: the student, its moving average, the teacher.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    for images, targets in eval_loader(dataset, args, accelerator):
        images, targets = (t.to(accelerator.device, non_blocking=True) for t in (images, targets))
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            logits = model(images)
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, loss.new_tensor(len(targets))])
    top1, top5, loss, count = accelerator.reduce(sums, "sum").tolist()
    expected = len(dataset)
    if count == 0 or (expected and count != expected):
        raise InputError(f"an evaluation counted {count:.0f} images instead of {expected}: check the split's length")
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "eval_loss": loss / count}


def set_up_teacher(args, run: Run, config: dict, data: ImageData) -> tuple[Teacher, dict]:
    """The frozen teacher and its scores on both splits, in the student's pipeline."""
    model, source = load_teacher(
        args.teacher, args.teacher_model, args.teacher_kwargs, data.num_classes, args.in_chans, config["input_size"][-1]
    )
    params = sum(p.numel() for p in model.parameters())
    teacher = Teacher(model, run.accelerator, config["mean"], config["std"], args.channels_last, args.torchcompile)
    report = validate(teacher, data.report, args, run.accelerator)["top1"]
    if args.teacher_score is not None:
        switch, how = args.teacher_score, "given by --teacher-score"
    else:
        switch = validate(teacher, data.switch, args, run.accelerator)["top1"]
        how = "measured on the switch split"
    count = len(data.switch)
    error = math.sqrt(max(switch * (100 - switch), 0.0) / count)
    architecture = model.pretrained_cfg.get("architecture")
    run.log(
        f"teacher {architecture} ({params / 1e6:.2f} M) from {source}: top1 {report:.2f} on the reporting split; to beat: "
        f"{switch:.2f}, {how} ({count} images, standard error {error:.2f})"
    )
    if args.teacher_score is None and switch > report + 1 + 2 * error:
        run.log(
            "warning: the teacher scores clearly higher on the switch split than on the reporting split; if it was "
            "trained on these images the student may never pass it: give its held-out score with --teacher-score"
        )
    facts = {"model": architecture, "switch": switch, "report": report, "params": params, "checkpoint": source}
    return teacher, facts


def flops_of(student: nn.Module, teacher: Teacher | None, args, config: dict, images: int) -> dict:
    """FLOPs of one update of the student and of the teacher's forward in it, counted on meta copies."""
    import copy

    def count(model: nn.Module, size, train: bool) -> int:
        model = copy.deepcopy(model).to("meta").train(train)
        batch = torch.empty(2, args.in_chans, *size, device="meta")
        return count_flops(lambda: model(batch).sum().backward() if train else model(batch)) * images // 2

    result = {"student_update": count(student, config["input_size"][-2:], True)}
    result["teacher_forward"] = count(teacher.model, teacher.size, False) if teacher else 0
    return result


def evaluate(job: Job, data: ImageData, flops: dict, teacher_facts: dict | None, folder: Path) -> None:
    """One evaluation: both metrics, a row of metrics.csv, the switch-off decision, the best model."""
    args, run = job.args, job.run
    epoch = job.update / job.updates_per_epoch
    run.share_buffers(job.student)
    model = job.ema.module if job.ema else job.student
    model.eval()
    row = validate(model, data.report, args, run.accelerator)
    losses = run.mean(job.meter)
    job.meter.zero_()
    if job.teacher:
        run.clock.teacher_seconds += job.teacher.take_seconds()
    active = bool(job.phase and job.phase.active)
    row["kd_weight"] = job.phase.weight(epoch) if active else 0.0
    row["kd_temperature"] = job.phase.temperature(epoch) if active else None
    if active:
        row["switch_top1"] = validate(model, data.switch, args, run.accelerator)["top1"]
        active = job.phase.observe(row["switch_top1"], teacher_facts["switch"], epoch)
        if not active:
            job.switch_off()
    job.model.train()
    is_best = run.record.add(
        epoch=epoch,
        update=job.update,
        samples=job.update * samples_per_update(job),
        train_seconds=run.clock.train_seconds,
        total_seconds=run.clock.total_seconds,
        teacher_seconds=run.clock.teacher_seconds,
        pflops=(job.update * flops["student_update"] + job.kd_updates * flops["teacher_forward"]) / 1e15,
        lr=job.optimizer.param_groups[0]["lr"],
        kd_active=int(active),
        train_loss=losses[0] / losses[3],
        task_loss=losses[1] / losses[3],
        kd_loss=losses[2] / losses[4] if losses[4] else None,
        **row,
    )
    switch = f", switch split {row['switch_top1']:.2f}" if "switch_top1" in row else ""
    run.log(f"epoch {epoch:g}: top1 {row['top1']:.2f}, top5 {row['top5']:.2f}, loss {row['eval_loss']:.4f}{switch}")
    if is_best and run.keeps and run.is_main:
        export(model, folder / "best")


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_recipe(argv)
    config = resolve(args)
    targets = parse_targets(args.target, "top1", 0.0, 100.0)
    phase = early_phase(args, args.epochs, "max") if args.teacher else None
    run = Run(args, "cls")
    accelerator = run.accelerator

    data = load_data(args, config, args.num_classes)
    run.seed()
    student = build_student(args, config, data.num_classes).to(run.device)
    if args.eval_only:
        if not (args.initial_checkpoint or args.pretrained):
            load_weights(student, find_model(str(run.folder)) / "model.safetensors")
        print(json.dumps(validate(student.eval(), data.report, args, accelerator)) if run.is_main else "", end="\n")
        return

    images = args.batch_size * args.grad_accum_steps * accelerator.num_processes
    updates_per_epoch = data.samples // images
    if updates_per_epoch == 0:
        raise InputError(f"{data.samples} training images are fewer than one update of {images}: lower --batch-size")
    total = 3 if args.dry_run else args.epochs * updates_per_epoch
    lr = args.lr if args.lr is not None else scaled_lr(args, images)
    optimizer, scheduler = build_optimizer(args, student, lr, updates_per_epoch)
    teacher, teacher_facts = None, run.state and run.state["teacher"]
    if phase and run.state:
        phase.load_state_dict(run.state["phase"])
    if phase and data.switch is None:
        raise InputError("--switch-split 0 leaves no images to compare student and teacher on; give a share above 0")
    if phase and phase.active:
        teacher, facts = set_up_teacher(args, run, config, data)
        teacher_facts = teacher_facts or facts
    flops = run.state["flops"] if run.state else flops_of(student, teacher, args, config, images)

    if args.sync_bn:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    if args.channels_last:
        student = student.to(memory_format=torch.channels_last)
    ema = ModelEmaV3(student, args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
    if args.torchcompile:
        student.compile(backend=args.torchcompile)
    model, optimizer = accelerator.prepare(student, optimizer)
    mixup = None
    if args.mixup or args.cutmix:
        mixup = Mixup(
            args.mixup, args.cutmix, None, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
            label_smoothing=args.smoothing, num_classes=data.num_classes,
        )  # fmt: skip
    meter = torch.zeros(5, device=run.device)
    job = Job(
        args, run, model, student, ema, optimizer, scheduler, task_criterion(args), mixup, phase, teacher,
        updates_per_epoch, meter=meter,
    )  # fmt: skip
    if run.state:
        run.load(ema)
        job.update, job.kd_updates = run.state["update"], run.state["kd_updates"]
        job.meter += torch.tensor(run.state["meter"], device=run.device)

    describe(job, data, targets, flops, lr, total, teacher_facts)
    run.open(
        lambda folder, facts, log: RunRecord(folder, "top1", "max", targets, METRICS, facts, log),
        teacher=teacher_facts,
        kd_off=None,
        flops=flops,
        params=sum(p.numel() for p in student.parameters()),
        data=data.facts,
        weights="ema" if ema else "raw",
    )
    if phase and not phase.active:
        job.switch_off()

    grid = sorted({round(k * updates_per_epoch / args.evals_per_epoch) for k in range(1, args.evals_per_epoch + 1)})
    batches = train_batches(
        data, args, accelerator, job.update * args.grad_accum_steps, updates_per_epoch * args.grad_accum_steps
    )
    bar = tqdm(total=total, initial=job.update, unit="update", disable=None if run.is_main else True)
    while job.update < total:
        done, within = divmod(job.update, updates_per_epoch)
        next_eval = min(done * updates_per_epoch + next(g for g in grid if g > within), total)
        stop = next_eval
        if args.recovery_interval:
            stop = min(stop, (job.update // args.recovery_interval + 1) * args.recovery_interval)
        stopped = train_until(job, stop, batches, bar)
        with run.clock.paused():
            if job.update == next_eval:
                evaluate(job, data, flops, teacher_facts, run.folder)
            if job.teacher:
                run.clock.teacher_seconds += job.teacher.take_seconds()
            run.save(
                job.update,
                ema,
                phase=phase and phase.state_dict(),
                teacher=teacher_facts,
                flops=flops,
                kd_updates=job.kd_updates,
                meter=run.mean(job.meter),
            )
        if stopped and job.update < total:
            run.finish("preempted")
            raise Preempted(f"stopped by a signal and saved at update {job.update}; go on with --resume auto")
    bar.close()
    if run.keeps and run.is_main:
        export(job.ema.module if job.ema else student, run.folder / "model")
    run.finish("finished")
    report(run, targets)


def scaled_lr(args, images: int) -> float:
    """timm's rule: --lr-base at --lr-base-size, scaled to the global batch."""
    ratio = images / args.lr_base_size
    adaptive = any(kind in args.opt.lower() for kind in ("ada", "lamb"))
    scale = args.lr_base_scale or ("sqrt" if adaptive else "linear")
    return args.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def build_optimizer(args, student: nn.Module, lr: float, updates_per_epoch: int):
    """timm's optimiser and its schedule as a function of the update.

    Raises:
        InputError: unknown names or arguments.
    """
    options = {"eps": args.opt_eps, "betas": args.opt_betas, "layer_decay": args.layer_decay, **args.opt_kwargs}
    try:
        optimizer = create_optimizer_v2(
            student,
            opt=args.opt,
            lr=lr,
            weight_decay=args.weight_decay,
            momentum=args.momentum,
            **{k: v for k, v in options.items() if v is not None},
        )
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        raise InputError(f"--opt {args.opt}: {error}") from None
    if args.warmup_epochs > args.epochs:
        raise InputError(f"--warmup-epochs {args.warmup_epochs:g} is longer than --epochs {args.epochs}")
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=args.sched,
            num_epochs=args.epochs,
            decay_epochs=args.decay_epochs,
            decay_milestones=args.decay_milestones,
            decay_rate=args.decay_rate,
            warmup_epochs=args.warmup_epochs,
            warmup_lr=args.warmup_lr,
            min_lr=args.min_lr,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(f"--sched {args.sched}: {error}") from None
    return optimizer, scheduler


def describe(job: Job, data: ImageData, targets, flops: dict, lr: float, total: int, teacher_facts) -> None:
    """The first lines: what will happen."""
    args, run = job.args, job.run
    params = sum(p.numel() for p in job.student.parameters())
    run.log(
        f"{run.name}: {args.model} ({params / 1e6:.2f} M) on {run.device.type}, {run.accelerator.num_processes} "
        f"process(es), precision {run.accelerator.mixed_precision}, global batch {samples_per_update(job)}, "
        f"{args.opt} lr {lr:.4g} {args.sched}, {total} updates ({job.updates_per_epoch} an epoch)"
    )
    run.log(
        f"images: {data.facts['train']} train, {data.facts['switch']} switch split, {data.facts['report']} reporting; "
        f"{data.num_classes} classes; evaluated {args.evals_per_epoch}x an epoch, {'EMA' if job.ema else 'raw'} weights"
    )
    run.log(
        f"targets: top1 {', '.join(map(target_key, targets)) or 'none'}; PFLOPs an update: student "
        f"{flops['student_update'] / 1e15:.3g}, teacher {flops['teacher_forward'] / 1e15:.3g}"
    )
    if job.teacher:
        run.log(
            f"distillation: lambda {args.kd_weight:g} (warm-up {args.kd_warmup:g}, hold {args.kd_hold:g}, decay "
            f"{args.kd_decay:g} epochs), T {args.kd_temperature[0]:g} -> {args.kd_temperature[-1]:g}, off "
            f"{args.kd_off}: {args.kd_patience} evaluations in a row above {teacher_facts['switch']:.2f}"
        )
    elif args.teacher:
        run.log(f"distillation: over ({job.phase.reason}); the teacher is not loaded")


def report(run: Run, targets: list[float]) -> None:
    """The last lines: what happened."""
    summary = run.record.summary()
    last, best = summary["last"], summary["best"]
    run.log(f"{'dry run' if run.args.dry_run else run.folder}: top1 {last:.2f} at the end, {best:.2f} at best")
    for tau in map(target_key, targets):
        first = summary["targets"][tau]["first"]
        where = f"epoch {first['epoch']:g}, {first['train_seconds']:.1f} train seconds" if first else "never"
        run.log(f"first@{tau}: {where}")


if __name__ == "__main__":
    call_main(main)
