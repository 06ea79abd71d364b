"""The recipes of each script as a benchmark needs them: ready to train, with or without the teacher."""

import argparse
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import ModuleType
from typing import ClassVar

import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn

import train_cls
import train_det
import train_diffusion
from w2s.detection import loading as detection_loading
from w2s.detection.flops import detection_flops
from w2s.detection.models import check_buildable
from w2s.detection.options import open_training_data, reference_warmup
from w2s.diffusion.data import load_diffusion_data
from w2s.diffusion.judge import resolve_sample_steps
from w2s.diffusion.process import noise_schedule
from w2s.distillation import Distillation
from w2s.engine.optim import build_optimizer, scaled_lr
from w2s.engine.plan import Plan, plan_updates
from w2s.engine.run import Run
from w2s.engine.teaching import build_measures, early_phase
from w2s.engine.training import Job
from w2s.images import loading as image_loading
from w2s.images.augmentation import build_criterion, build_mixup
from w2s.images.data import load_data
from w2s.images.models import student_flops
from w2s.images.terms import Term, build_term, check_term, update_flops
from w2s.teacher import Teacher


class Task(ABC):
    """One recipe of a script, ready to train.

    A subclass resolves the options and opens the data as its script's `main` does. Models, losses and loop are the
    script's own functions.

    Args:
        args: the options of a benchmark; the script's `resolve` completes them.

    Attributes:
        run: the run that all jobs belong to.
        plan: how the run is cut into updates.
        cache: where the images are kept, as the values of `--cache` say it.

    Raises:
        InputError: as the script does.
    """

    script: ClassVar[ModuleType]
    name: ClassVar[str]  # as `Run` takes it
    mode: ClassVar[str] = "max"  # whether a higher ("max") or a lower ("min") metric is better
    run: Run
    plan: Plan
    cache: str

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    @property
    def length(self) -> int:
        """The length of the run, in epochs or in updates, whichever its schedules count."""
        return self.args.epochs

    def job(self, taught: bool) -> Job:
        """A student before its first update, alone or `taught` by a teacher that takes part in every update."""
        self.run.seed_all()
        student = self.build_student().to(self.run.device)
        phase = early_phase(self.args, length=self.length, mode=self.mode) if taught else None
        measures = build_measures(self.args, self.run) if taught else {}
        kd = Distillation(phase, unit=self.plan.unit, updates_per_epoch=self.plan.updates_per_epoch, **measures)
        if taught:
            kd.teacher = self.build_teacher(student)
        optimizer, scheduler = self.build_optimizer(student)
        return self.build_job(kd, student=student, optimizer=optimizer, scheduler=scheduler)

    def loader_options(self) -> dict:
        """What the training batches of all tasks depend on."""
        return {
            "batch_size": self.args.batch_size,
            "batches_per_epoch": self.plan.updates_per_epoch * self.args.grad_accum_steps,
            "start": 0,
            "seed": self.args.seed,
            "workers": self.args.workers,
        }

    @abstractmethod
    def batches(self) -> Iterator:
        """The training batches of this process on its device, from the first one on and without end."""

    @abstractmethod
    def build_student(self) -> nn.Module:
        """The student, on the CPU."""

    @abstractmethod
    def build_teacher(self, student: nn.Module) -> Teacher:
        """The teacher, fitted to the student."""

    @abstractmethod
    def build_optimizer(self, student: nn.Module) -> tuple[torch.optim.Optimizer, Scheduler]:
        """The optimiser and the learning-rate schedule of the recipe."""

    @abstractmethod
    def build_job(
        self, kd: Distillation, *, student: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Scheduler
    ) -> Job:
        """The student in training."""

    @abstractmethod
    def train(self, job: Job, stop: int, batches: Iterator) -> None:
        """Train until `stop` updates are done."""


class Classification(Task):
    """A recipe of train_cls.py."""

    script = train_cls
    name = "cls"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.data_config = train_cls.resolve(args)
        self.run = Run(args, task=self.name)
        self.data = load_data(args, self.data_config, self.run.accelerator, cache=args.cache)
        self.cache = self.data.cache
        self.plan = plan_updates(args, self.run, self.data.samples, epochs=args.epochs)
        self.criterion = build_criterion(args)
        self.mixup = build_mixup(args, self.data.num_classes)

    def batches(self) -> Iterator:
        return image_loading.train_batches(self.data.train, self.run.accelerator, **self.loader_options())

    def build_student(self) -> nn.Module:
        student = train_cls.build_student(self.args, self.data_config, self.data)
        check_term(self.args, student, self.data_config["input_size"])
        return student

    def build_teacher(self, student: nn.Module) -> Teacher:
        return train_cls.build_teacher(self.args, self.run, self.args.teacher, self.data_config, self.data)

    def build_optimizer(self, student: nn.Module) -> tuple[torch.optim.Optimizer, Scheduler]:
        return build_optimizer(
            self.args,
            student,
            lr=scaled_lr(self.args, self.plan.batch),
            length=self.length,
            updates_per_unit=self.plan.updates_per_epoch,
            fused=self.run.fuses,
        )

    def build_job(
        self, kd: Distillation, *, student: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Scheduler
    ) -> Job:
        if kd.teacher:
            kd.score = kd.teacher.facts(switch=None, report=math.nan)  # says how many features it gives
        data = {"data": self.data, "train_batches": self.batches}
        term = build_term(self.args, self.run, self.plan, kd, student=student, **data)
        if term.has_branches:
            optimizer, scheduler = self.build_optimizer(term.model)
        student_update = student_flops(self.args, student, self.data_config["input_size"], batch=self.plan.batch)
        return train_cls.build_job(
            self.args,
            self.run,
            self.plan,
            term,
            student=student,
            optimizer=optimizer,
            scheduler=scheduler,
            flops=update_flops(term, student, self.plan.batch, student_update),
        )

    def train(self, job: Job, stop: int, batches: Iterator) -> None:
        model = self.run.accelerator.unwrap_model(job.model, keep_torch_compile=False)
        term = Term(job.distillation, model, self.args.kd_term, self.args.kd_term_weight)
        train_cls.train(self.args, job, term, stop, batches, criterion=self.criterion, mixup=self.mixup)


