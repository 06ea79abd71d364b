"""What the method measures on the batches of training themselves, as running means on the device.

Nothing in here waits for the device, and all processes hold the same numbers: what one of them measures reaches the
others once an update, through `reduce`.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

REDUCE = Callable[[Tensor], Tensor]  # a sum or a mean over all processes
TINY = torch.finfo(torch.float32).tiny


class GradientBalance:
    """Makes lambda the ratio of two gradients: `L = s (L_task + lambda r L_kd)`, for `--kd-balance`.

    Both gradients are those with respect to the student's outputs (logits, head outputs, predicted noise), whose norms
    cost next to nothing: no second backward through the network. With |g|^2 and <g, h> as running means,

        r = |g_task| / |g_kd|, so that lambda 1 is as loud as the task, whatever the task, T and the number of classes
        s = |g_task| / |g_task + lambda r g_kd|, so that the whole gradient is as large as that of the task alone

    so that the taught student can do with the learning rate of the student alone: on CIFAR-10 it did, on digits at a
    high rate it did not, as at T 6 a loud KL bends more than the task's loss (recipes/results/cifar10_budget).

    A negative <g_task, g_kd> counts as 0 in s: the gradients then cancel each other, and s would blow up what is left
    of them. So s is at least 1 / (1 + lambda), for two losses that pull the same way and are equally loud, and at most
    1, which it becomes as lambda or g_kd becomes 0. A constant 1 / (1 + lambda) would make an update up to 1.4 times
    too small where both are at right angles.

    r is never more than it was at first, and never more than `LOUDEST`. As a student comes to agree with its teacher
    there is less and less of a gradient to be made loud; an r that went on growing would make L a term that bends ever
    more at the same learning rate, and leave nothing of the task in it. So the teacher grows quieter as it has been
    understood, and no louder.

    Args:
        reduce: a mean or a sum over all processes; both give the same ratios.
    """

    DECAY = 0.95  # of the running means: they remember some 20 updates
    LOUDEST = 100.0  # r: a student that starts from its teacher's weights has hardly a g_kd, and then suddenly one

    def __init__(self, reduce: REDUCE = lambda sums: sums) -> None:
        self.reduce = reduce
        self.means: Tensor | None = None  # |g_task|^2, |g_kd|^2, <g_task, g_kd>, all up to the same factor
        self.first: Tensor | None = None  # r as it was measured first
        self._sums: Tensor | None = None  # of the micro-batches of this update

    def measure(self, task_loss: Tensor, kd_loss: Tensor, outputs: Iterable[Tensor]) -> None:
        """Take in the gradients of a micro-batch with respect to `outputs`, from which both losses were computed.

        The first micro-batch of all is shared between the processes at once, the others at the end of their update.
        """
        outputs = list(outputs)
        task, kd = (
            torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True) for loss in (task_loss, kd_loss)
        )
        sums = torch.stack([_dot(task, task), _dot(kd, kd), _dot(task, kd)])
        self._sums = sums if self._sums is None else self._sums + sums
        if self.means is None:
            self.means = self.reduce(sums)
            self.first = self._bound()
        self.means, self.first = self.means.to(sums.device), self.first.to(sums.device)  # after a resume

    def end_update(self) -> None:
        """Let the micro-batches since the last time enter the running means. Gradients that overflowed do not."""
        if self._sums is None:
            return
        sums, self._sums = self.reduce(self._sums), None
        measured = self._measured
        means = torch.where(measured, self.DECAY * self.means + (1 - self.DECAY) * sums, sums)
        self.means = torch.where(means.isfinite().all(), means, self.means)
        self.first = torch.where(measured, self.first, self._bound())

    def _bound(self) -> Tensor:
        """The highest r, by the first measurement."""
        return _ratio(self.means).clamp(max=self.LOUDEST)

    @property
    def _measured(self) -> Tensor:
        """Whether anything but overflows was measured yet, a bool scalar on the device."""
        return self.means.isfinite().all()

    @property
    def ratio(self) -> Tensor:
        """r, a float32 scalar on the device; 1 as long as all that was measured has overflowed."""
        return torch.where(self._measured, _ratio(self.means).clamp(max=self.first), 1.0)

    def scale(self, weight: float) -> Tensor:
        """s for lambda = `weight`, a float32 scalar on the device; 1 where `ratio` is 1 for want of a measurement."""
        task, kd, both = self.means
        factor = weight * self.ratio
        whole = task + 2 * factor * both.clamp_min(0) + factor**2 * kd
        return torch.where(self._measured, ((task + TINY) / (whole + TINY)).sqrt(), 1.0)

    def state_dict(self) -> dict | None:
        """What a checkpoint keeps; None before the first update."""
        return None if self.means is None else {"means": self.means.tolist(), "first": float(self.first)}

    def load_state_dict(self, state: dict | None) -> None:
        """Continue from `state_dict()`."""
        if state:
            self.means, self.first = torch.tensor(state["means"]), torch.tensor(state["first"])


class RunningScores:
    """How student and teacher do on the very batches that both see in training, for `--kd-off running`.

    Sums over the images or losses of the last updates, in which an update counts `DECAY` times as much as the one
    after it: with 0.98 they remember some 50 updates. Both are judged on the same augmented images, so that what is
    hard about a batch is hard for both. The student is in training mode, as it is when it learns: dropout and the
    statistics of the batch are its handicap. A teacher that was trained on these very images has a score that is too
    good: the student passes it late or never, and the window ends its phase.

    Args:
        reduce: a mean or a sum over all processes; both give the same scores.
    """

    DECAY = 0.98

    def __init__(self, reduce: REDUCE = lambda sums: sums) -> None:
        self.reduce = reduce
        self.sums: Tensor | None = None  # of the student's scores, of the teacher's, and how many there were
        self._sums: Tensor | None = None  # of the micro-batches of this update

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Take in the scores of a micro-batch, (n,) or scalars each: 100 where right and 0 where wrong, or losses."""
        total = student.float().sum()
        # the count is made on the device: there is no copy to wait for
        sums = torch.stack([total, teacher.float().sum(), torch.full_like(total, student.numel())])
        self._sums = sums if self._sums is None else self._sums + sums

    def end_update(self) -> None:
        """Let the micro-batches since the last time enter the sums. What is not finite does not."""
        if self._sums is None:
            return
        sums, self._sums = self.reduce(self._sums), None
        before = torch.zeros_like(sums) if self.sums is None else self.sums.to(sums.device)
        self.sums = torch.where(sums.isfinite().all(), self.DECAY * before + sums, before)

    def means(self) -> tuple[float, float]:
        """The scores of student and teacher, the same on all processes; NaN before the first taught update."""
        if self.sums is None:
            return math.nan, math.nan
        student, teacher, count = self.sums.tolist()
        return (student / count, teacher / count) if count else (math.nan, math.nan)

    def state_dict(self) -> list[float] | None:
        """What a checkpoint keeps; None before the first taught update."""
        return None if self.sums is None else self.sums.tolist()

    def load_state_dict(self, state: list[float] | None) -> None:
        """Continue from `state_dict()`."""
        if state:
            self.sums = torch.tensor(state)


def _ratio(means: Tensor) -> Tensor:
    return ((means[0] + TINY) / (means[1] + TINY)).sqrt()


def _dot(first: Iterable[Tensor | None], second: Iterable[Tensor | None]) -> Tensor:
    """The scalar product of two gradients; None stands for one that is 0."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return sum((a.float() * b.float()).sum() for a, b in pairs)
