"""What a benchmark needs of each script: its options, data, models and loop. All functions are the script's own."""

import argparse
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import ClassVar

import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn

import train_cls
import train_det
import train_diffusion
from w2s.detection import loading as boxes
from w2s.detection.data import load_detection
from w2s.detection.models import DETECTORS, TERMS
from w2s.diffusion.data import load_pixels
from w2s.diffusion.process import noise_schedule
from w2s.engine.optim import build_optimizer, scaled_lr
from w2s.engine.run import Run
from w2s.engine.training import Job
from w2s.images import loading
from w2s.images.data import load_data
from w2s.teacher import Teacher


class Task:
    """One recipe of a script: options on making, data on `load`.

    Args:
        args: parsed options; resolved here.

    Raises:
        InputError: as the script does.
    """

    script: ClassVar[ModuleType]
    name: ClassVar[str]  # as in Run
    mode: ClassVar[str] = "max"
    unit: ClassVar[str] = "epoch"  # what u counts
    terms: tuple[str, ...] = ()

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    @property
    def length(self) -> int:
        """Of the run, in `unit`s."""
        return self.args.epochs

    @property
    def samples(self) -> int:
        """Training examples an epoch."""
        return self.data.samples

    def load(self, run: Run) -> None:
        """Open the data, as `self.data`."""

    def student(self) -> nn.Module:
        """The student, on the CPU."""

    def teacher(self, run: Run, student: nn.Module) -> Teacher:
        """Fitted to the student."""

    def flops(self, student: nn.Module, teacher: Teacher, images: int) -> dict:
        """As the scripts count them."""

    def train(self, job: Job, stop: int, batches: Iterator) -> None:
        """The script's loop."""

    def batches(self, run: Run, count: int) -> Iterator:
        """Endless training batches of this process, `count` an epoch."""
        return loading.train_batches(self.data.train, self.args, run.accelerator, 0, count)

    def optimizer(
        self, student: nn.Module, images: int, updates_per_epoch: int
    ) -> tuple[torch.optim.Optimizer, Scheduler]:
        """For updates of so many images."""
        return build_optimizer(self.args, student, scaled_lr(self.args, images), self.length, updates_per_epoch)

    def channels_last(self, student: nn.Module) -> nn.Module:
        """In NHWC memory."""
        return student.to(memory_format=torch.channels_last)

    def compiled(self, model: nn.Module) -> nn.Module:
        """The part of a model that --torchcompile means."""
        return model

    @property
    def export(self) -> Callable:
        """Writes the model; a benchmark does not."""
        return self.script.export


class Classification(Task):
    """train_cls.py."""

    script, name = train_cls, "cls"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.config = train_cls.resolve(args)

    def load(self, run: Run) -> None:
        self.data = load_data(self.args, self.config, self.args.num_classes, run.accelerator)
        self.criterion = train_cls.task_criterion(self.args)
        self.mixup = train_cls.build_mixup(self.args, self.data.num_classes)

    def student(self) -> nn.Module:
        return train_cls.build_student(self.args, self.config, self.data.num_classes)

    def teacher(self, run: Run, student: nn.Module) -> Teacher:
        return train_cls.set_up_teacher(self.args, run, self.config, self.data)

    def flops(self, student: nn.Module, teacher: Teacher, images: int) -> dict:
        return train_cls.flops_of(student, teacher, self.args, self.config, images)

    def train(self, job: Job, stop: int, batches: Iterator) -> None:
        train_cls.train(job, stop, batches, self.criterion, self.mixup)


class Detection(Task):
    """train_det.py."""

    script, name = train_det, "det"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.config = train_det.resolve(args)
        self.names = TERMS[args.detector]
        self.terms = (*DETECTORS[args.detector].losses, *(f"kd_{name}" for name in self.names))

    @property
    def samples(self) -> int:
        return len(self.data.train)

    def load(self, run: Run) -> None:
        self.data = load_detection(self.args, DETECTORS[self.args.detector].first_label)
        self.config.classes = self.data.classes

    def student(self) -> nn.Module:
        return train_det.build_student(self.args, self.config)

    def teacher(self, run: Run, student: nn.Module) -> Teacher:
        return train_det.set_up_teacher(self.args, run, student)

    def flops(self, student: nn.Module, teacher: Teacher, images: int) -> dict:
        return train_det.flops_of(student, teacher, self.data, images)

    def train(self, job: Job, stop: int, batches: Iterator) -> None:
        train_det.train(job, stop, batches, self.names)

    def batches(self, run: Run, count: int) -> Iterator:
        return boxes.train_batches(self.data.train, self.args, run.accelerator, 0, count)

    def optimizer(
        self, student: nn.Module, images: int, updates_per_epoch: int
    ) -> tuple[torch.optim.Optimizer, Scheduler]:
        lr = scaled_lr(self.args, images)
        schedule = train_det.reference_warmup(self.args, lr, updates_per_epoch)
        return build_optimizer(schedule, student, lr, self.length, updates_per_epoch)

    def channels_last(self, student: nn.Module) -> nn.Module:
        student.backbone.memory_format = torch.channels_last
        return super().channels_last(student)

    def compiled(self, model: nn.Module) -> nn.Module:
        return model.backbone


class Diffusion(Task):
    """train_diffusion.py."""

    script, name, mode, unit = train_diffusion, "diffusion", "min", "update"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        train_diffusion.resolve(args)
        self.process = noise_schedule(args.betas, args.diffusion_steps, args.prediction)

    @property
    def length(self) -> int:
        return self.args.updates

    def load(self, run: Run) -> None:
        self.data = load_pixels(self.args, run.accelerator)

    def student(self) -> nn.Module:
        return train_diffusion.build_student(self.args, self.data.num_classes, self.process)

    def teacher(self, run: Run, student: nn.Module) -> Teacher:
        return train_diffusion.set_up_teacher(self.args, run, student, self.process)

    def flops(self, student: nn.Module, teacher: Teacher, images: int) -> dict:
        return train_diffusion.flops_of(student, teacher, self.args, images)

    def train(self, job: Job, stop: int, batches: Iterator) -> None:
        train_diffusion.train(job, stop, batches, self.process)

    def optimizer(
        self, student: nn.Module, images: int, updates_per_epoch: int
    ) -> tuple[torch.optim.Optimizer, Scheduler]:
        return build_optimizer(self.args, student, scaled_lr(self.args, images), self.length, 1, unit="updates")


TASKS = (Classification, Detection, Diffusion)