class Detection(Task):
    """A recipe of train_det.py."""

    script = train_det
    name = "det"
    cache = "none"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.config = train_det.resolve(args)
        self.run = Run(args, task=self.name)
        check_buildable(self.config)
        self.data = open_training_data(args, self.config.kind.first_label)
        self.plan = plan_updates(args, self.run, len(self.data.train), epochs=args.epochs)

    def batches(self) -> Iterator:
        return detection_loading.train_batches(
            self.data.train,
            self.run.accelerator,
            micro_batches=self.args.grad_accum_steps,
            group_aspect=self.args.group_aspect,
            **self.loader_options(),
        )

    def build_student(self) -> nn.Module:
        return train_det.build_student(self.args, self.config, self.data.classes)

    def build_teacher(self, student: nn.Module) -> Teacher:
        return train_det.build_teacher(self.args, self.run, self.args.teacher, student)

    def build_optimizer(self, student: nn.Module) -> tuple[torch.optim.Optimizer, Scheduler]:
        lr = scaled_lr(self.args, self.plan.batch)
        return build_optimizer(
            self.args,
            student,
            lr=lr,
            length=self.length,
            updates_per_unit=self.plan.updates_per_epoch,
            fused=self.run.fuses,
            **reference_warmup(self.args, lr, self.plan.updates_per_epoch),
        )

    def build_job(
        self, kd: Distillation, *, student: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Scheduler
    ) -> Job:
        return train_det.build_job(
            self.args,
            self.run,
            self.plan,
            kd,
            student=student,
            optimizer=optimizer,
            scheduler=scheduler,
            flops=detection_flops(student, kd.teacher, self.data.train, batch=self.plan.batch),
        )

    def train(self, job: Job, stop: int, batches: Iterator) -> None:
        train_det.train(self.args, job, stop, batches)


class Diffusion(Task):
    """A recipe of train_diffusion.py.

    Attributes:
        sample_steps: how many steps the recipe samples in; the dry run that a benchmark is would take fewer.
    """

    script = train_diffusion
    name = "diffusion"
    mode = "min"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.sample_steps = resolve_sample_steps(args.sample_steps, args.sampler, args.diffusion_steps)
        train_diffusion.resolve(args)
        self.process = noise_schedule(args.betas, args.diffusion_steps, args.prediction)
        self.run = Run(args, task=self.name)
        self.data = load_diffusion_data(args, self.run.accelerator, cache=args.cache)
        self.cache = self.data.cache
        self.plan = plan_updates(args, self.run, self.data.samples, updates=args.updates)

    @property
    def length(self) -> int:
        return self.args.updates

    def batches(self) -> Iterator:
        return image_loading.train_batches(self.data.train, self.run.accelerator, **self.loader_options())

    def build_student(self) -> nn.Module:
        return train_diffusion.build_student(self.args, self.data.num_classes, self.process)

    def build_teacher(self, student: nn.Module) -> Teacher:
        return train_diffusion.build_teacher(self.args, self.run, self.args.teacher, student, self.process)

    def build_optimizer(self, student: nn.Module) -> tuple[torch.optim.Optimizer, Scheduler]:
        lr = scaled_lr(self.args, self.plan.batch)
        steps = {"length": self.length, "updates_per_unit": 1, "unit": "updates", "fused": self.run.fuses}
        return build_optimizer(self.args, student, lr=lr, **steps)

    def build_job(
        self, kd: Distillation, *, student: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Scheduler
    ) -> Job:
        return train_diffusion.build_job(
            self.args,
            self.run,
            self.plan,
            kd,
            student=student,
            optimizer=optimizer,
            scheduler=scheduler,
            flops=train_diffusion.flops_of(student, kd, self.plan.batch),
            process=self.process,
        )

    def train(self, job: Job, stop: int, batches: Iterator) -> None:
        train_diffusion.train(self.args, job, stop, batches, process=self.process)


TASKS = (Classification, Detection, Diffusion)
