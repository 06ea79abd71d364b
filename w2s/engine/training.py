"""The bookkeeping around a training loop that is the same for every task; the loop itself stands in the script.

A script's loop reads:

    for _ in job.updates(stop):                    # seeds, learning rate, lambda(u), the end of the window
        ...forward, task loss, distillation term, backward...
        job.step(loss, task_loss, kd_loss)         # clipping, optimiser, EMA, counters, the decision to stop
    job.evaluated(metrics, switch_metric)          # metrics.csv, first@tau, the switch-off, the best model
    job.save()                                     # a checkpoint, and the way out if a signal asked for it
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from timm.models import model_parameters
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from w2s.crossing import target_key
from w2s.engine.errors import Preempted
from w2s.engine.run import Run
from w2s.schedule import EarlyPhase
from w2s.teacher import Teacher

WARMUP_UPDATES = 2  # left out of train seconds after each start: compilation, allocator, autotuning


@dataclass
class Job:
    """A student in training, with or without a teacher.

    `model` is what Accelerate prepared (autocast, DDP), `student` the bare module inside it. `flops` has
    `student_update` and `teacher_forward` of one update over all processes, `samples` the examples of one update.
    u, of which lambda and T are functions, counts epochs, or updates where `unit` is "update".
    """

    run: Run
    model: nn.Module
    student: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    phase: EarlyPhase | None
    teacher: Teacher | None
    teacher_facts: dict | None
    flops: dict
    updates_per_epoch: int
    total: int  # updates of the whole run
    samples: int
    export: Callable  # (module, folder): writes the model for others to load
    unit: str = "epoch"  # what u counts
    terms: tuple[str, ...] = ()  # further losses that are averaged and written down, kd_* over the taught updates
    update: int = 0  # updates done
    kd_updates: int = 0  # of these, with the teacher
    kd_weight: float = 0.0  # lambda of the update under way
    kd_temperature: float = 1.0
    stopped: bool = False  # a signal ended the loop
    meter: Tensor = field(init=False)  # sums since the last evaluation: updates, kd updates, loss, task, kd, terms

    def __post_init__(self) -> None:
        self.meter = torch.zeros(5 + len(self.terms), dtype=wide(self.run.device), device=self.run.device)
        self.first = self.update
        self.bar = tqdm(total=self.total, unit="update", disable=None if self.run.is_main else True)
        self._logged = (0, 0.0)
        self._clipped = list(model_parameters(self.student, exclude_head="agc" in self.run.args.clip_mode))

    @property
    def epoch(self) -> float:
        """Passes over the training data."""
        return self.update / self.updates_per_epoch

    @property
    def progress(self) -> float:
        """u."""
        return self.epoch if self.unit == "epoch" else float(self.update)

    @property
    def evaluated_model(self) -> nn.Module:
        """The weights that are evaluated, compared and exported: the moving average where there is one."""
        return self.ema.module if self.ema else self.student

    @property
    def kd_off(self) -> dict | None:
        """Where and why the teacher fell silent, as in summary.json; None while it speaks or where there is none."""
        if not self.phase or self.phase.active:
            return None
        per_unit = self.updates_per_epoch if self.unit == "epoch" else 1
        update = round(self.phase.kd_off["at"] * per_unit)
        return {"epoch": update / self.updates_per_epoch, "update": update, "reason": self.phase.reason}

    def resume(self) -> None:
        """Continue where the run's checkpoint stands, if it has one."""
        state = self.run.state
        if state:
            self.run.load(self.ema and self.ema.module)
            self.update = self.first = state["update"]
            self.kd_updates = state["kd_updates"]
            self.meter += self.meter.new_tensor(state["meter"])
            self.bar.update(self.update)

    def updates(self, stop: int) -> Iterator[int]:
        """Prepare each update until `stop` of them are done, or a signal asks to stop after a whole one."""
        self.model.train()
        while self.update < stop and not self.stopped:
            self.run.seed_update(self.update)
            self.scheduler.step_update(self.update)
            self._advance()
            yield self.update
            self._advance()  # so that a checkpoint at the end of the window knows of it
            self.stopped = self.run.should_stop(self.update, now=self.update == stop)

    def _advance(self) -> None:
        """lambda(u) and T(u) of the update to come; the switch-off where the window ends."""
        if self.phase:
            if self.phase.active and not self.phase.advance(self.progress):
                self.switch_off()
            self.kd_weight = self.phase.weight(self.progress)
            self.kd_temperature = self.phase.temperature(self.progress)

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Leave gradients unsynchronised but for the last micro-batch of an update."""
        with contextlib.nullcontext() if last else self.run.accelerator.no_sync(self.model):
            yield

    def step(self, loss: Tensor, task_loss: Tensor, kd_loss: Tensor, *terms: Tensor) -> None:
        """Finish an update whose gradients are complete; the losses are means over its micro-batches."""
        run, args = self.run, self.run.args
        if args.clip_grad is not None:
            run.accelerator.unscale_gradients()
            dispatch_clip_grad(self._clipped, args.clip_grad, mode=args.clip_mode)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update += 1
        if self.ema:
            self.ema.update(self.student, step=self.update)
        taught = float(self.kd_weight > 0)
        self.kd_updates += int(taught)
        run.watch(loss)
        counts = torch.ones_like(loss), torch.full_like(loss, taught)  # made on the device: no copy to wait for
        self.meter += torch.stack([*counts, loss, task_loss, kd_loss, *terms]).detach()
        self.bar.update()
        if not run.clock.running and self.update - self.first >= WARMUP_UPDATES:
            run.clock.start()
            if self.teacher:
                self.teacher.restart_timer()
        if self.update % args.log_interval == 0:
            self._log_progress(loss, task_loss, kd_loss)

    def _log_progress(self, loss: Tensor, task_loss: Tensor, kd_loss: Tensor) -> None:
        seconds = self.run.clock.train_seconds
        updates, before = self._logged
        self._logged = (self.update, seconds)
        rate = (self.update - updates) * self.samples / (seconds - before) if before else math.nan
        terms = f"loss {loss:.4f}"
        if self.kd_weight > 0:
            terms += f" = task {task_loss:.4f} + {self.kd_weight:.3g} x kd {kd_loss:.4f} (T {self.kd_temperature:.2f})"
        terms += f" lr {self.optimizer.param_groups[0]['lr']:.3g}" + (f" {rate:.0f} samples/s" if before else "")
        self.bar.set_postfix_str(terms)
        self.run.log(f"epoch {self.epoch:.2f} update {self.update}/{self.total} {terms}")

    def take_teacher_seconds(self) -> None:
        """Move the teacher's timings to the clock."""
        if self.teacher:
            self.run.clock.teacher_seconds += self.teacher.take_seconds()

    def evaluated(self, metrics: dict[str, float], switch: float | None) -> None:
        """Write down an evaluation, decide on the switch-off, keep the best model.

        Args:
            metrics: the reported metrics of `evaluated_model`.
            switch: its metric on the switch split; None where no teacher is active.
        """
        run, record = self.run, self.run.record
        if not all(map(math.isfinite, metrics.values())):  # the last update may have broken the weights unseen
            run.fail(f"the evaluation at update {self.update} is not finite: {metrics}")
        updates, taught, *sums = run.mean(self.meter)
        self.meter.zero_()
        losses = {
            name: total / (taught if name.startswith("kd_") else updates)
            for name, total in zip(("train_loss", "task_loss", "kd_loss", *self.terms), sums, strict=True)
            if taught or not name.startswith("kd_")
        }
        self.take_teacher_seconds()
        flops = self.update * self.flops["student_update"] + self.kd_updates * self.flops["teacher_forward"]
        row = {"kd_active": 0, "kd_weight": 0.0}
        if self.teacher:
            row = {"kd_weight": self.phase.weight(self.progress), f"switch_{record.metric}": switch}
            row["kd_temperature"] = self.phase.temperature(self.progress)
            row["kd_active"] = int(self.phase.observe(switch, self.teacher_facts["switch"], self.progress))
            if not row["kd_active"]:
                self.switch_off()
        is_best = record.add(
            epoch=self.epoch,
            update=self.update,
            samples=self.update * self.samples,
            train_seconds=run.clock.train_seconds,
            total_seconds=run.clock.total_seconds,
            teacher_seconds=run.clock.teacher_seconds,
            pflops=flops / 1e15,
            lr=self.optimizer.param_groups[0]["lr"],
            **losses,
            **row,
            **metrics,
        )
        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if switch is not None:
            values += f"; switch split {switch:.4g}, teacher {self.teacher_facts['switch']:.4g}"
        run.log(f"epoch {self.epoch:.4g}, update {self.update}: {values}")
        if is_best and run.keeps and run.is_main:
            self.export(self.evaluated_model, run.folder / "best")

    def switch_off(self) -> None:
        """Drop the teacher for good."""
        self.take_teacher_seconds()
        if self.teacher:
            self.teacher.release()
            self.teacher = None
        self.run.record.write_summary(kd_off=self.kd_off)
        self.run.log("distillation off for good at epoch {epoch:.4g}, update {update} ({reason})".format(**self.kd_off))

    def next_stop(self, evaluation: int) -> tuple[int, bool]:
        """The update to train to, and whether to evaluate there; `evaluation` is where the next evaluation is due."""
        evaluation = min(evaluation, self.total)
        interval = self.run.args.recovery_interval
        recovery = (self.update // interval + 1) * interval if interval else evaluation
        return min(evaluation, recovery), evaluation <= recovery

    def save(self) -> None:
        """Write a checkpoint: after an evaluation, at a --recovery-interval, or because of a signal.

        Raises:
            Preempted: after it is written, if a signal ended the loop before the run was done.
        """
        self.take_teacher_seconds()
        self.run.save(
            self.update,
            self.ema and self.ema.module,
            phase=self.phase and self.phase.state_dict(),
            teacher=self.teacher_facts,
            flops=self.flops,
            kd_updates=self.kd_updates,
            meter=self.run.mean(self.meter),
        )
        if self.stopped and self.update < self.total:
            self.run.finish("preempted")
            raise Preempted(f"stopped by a signal and saved at update {self.update}; go on with --resume auto")

    def finish(self) -> None:
        """Export the final model, close the run and say what happened."""
        run = self.run
        self.bar.close()
        if run.keeps and run.is_main:
            self.export(self.evaluated_model, run.folder / "model")
        summary = run.record.summary()
        metric, last, best = summary["metric"], summary["last"], summary["best"]
        kept = f"{run.folder}" if run.keeps else "nothing kept"
        run.log(f"done: {metric} {last:.4g} at the end, {best if best is None else f'{best:.4g}'} at best; {kept}")
        for tau in summary["targets"]:
            first = summary["targets"][tau]["first"]
            cost = first and f"update {first['update']}, {first['train_seconds']:.1f} train seconds"
            where = f"epoch {first['epoch']:.4g}, {cost}" if first else "never"
            run.log(f"first@{tau}: {where}")
        run.finish("finished")

    def describe(self, model_name: str, data: dict, targets: list[float], metric: str, lr: float) -> None:
        """The first lines: what will happen."""
        run, args = self.run, self.run.args
        params = sum(p.numel() for p in self.student.parameters())
        run.log(
            f"{run.name}: {model_name} ({params / 1e6:.2f} M) on {run.device}, {run.accelerator.num_processes} "
            f"process(es), precision {run.accelerator.mixed_precision}, global batch {self.samples}, {args.opt} lr "
            f"{lr:.4g} {args.sched}, {self.total} updates ({self.updates_per_epoch} an epoch)"
        )
        sizes = ", ".join(f"{size} {part}" for part, size in data.items())
        run.log(f"data: {sizes}; {'EMA' if self.ema else 'raw'} weights are evaluated")
        run.log(
            f"targets: {metric} {', '.join(map(target_key, targets)) or 'none'}; PFLOPs an update: student "
            f"{self.flops['student_update'] / 1e15:.3g}, teacher {self.flops['teacher_forward'] / 1e15:.3g}"
        )
        if self.teacher:
            beat = f"{args.kd_patience} evaluations in a row better than {self.teacher_facts['switch']:.4g}"
            run.log(
                f"distillation: lambda {args.kd_weight:g} (warm-up {args.kd_warmup:g}, hold {args.kd_hold:g}, decay "
                f"{args.kd_decay:g} {self.unit}s), T {args.kd_temperature[0]:g} to {args.kd_temperature[-1]:g}; "
                f"off ({args.kd_off}): {beat}"
                + (f"; in the teacher's place: --kd-control {args.kd_control}" if args.kd_control else "")
            )
        elif self.phase:
            run.log(f"distillation: over ({self.phase.reason}); the teacher is not loaded")


def grid_point(update: int, updates_per_epoch: int, evals_per_epoch: int) -> int:
    """The first update after `update` at which one of evenly spread evaluations of an epoch is due."""
    epoch, within = divmod(update, updates_per_epoch)
    grid = (round(k * updates_per_epoch / evals_per_epoch) for k in range(1, evals_per_epoch + 1))
    return epoch * updates_per_epoch + next(point for point in grid if point > within)


def wide(device: torch.device) -> torch.dtype:
    """The widest float of a device, for sums."""
    return torch.float32 if device.type == "mps" else torch.float64


def count_flops(step: Callable[[], object]) -> int:
    """Floating-point operations of a call (torch.utils.flop_counter: matrix products, convolutions, attention)."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
