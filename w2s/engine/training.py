"""The bookkeeping around a training loop that is the same for every task; the loop itself stands in the script.

A script's loop reads:

    for _ in job.updates(stop):       # seeds, learning rate, lambda(u), the end of the window
        ...forward, task loss, distillation term, backward...
        job.step(losses)              # clipping, optimiser, EMA, counters, the decision to stop
    job.evaluated(metrics)            # metrics.csv, first@tau, the best model
    job.save()                        # a checkpoint, and the way out if a signal asked for it
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from timm.models import model_parameters
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from tqdm import tqdm

from w2s.distillation import Distillation
from w2s.engine.errors import Preempted
from w2s.engine.messages import first_lines, last_lines
from w2s.engine.plan import Plan, accumulation_dtype
from w2s.engine.run import Run

WARMUP_UPDATES = 2  # left out of train seconds after each start: compilation, allocator, autotuning


class Job:
    """A student in training, with or without a teacher.

    Args:
        args: resolved options; this reads --clip-grad, --clip-mode, --log-interval and --recovery-interval.
        run: the run that this job belongs to.
        plan: its updates.
        distillation: the method.
        student: the bare module.
        model: the same module as Accelerate prepared it (autocast, DDP).
        ema: the moving average of its weights, or None.
        optimizer, scheduler: prepared, and not prepared.
        flops: `student_update` and `teacher_forward` of one update over all processes.
        export: (module, folder) -> None; writes the model for others to load.
        terms: names of further losses that are averaged and recorded; those called kd_* over the taught updates only.
    """

    def __init__(
        self,
        args,
        run: Run,
        plan: Plan,
        distillation: Distillation,
        *,
        student: nn.Module,
        model: nn.Module,
        ema: ModelEmaV3 | None,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler,
        flops: dict,
        export: Callable[[nn.Module, Path], None],
        terms: tuple[str, ...] = (),
    ) -> None:
        self.run, self.plan, self.distillation = run, plan, distillation
        self.student, self.model, self.ema = student, model, ema
        self.optimizer, self.scheduler = optimizer, scheduler
        self.flops, self.export, self.terms = flops, export, terms
        self.clip_grad, self.clip_mode = args.clip_grad, args.clip_mode
        self.log_interval, self.recovery_interval = args.log_interval, args.recovery_interval
        self.update = self.started_from = 0  # updates done, and done before this process
        self.stopped = False  # a signal ended the loop
        # sums since the last evaluation: updates, taught updates, loss, task loss, kd loss, terms
        self.meter = torch.zeros(5 + len(terms), dtype=accumulation_dtype(run.device), device=run.device)
        self.bar = tqdm(total=plan.total, unit="update", disable=None if run.is_main else True)
        self._last_logged = (0, 0.0)  # update, train seconds
        self._silence_noted = False
        self._clipped = list(model_parameters(student, exclude_head="agc" in self.clip_mode))

    @property
    def epoch(self) -> float:
        """Passes over the training data so far."""
        return self.update / self.plan.updates_per_epoch

    @property
    def evaluated_model(self) -> nn.Module:
        """The weights that are evaluated, compared and exported: the moving average where there is one."""
        return self.ema.module if self.ema else self.student

    def resume(self) -> None:
        """Continue where the run's checkpoint stands, if it has one."""
        state = self.run.state
        if state:
            self.run.load(self.ema and self.ema.module)
            self.update = self.started_from = state["update"]
            self.meter += self.meter.new_tensor(state["meter"])
            self.bar.update(self.update)
            self._silence_noted = self.distillation.off is not None

    def facts(self) -> dict:
        """What summary.json holds of this job."""
        return {
            "teacher": self.distillation.score,
            "kd_off": self.distillation.off,
            "flops": self.flops,
            "params": sum(p.numel() for p in self.student.parameters()),
            "weights": "ema" if self.ema else "raw",
        }

    # ---- updates ----

    def updates(self, stop: int) -> Iterator[int]:
        """Prepare each update until `stop` of them are done, or a signal asks to stop after a whole one."""
        self.model.train()
        while self.update < stop and not self.stopped:
            self.run.seed_update(self.update)
            self.scheduler.step_update(self.update)
            self.distillation.advance(self.update)
            self._note_silence()
            yield self.update
            self.distillation.advance(self.update)  # so that a checkpoint at the end of the window knows of its end
            self._note_silence()
            self.stopped = self.run.should_stop(self.update, now=self.update == stop)

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Synchronise gradients only in the last micro-batch of an update."""
        with contextlib.nullcontext() if last else self.run.accelerator.no_sync(self.model):
            yield

    def step(self, losses: Tensor) -> None:
        """Finish an update whose gradients are complete.

        Args:
            losses: loss, task loss, kd loss and the further terms, (3 + terms,), means over the micro-batches.
        """
        run = self.run
        if self.clip_grad is not None:
            run.accelerator.unscale_gradients()
            dispatch_clip_grad(self._clipped, self.clip_grad, mode=self.clip_mode)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update += 1
        if self.ema:
            self.ema.update(self.student, step=self.update)
        taught = self.distillation.count_update()
        run.watch(losses[0])
        # made on the device: no copy to wait for
        counts = torch.stack([torch.ones_like(losses[0]), torch.full_like(losses[0], float(taught))])
        self.meter += torch.cat([counts, losses])
        self.bar.update()
        if not run.clock.running and self.update - self.started_from >= WARMUP_UPDATES:
            run.clock.start()
            self.distillation.restart_timer()
        if self.update % self.log_interval == 0:
            self._log_progress(*losses[:3].tolist())

    def _log_progress(self, loss: float, task_loss: float, kd_loss: float) -> None:
        kd, seconds = self.distillation, self.run.clock.train_seconds
        last_update, last_seconds = self._last_logged
        self._last_logged = (self.update, seconds)
        text = f"loss {loss:.4f}"
        if kd.weight > 0:
            text += f" = task {task_loss:.4f} + {kd.weight:.3g} x kd {kd_loss:.4f} (T {kd.temperature:.2f})"
        text += f" lr {self.optimizer.param_groups[0]['lr']:.3g}"
        if last_seconds:
            rate = (self.update - last_update) * self.plan.batch / (seconds - last_seconds)
            text += f" {rate:.0f} samples/s"
        self.bar.set_postfix_str(text)
        self.run.log(f"epoch {self.epoch:.2f} update {self.update}/{self.plan.total} {text}")

    # ---- evaluations ----

    def next_stop(self, evaluation: int) -> tuple[int, bool]:
        """The update to train to, and whether to evaluate there; `evaluation` is where the next evaluation is due."""
        evaluation = min(evaluation, self.plan.total)
        interval = self.recovery_interval
        recovery = (self.update // interval + 1) * interval if interval else evaluation
        return min(evaluation, recovery), evaluation <= recovery

    def model_to_evaluate(self) -> nn.Module:
        """`evaluated_model` in eval mode, with the same BatchNorm statistics on all processes."""
        self.run.share_buffers(self.evaluated_model)
        return self.evaluated_model.eval()

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Write down the reported metrics of an evaluation and keep the best model."""
        run, record, kd = self.run, self.run.record, self.distillation
        self._note_silence()
        if not all(map(math.isfinite, metrics.values())):  # the last update may have broken the weights unnoticed
            run.fail(f"the evaluation at update {self.update} is not finite: {metrics}")
        losses = self._take_mean_losses()
        self._take_teacher_seconds()
        evaluation = kd.take_evaluation()
        flops = self.update * self.flops["student_update"] + kd.updates * self.flops["teacher_forward"]
        is_best = record.add(
            epoch=self.epoch,
            update=self.update,
            samples=self.update * self.plan.batch,
            train_seconds=run.clock.train_seconds,
            total_seconds=run.clock.total_seconds,
            teacher_seconds=run.clock.teacher_seconds,
            pflops=flops / 1e15,
            lr=self.optimizer.param_groups[0]["lr"],
            **losses,
            **evaluation,
            **metrics,
        )
        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if "switch" in evaluation:
            values += f"; switch split {evaluation['switch']:.4g}, teacher {kd.score['switch']:.4g}"
        run.log(f"epoch {self.epoch:.4g}, update {self.update}: {values}")
        if is_best and run.keeps and run.is_main:
            self.export(self.evaluated_model, run.folder / "best")

    def _take_mean_losses(self) -> dict[str, float]:
        """The mean losses since the last evaluation by column; those called kd_* over the taught updates, if any."""
        updates, taught, *sums = self.run.mean(self.meter)
        self.meter.zero_()
        means = {}
        for name, total in zip(("train_loss", "task_loss", "kd_loss", *self.terms), sums, strict=True):
            if not name.startswith("kd_"):
                means[name] = total / updates
            elif taught:
                means[name] = total / taught
        return means

    def _take_teacher_seconds(self) -> None:
        self.run.clock.teacher_seconds += self.distillation.take_seconds()

    def _note_silence(self) -> None:
        """Record that the teacher has fallen silent, once."""
        if self.distillation.off is None or self._silence_noted:
            return
        self._silence_noted = True
        self._take_teacher_seconds()
        off = self.distillation.off
        self.run.record.write_summary(kd_off=off)
        self.run.log("distillation off for good at epoch {epoch:.4g}, update {update} ({reason})".format(**off))

    # ---- checkpoints, the first lines and the last ----

    def save(self) -> None:
        """Write a checkpoint: after an evaluation, at a --recovery-interval, or because of a signal.

        Raises:
            Preempted: after it is written, if a signal ended the loop before the run was done.
        """
        self._take_teacher_seconds()
        self.run.save(
            self.update,
            ema=self.ema and self.ema.module,
            flops=self.flops,
            meter=self.run.mean(self.meter),
            **self.distillation.state_dict(),
        )
        if self.stopped and self.update < self.plan.total:
            self.run.finish("preempted")
            raise Preempted(f"stopped by a signal and saved at update {self.update}; go on with --resume auto")

    def finish(self) -> None:
        """Export the final model, close the run and say what happened."""
        run = self.run
        self.bar.close()
        if run.keeps and run.is_main:
            self.export(self.evaluated_model, run.folder / "model")
        summary = run.record.summary()
        for line in last_lines(summary, place=str(run.folder) if run.keeps else "nothing kept"):
            run.log(line)
        run.finish("finished")

    def describe(self, model: str, optimizer: str, data: dict, targets: list[float], metric: str) -> None:
        """Log the first lines: what will happen. `data` holds the sizes of the splits by name."""
        for line in first_lines(
            self.run,
            self.plan,
            self.distillation,
            student=self.student,
            model=model,
            optimizer=optimizer,
            data=data,
            averaged=self.ema is not None,
            metric=metric,
            targets=targets,
            flops=self.flops,
        ):
            self.run.log(line)
