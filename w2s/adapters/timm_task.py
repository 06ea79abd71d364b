"""timm's train.py: a task for it, LogitDistillationTask with an early phase.

    task = EarlyDistillationTask(model, run, criterion=train_loss_fn, device=device, grad_accum_steps=accum_steps,
        batches_per_epoch=len(loader_train), eval_loaders={"report": loader_eval, "switch": loader_switch})

in place of `task = LogitDistillationTask(...)` gives the term and the end of the window. After `validate`, and before
the checkpoint is saved,

    task.evaluated(eval_metrics, lr=optimizer.param_groups[0]["lr"])

looks whether the student beats its teacher, and writes first@tau. timm's checkpoints keep the state of the method.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from w2s import require
from w2s.adapters.taught import TaughtRun
from w2s.teacher import Teacher

try:
    from timm.task import ClassificationTask, DistillationTeacher
    from timm.utils import unwrap_model
except ModuleNotFoundError:
    require("cls", "timm")  # says which extra installs it
    raise


class EarlyDistillationTask(ClassificationTask):
    """Task loss plus lambda(u) T(u)^2 KL(teacher || student), until the teacher falls silent.

    With a constant lambda and T this is `timm.task.LogitDistillationTask` of `task_loss_weight` 1. The teacher is no
    part of the module: it is in no state dict, and gone when it is silent.

    Args:
        model: the student, a timm model; its `pretrained_cfg` says how its images are normalised.
        run: the run, whose teacher is a timm model too and gets the images in its own normalisation. Its metric is one
            of timm's evaluator, as "top1". Without a phase, the student trains alone and is recorded alike.
        batches_per_epoch: length of the training loader.
        grad_accum_steps: batches in an update, `--grad-accum-steps`.
        eval_loaders: "report", the validation loader, and "switch", which gives a held-out slice of the training data
            in the same way and decides the switch-off. The teacher is measured on both, once.
        task_options: those of `timm.task.ClassificationTask`: criterion, criterion_kwargs, device, dtype, verbose.
    """

    def __init__(
        self,
        model: nn.Module,
        run: TaughtRun,
        *,
        batches_per_epoch: int,
        grad_accum_steps: int = 1,
        eval_loaders: dict[str, Iterable],
        **task_options: object,
    ) -> None:
        super().__init__(model, **task_options)
        self.run, self.batches_per_epoch, self.grad_accum_steps = run, batches_per_epoch, grad_accum_steps
        self.eval_loaders = eval_loaders
        self.batches = 0  # done so far
        run.adapt_teacher(lambda teacher: _Renormalised(teacher, student=unwrap_model(model)))

    @property
    def updates_per_epoch(self) -> int:
        """As train.py counts them: the last batches of an epoch make an update of their own."""
        return math.ceil(self.batches_per_epoch / self.grad_accum_steps)

    @property
    def update(self) -> int:
        """The update that the next batch belongs to."""
        epoch, batch = divmod(self.batches, self.batches_per_epoch)
        return epoch * self.updates_per_epoch + batch // self.grad_accum_steps

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and parts of it for a batch, as timm's tasks return them.

        Args:
            input: images (B, C, H, W).
            target: labels (B,), or mixed ones (B, classes).
        """
        self._begin()
        if self.batches % self.batches_per_epoch % self.grad_accum_steps == 0:
            self.run.advance(self.update)
        result = super().forward(input, target)
        term = self.run.term(result["output"], input)
        result |= {"loss": result["loss"] + term, "task_loss": result["loss"], "kd_loss": term}
        self.batches += 1
        self.run.saw(len(target) * _processes())
        return result

    def evaluated(self, eval_metrics: dict[str, float], lr: float | None = None) -> None:
        """After a validation: the switch-off, and the evaluation written down.

        Args:
            eval_metrics: what timm's `validate` returned.
            lr: the learning rate, for the record.
        """
        self._begin()
        switch = None
        if self.run.distillation.active:
            switch = self._metric(self.get_eval_model(ema=self.has_ema()), "switch")
        self.run.evaluated(self.update, report=eval_metrics[self.run.metric], switch=switch, lr=lr)

    def finish(self) -> None:
        """After the last epoch: close the record."""
        self.run.finish()

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict:
        """What timm's checkpoint keeps as `task_state`."""
        return {} if ema else {"batches": self.batches, **self.run.state_dict()}

    def load_task_state(
        self, state: dict | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Continue from a checkpoint; train.py does so at the beginning of the next epoch, and so does the task."""
        if state and not ema:
            self.batches = math.ceil(state["batches"] / self.batches_per_epoch) * self.batches_per_epoch
            self.run.load_state_dict(state)

    def _begin(self) -> None:
        """Begin the run at the first batch, when a checkpoint has been read if there is one."""
        if self.run.begun:
            return
        self.run.begin(
            updates_per_epoch=self.updates_per_epoch,
            device=torch.device(self.device),
            processes=_processes(),
            is_main=not dist.is_initialized() or dist.get_rank() == 0,
            score=lambda teacher: {split: self._metric(teacher, split) for split in ("report", "switch")},
            params=sum(p.numel() for p in self.get_trainable_module().parameters()),
            options={"batches_per_epoch": self.batches_per_epoch, "grad_accum_steps": self.grad_accum_steps},
        )

    def _metric(self, model: nn.Module | Teacher, split: str) -> float:
        """The run's metric by timm's evaluator. A student is in eval mode, as `validate` leaves it."""
        evaluator = self.create_evaluator()
        with torch.inference_mode():
            for images, targets in self.eval_loaders[split]:
                evaluator.update(model(images.to(self.device)), targets.to(self.device))
        return evaluator.compute(distributed=dist.is_initialized())[self.run.metric]


class _Renormalised(nn.Module):
    """A timm model that takes images normalised for another, as timm's distillation tasks do it."""

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.teacher = DistillationTeacher(teacher)
        for name in ("mean", "std"):
            values = torch.tensor(student.pretrained_cfg[name]).view(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.teacher(self.teacher.normalize_input(images, self.mean, self.std))


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
