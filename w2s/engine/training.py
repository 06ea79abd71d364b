"""The bookkeeping around a training loop that is the same for every task; the loop itself stands in the script.

A script's loop reads:

    for _ in job.updates(stop):           # learning rate, lambda(u), the end of the window
        for _ in job.micro_batches():     # seeds
            with job.accumulating():      # gradients are synchronised in the last one only
                ...forward, task loss, distillation term, backward...
        job.step(losses)                  # clipping, optimiser, EMA, counters, the decision to stop
    with job.saved() as evaluate:         # a checkpoint, and the way out if a signal asked for it
        if evaluate:
            job.evaluated(metrics)        # metrics.csv, first@tau, the best model
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from w2s.distillation import Distillation
from w2s.engine.errors import Preempted
from w2s.engine.launch import share_buffers
from w2s.engine.messages import first_lines, last_lines, scores_text
from w2s.engine.meter import LossMeter
from w2s.engine.optim import clipped_parameters
from w2s.engine.plan import Plan, compilations
from w2s.engine.progress import Progress
from w2s.engine.run import Run
from w2s.engine.sharding import weights_norm
from w2s.engine.tensors import Trained

WARMUP_UPDATES = 2  # left out of train seconds after each start: compilation, allocator, autotuning


class Job:
    """A student in training, with or without a teacher.

    Args:
        args: resolved options; this reads --clip-*, --log-interval, --recovery-interval and --grad-accum-steps.
        run: the run that this job belongs to.
        plan: its updates.
        distillation: the method.
        student: the bare module.
        model: the same module, perhaps with branches, as Accelerate prepared it (autocast, DDP).
        ema: the moving average of its weights, or None.
        optimizer, scheduler: prepared, and not prepared.
        flops: `student_update`, `teacher_forward` and `branches` of one update over all processes.
        export: (module, folder) -> None, called by all processes; writes the model for others to load.
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
        self.clip_grad, self.clip_mode, self.recovery_interval = args.clip_grad, args.clip_mode, args.recovery_interval
        self.accum, self._micro = args.grad_accum_steps, 0  # micro-batches of an update, and the one under way
        self.update = self.started_from = 0  # updates done, and done before this process
        self.stopped = self._silence_noted = False  # a signal ended the loop; the end of the teacher is recorded
        self.skipped = 0  # updates that a gradient scaler skipped, because a gradient had overflowed
        self.meter = LossMeter(run.accelerator, terms)
        self._evaluate_at: int | None = None  # the update of the next evaluation
        self.progress = Progress(run, plan, distillation, interval=args.log_interval)
        bare = run.accelerator.unwrap_model(model, keep_torch_compile=False)
        self._trained = Trained(bare, ema and ema.module, optimizer, run.accelerator.scaler)  # of the checkpoints
        self._clipped = clipped_parameters(student, bare, mode=self.clip_mode)

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
        if state := self.run.state:
            self.run.load(self._trained)
            self.update = self.started_from = state["update"]
            self._evaluate_at = self.update if state["evaluation_due"] else None
            self.meter.load_state(state["meter"])
            self.skipped, self._silence_noted = state["skipped"], self.distillation.off is not None

    def facts(self) -> dict:
        """What summary.json holds of this job."""
        return {
            **self.distillation.facts(),
            "flops": self.flops,
            "params": sum(p.numel() for p in self.student.parameters()),
            "weights": "ema" if self.ema else "raw",
            "skipped_updates": self.skipped,
        }

    # ---- updates ----

    def updates(self, stop: int) -> Iterator[int]:
        """Prepare each update until `stop` of them are done, or a signal asks to stop after a whole one."""
        self.model.train()
        kd = self.distillation
        while self.update < stop and not self.stopped and not kd.handing_over:
            self.scheduler.step_update(self.update)
            kd.advance(self.update)
            self._note_silence()
            compiled, seconds = compilations(), self.run.clock.train_seconds
            yield self.update
            if compilations() > compiled:
                self.run.clock.set_back(seconds)
                kd.forget_update()
            kd.advance(self.update)  # so that a checkpoint at the end of the window knows of its end
            self._note_silence()
            self.stopped = self.run.should_stop(self.update, now=self.update == stop or kd.handing_over)

    def micro_batches(self) -> Iterator[int]:
        """Prepare each micro-batch of an update: its number."""
        for micro in range(self.accum):
            self._micro = micro
            self.run.seed_micro_batch(self.update, micro)
            yield micro

    def accumulating(self) -> contextlib.AbstractContextManager:
        """Synchronise gradients only in the last micro-batch of an update."""
        last = self._micro == self.accum - 1
        return contextlib.nullcontext() if last else self.run.accelerator.no_sync(self.model)

    def step(self, losses: Tensor) -> None:
        """Finish an update whose gradients are complete.

        Args:
            losses: loss, task loss, kd loss and the further terms, (3 + terms,), means over the micro-batches.
        """
        run = self.run
        if self.clip_grad is not None:
            run.accelerator.unscale_gradients()
            dispatch_clip_grad(self._clipped, self.clip_grad, mode=self.clip_mode)
        run.seed_step(self.update)
        self.optimizer.step()
        skipped = self.optimizer.step_was_skipped  # by a gradient scaler, on all processes
        self.optimizer.zero_grad()
        self.update += 1
        taught = self.distillation.count_update()
        run.stopping.watch(losses[0])
        if skipped:  # it counts as an update: the data, the learning rate and lambda are functions of their number
            self.skipped += 1
        else:
            self.meter.add(losses, taught)
            if self.ema:
                self.ema.update(self.student, step=self.update)
        if not run.clock.running and self.update - self.started_from >= WARMUP_UPDATES:
            run.clock.start()
            self.distillation.restart_timer()
        self.progress.show(self.update, losses[:3], lr=self.optimizer.param_groups[0]["lr"])

    # ---- evaluations ----

    @property
    def evaluation_due(self) -> bool:
        """Whether the weights of this update are still to be evaluated."""
        return self.update == self._evaluate_at

    @property
    def done(self) -> bool:
        """Whether all updates and evaluations of the run are done."""
        return self.update >= self.plan.total and not self.evaluation_due

    def next_stop(self, evaluation: int) -> int:
        """The update to train to: `evaluation`, or this one if the run was resumed where an evaluation is due."""
        if self.evaluation_due:
            return self.update
        self._evaluate_at = min(evaluation, self.plan.total)
        interval = self.recovery_interval
        recovery = (self.update // interval + 1) * interval if interval else self._evaluate_at
        return min(self._evaluate_at, recovery)

    @contextlib.contextmanager
    def saved(self) -> Iterator[bool]:
        """Save, have the block evaluate where that is due, and save again, all of it outside the train seconds.

        What was trained is safe before the evaluation begins; a resumed run goes on with one that was not finished.
        Where one of several teachers has fallen silent, the next one takes over at the end.

        Raises:
            NonFiniteLoss: the weights are broken; nothing is saved.
            Preempted: a signal asked for it, in the updates before or during the evaluation.
        """
        run, due = self.run, self.evaluation_due
        with run.clock.paused():
            if not weights_norm(self.student).isfinite():
                run.fail(f"the weights are not finite after update {self.update}")
            self._save()
            if self.stopped and not self.done:
                run.preempt()
            try:
                yield due
                if due:
                    self._evaluate_at = None
                    self._save()
                if self.distillation.handing_over and not self.done:
                    self.distillation.hand_over(self.update, student=self.model_to_evaluate)
                    self._note_silence()
                    self._save()
            except Preempted:
                run.preempt()

    def model_to_evaluate(self) -> nn.Module:
        """`evaluated_model` in eval mode, with the same BatchNorm statistics on all processes."""
        share_buffers(self.evaluated_model)
        return self.evaluated_model.eval()

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Write down the reported metrics of an evaluation and keep the best model."""
        run, record, kd = self.run, self.run.record, self.distillation
        self._note_silence()
        if not all(map(math.isfinite, metrics.values())):
            run.fail(f"the evaluation at update {self.update} is not finite: {metrics}")
        losses = self.meter.take_means()
        self._take_teacher_seconds()
        evaluation = kd.take_evaluation()
        running = evaluation.pop("running", None)
        taught = self.flops["teacher_forward"] + self.flops.get("branches", 0)
        flops = self.update * self.flops["student_update"] + kd.taught_flops(taught)
        record.facts |= {**kd.facts(), "skipped_updates": self.skipped}
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
        run.log(f"epoch {self.epoch:.4g}, update {self.update}: {scores_text(metrics, evaluation, kd.score, running)}")
        if self.skipped:
            run.log(f"{self.skipped} updates so far were skipped, because a gradient overflowed in fp16")
        if is_best and run.keeps:
            self.export(self.evaluated_model, run.folder / "best")

    def _take_teacher_seconds(self) -> None:
        self.run.clock.teacher_seconds += self.distillation.take_seconds()

    def _note_silence(self) -> None:
        """Record that the teacher has fallen silent, once."""
        if self.distillation.off is None or self._silence_noted:
            return
        self._silence_noted = True
        self._take_teacher_seconds()
        self.run.record.write_summary(**self.distillation.facts())
        self.run.log(self.distillation.describe_off())

    # ---- checkpoints, the first lines and the last ----

    def _save(self) -> None:
        self._take_teacher_seconds()
        sums = {"flops": self.flops, "meter": self.meter.state(), "skipped": self.skipped, "batch": self.plan.batch}
        state = {**sums, "evaluation_due": self.evaluation_due, **self.distillation.state_dict()}
        self.run.save(self.update, self._trained, **state)

    def finish(self) -> None:
        """Export the final model, close the run and say what happened."""
        run = self.run
        self.progress.bar.close()
        if run.keeps:
            self.export(self.evaluated_model, run.folder / "model")
        for line in last_lines(run.record.summary(), place=str(run.folder) if run.keeps else "nothing kept"):
            run.log(line)
        run.finish("finished")

    def describe(self, model: str, optimizer: str, data: dict, targets: list[float], metric: str) -> None:
        """Log the first lines: what will happen, see `first_lines`."""
        given = {"model": model, "optimizer": optimizer, "data": data, "targets": targets, "metric": metric}
        own = {"student": self.student, "averaged": self.ema is not None, "flops": self.flops}
        for line in first_lines(self.run, self.plan, self.distillation, **own, **given):
            self.run.log(line)
