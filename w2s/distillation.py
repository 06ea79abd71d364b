"""The method in a run, as one object.

The training loop of every script reads

    kd = job.distillation
    if kd.weight > 0:  # L = L_task + lambda(u) L_kd(T(u))
        kd_loss = kl_softmax(logits, kd.teach(images, targets=targets), kd.temperature)
        kd.balance(task_loss, kd_loss, outputs=[logits])  # sets ratio and scale with --kd-balance; they are 1 without
        loss = kd.scale * (task_loss + kd.weight * kd.ratio * kd_loss)

and after an evaluation

    if kd.active:
        kd.observe(student_metric, update=update)

Everything else of the method is in here: lambda(u) and T(u), the end of the window, the comparison with the teacher,
its release, and what a checkpoint keeps of them.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from w2s.controls import Control
from w2s.running import GradientBalance, RunningScores
from w2s.schedule import EarlyPhase
from w2s.teacher import Teacher


class Distillation:
    """Teaches a student early in its training and falls silent for good. Without a phase it is inactive.

    Args:
        phase: the schedule of lambda(u) and T(u), and the rule of the switch-off; None for a student alone.
        control: what stands in for the teacher's knowledge, None for the teacher itself.
        unit: what u counts, "epoch" or "update".
        updates_per_epoch: converts updates to epochs.
        balance: measures the gradients that lambda is then the ratio of; None leaves the terms as they are.
        running: has student and teacher compared on the batches of training instead of the switch split.

    Attributes:
        teacher: the frozen teacher while it is needed, else None.
        since: the update after which it began to teach, from which u is counted.
        score: what summary.json says of the teacher: model, switch, report, params, checkpoint; None without one.
        weight, temperature: lambda(u) and T(u) of the update under way.
        ratio, scale: r and s of `GradientBalance`, scalars on the device; 1.0 without it.
        updates: how many updates the teacher took part in.
        handing_over: whether another teacher is to take this one's place now, see `w2s.engine.ladder`.
    """

    handing_over = False

    def __init__(
        self,
        phase: EarlyPhase | None = None,
        control: Control | None = None,
        unit: str = "epoch",
        updates_per_epoch: int = 1,
        balance: GradientBalance | None = None,
        running: RunningScores | None = None,
    ) -> None:
        self.control, self.unit, self.updates_per_epoch = control, unit, updates_per_epoch
        self._begin(phase, balance=balance, running=running)
        self.teacher: Teacher | None = None
        self.score: dict | None = None
        self.updates = 0
        self._update, self._micro = 0, 0  # which micro-batch of which update `teach` is asked about
        self._seconds = 0.0  # of a teacher that was released, until they are taken
        self._evaluation: dict | None = None

    def _begin(
        self,
        phase: EarlyPhase | None,
        since: int = 0,
        balance: GradientBalance | None = None,
        running: RunningScores | None = None,
    ) -> None:
        """Have a phase begin after so many updates, with nothing measured yet."""
        self.phase, self.since = phase, since
        self.gradients, self.running = balance, running
        self._measured = {"balance": balance, "running": running}  # on the batches of training
        self.weight, self.temperature = 0.0, 1.0
        self.ratio = self.scale = 1.0

    @property
    def active(self) -> bool:
        """Whether the teacher may still speak."""
        return self.phase is not None and self.phase.active

    @property
    def off(self) -> dict | None:
        """Where and why the teacher fell silent: epoch, update, reason. None while it speaks and without a teacher."""
        if self.phase is None or self.phase.active:
            return None
        updates_per_unit = self.updates_per_epoch if self.unit == "epoch" else 1
        update = self.since + round(self.phase.kd_off["at"] * updates_per_unit)
        return {"epoch": update / self.updates_per_epoch, "update": update, "reason": self.phase.reason}

    @property
    def needs_forward(self) -> bool:
        """Whether an update costs a forward of the teacher."""
        return self.teacher is not None and not (self.control and self.control.kind == "uniform")

    def progress(self, update: int) -> float:
        """u after so many updates of the run."""
        update -= self.since
        return update / self.updates_per_epoch if self.unit == "epoch" else float(update)

    def advance(self, update: int) -> None:
        """Settle lambda(u) and T(u) of this update; switch off where the window ends."""
        self._update, self._micro = update, 0
        if self.teacher:
            self.teacher.mark()
        if self.phase is None:
            return
        u = self.progress(update)
        if self.phase.active and not self.phase.advance(u):
            self._release()
        self.weight, self.temperature = self.phase.weight(u), self.phase.temperature(u)

    def teach(self, *inputs: object, targets: Tensor | None = None) -> object:
        """What the student is to learn for these inputs: the teacher's outputs, or what a control puts in their place.

        Args:
            inputs: what the student saw.
            targets: the labels of the batch, which the control `labels` needs.
        """
        micro, self._micro = self._micro, self._micro + 1
        if self.control is None:
            return self.teacher(*inputs)
        return self.control.outputs(
            self.teacher,
            *inputs,
            targets=targets,
            temperature=self.temperature,
            update=self._update,
            micro=micro,
        )

    def balance(self, task_loss: Tensor, kd_loss: Tensor, outputs: Iterable[Tensor]) -> None:
        """Settle r and s for a micro-batch with --kd-balance, see `GradientBalance`.

        Args:
            task_loss, kd_loss: scalars.
            outputs: the student's, from which both losses were computed.
        """
        if self.gradients:
            self.gradients.measure(task_loss, kd_loss, outputs)
            self.ratio, self.scale = self.gradients.ratio, self.gradients.scale(self.weight)

    @torch.no_grad()
    def compare(self, score: Callable[..., Tensor], student: object, teacher: object, *given: object) -> None:
        """With --kd-off running, judge both on a micro-batch by `score(outputs, *given)`: scores (n,), or a loss."""
        if self.running:
            self.running.add(score(student, *given), score(teacher, *given))

    def count_update(self) -> bool:
        """Count the update that was done; returns whether the teacher took part in it."""
        taught = self.weight > 0
        for part in filter(None, self._measured.values()):
            part.end_update()
        self.updates += int(taught)
        return taught

    def taught_flops(self, forward: int) -> int:
        """FLOPs of the teacher's part in all updates so far, where it has `forward` of them in an update."""
        return self.updates * forward

    @property
    def needs_split(self) -> bool:
        """Whether `observe` needs the student's metric on the switch split."""
        return self.active and not self.running

    def observe(self, student: float | None, update: int) -> None:
        """The switch-off: compare the student's metric on the switch split with the teacher's on the same split, or,
        with --kd-off running, what both did in training; `student` is None then.

        A student that is strictly better at `patience` evaluations in a row, or whose teacher has faded to nothing,
        has the teacher released for good.
        """
        u = self.progress(update)
        self._evaluation = {"kd_weight": self.phase.weight(u), "kd_temperature": self.phase.temperature(u)}
        if self.running:
            student, teacher = self._evaluation["running"] = self.running.means()
        else:
            teacher, self._evaluation["switch"] = self.score["switch"], student
        if not self.phase.observe(student, teacher, u):
            self._release()

    def silence(self, update: int, reason: str) -> None:
        """Switch off now, whatever the metrics say."""
        self.phase.switch_off(self.progress(update), reason=reason)
        self._release()

    def take_evaluation(self) -> dict:
        """What the last `observe` saw: kd_weight and kd_temperature before it, the student's metric as `switch` or the
        `running` scores of both, and kd_active after it. Zeros where the teacher was silent already.

        Raises:
            ValueError: the teacher is active and nobody has called `observe`.
        """
        if self.active and self._evaluation is None:
            raise ValueError("the teacher is active: call observe() before the evaluation is written down")
        evaluation, self._evaluation = self._evaluation or {"kd_weight": 0.0}, None
        return {**evaluation, "kd_active": int(self.active)}

    def take_seconds(self) -> float:
        """Seconds spent in the teacher since the last time this was called."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds + (self.teacher.take_seconds() if self.teacher else 0.0)

    def restart_timer(self) -> None:
        """Forget the teacher's calls so far, which were a warm-up."""
        if self.teacher:
            self.teacher.restart_timer()

    def forget_update(self) -> None:
        """Leave the teacher's calls of this update out of its time."""
        if self.teacher:
            self.teacher.forget_marked()

    def compile(self, backend: str) -> None:
        """Compile the teacher with torch.compile, if there is one."""
        if self.teacher:
            self.teacher.compile(backend)

    def _release(self) -> None:
        """Free the teacher. It is never called again."""
        self.weight = 0.0
        if self.teacher:
            self._seconds += self.teacher.take_seconds()
            self.teacher.release()
            self.teacher = None

    def facts(self) -> dict:
        """What summary.json holds of it."""
        return {"teacher": self.score, "kd_off": self.off}

    def describe(self) -> str | None:
        """One line for the start of a run; None for a student alone."""
        if not self.phase:
            return None
        if not self.active:
            return f"distillation: over ({self.phase.reason}); the teacher is not loaded"
        phase = self.phase
        balance = " in gradients" if self.gradients else ""
        fade = ", fading with its lead" if phase.fade and phase.off == "surpass" else ""
        if phase.off == "surpass":
            rival = "the teacher in training" if self.running else f"{self.score['switch']:.4g}"
            rule = "running" if self.running else "surpass"
            wins = "1 evaluation" if phase.patience == 1 else f"{phase.patience} evaluations in a row"
            averaged = phase.fade and phase.patience > 1
            faded = f", or level with it, also on average over {phase.patience}" if averaged else ""
            end = f"off ({rule}): {wins} better than {rival}{faded}"
        else:
            end = "never off" if phase.off == "never" else f"off at {self.unit} {phase.off:g}, whoever is better"
        line = (
            f"distillation: lambda {phase.full_weight:g}{balance} (warm-up {phase.warmup:g}, hold {phase.hold:g}, "
            f"decay {phase.decay:g} {self.unit}s{fade}), T {phase.start_temperature:g} to {phase.end_temperature:g}; "
            f"{end}"
        )
        return line + (f"; in the teacher's place: --kd-control {self.control.kind}" if self.control else "")

    def describe_off(self) -> str:
        """One line for the moment at which the teacher has fallen silent."""
        return "distillation off for good at epoch {epoch:.4g}, update {update} ({reason})".format(**self.off)

    def state_dict(self) -> dict:
        """What a checkpoint keeps; the teacher's weights are not among it."""
        phase = None if self.phase is None else self.phase.state_dict()
        measured = {name: part and part.state_dict() for name, part in self._measured.items()}
        return {"phase": phase, "teacher": self.score, "kd_updates": self.updates, **measured}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a checkpoint; a teacher that was off stays off."""
        self.score, self.updates = state["teacher"], state["kd_updates"]
        if self.phase is not None:
            self.phase.load_state_dict(state["phase"])
        for name, part in self._measured.items():
            if part:
                part.load_state_dict(state[name])
