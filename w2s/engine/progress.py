"""The progress bar of a run and the lines that its log gets between two evaluations."""

from tqdm import tqdm

from w2s.distillation import Distillation
from w2s.engine.plan import Plan
from w2s.engine.run import Run


class Progress:
    """Shows how far a run is, and how fast.

    Args:
        run, plan, distillation: of the job.
        interval: --log-interval, updates between two lines.
    """

    def __init__(self, run: Run, plan: Plan, distillation: Distillation, interval: int) -> None:
        self.run, self.plan, self.distillation, self.interval = run, plan, distillation, interval
        self.bar = tqdm(total=plan.total, unit="update", disable=None if run.is_main else True)
        self._last = (0, 0.0)  # update and train seconds of the last line

    def show(self, update: int, losses: list, lr: float) -> None:
        """Advance to an update that is done; log its loss, task loss and kd loss where a line is due.

        Args:
            losses: scalars, on the device until a line needs them.
            lr: the learning rate of the update.
        """
        self.bar.update(update - self.bar.n)
        if update % self.interval:
            return
        kd, seconds = self.distillation, self.run.clock.train_seconds
        (last_update, last_seconds), self._last = self._last, (update, seconds)
        loss, task_loss, kd_loss = (float(value) for value in losses)
        text = f"loss {loss:.4f}"
        if kd.weight > 0:
            terms = f"task {task_loss:.4f} + {kd.weight * float(kd.ratio):.3g} x kd {kd_loss:.4f}"
            text += f" = {terms}" if kd.scale == 1 else f" = {float(kd.scale):.3g} x ({terms})"
            text += f" (T {kd.temperature:.2f})"
        text += f" lr {lr:.3g}"
        if 0 < last_seconds < seconds:
            text += f" {(update - last_update) * self.plan.batch / (seconds - last_seconds):.0f} samples/s"
        self.bar.set_postfix_str(text)
        epoch = update / self.plan.updates_per_epoch
        self.run.log(f"epoch {epoch:.2f} update {update}/{self.plan.total} {text}")
