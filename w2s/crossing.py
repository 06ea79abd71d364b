"""first@tau: when a run first reached a target, on every axis of cost, and the clock that measures the seconds.

Nothing here knows the task, the model or the framework: rows of plain numbers go in, crossings come out.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

AXES = ("epoch", "update", "samples", "train_seconds", "total_seconds", "pflops")


def reaches(value: float | None, target: float, mode: str) -> bool:
    """Whether a metric value is at the target or beyond; a missing, NaN or infinite value never is."""
    if value is None or not math.isfinite(value):
        return False
    return value >= target if mode == "max" else value <= target


def crossings(rows: list[dict], metric: str, target: float, mode: str = "max") -> tuple[dict | None, dict | None]:
    """first@tau and confirmed first@tau of a run.

    Rows are taken in the order of `update`; of rows with the same update the last one counts. A missing or NaN metric
    is an evaluation that did not reach the target.

    Args:
        rows: one dict an evaluation, with `update`, the metric and any of `AXES`.
        metric: the column to look at.
        target: tau.
        mode: "max" (`>=`) or "min" (`<=`).

    Returns:
        (first, confirmed), each `{"value": metric, **axes}` or None; an axis that was not measured is left out.
        Confirmed is the first of two evaluations in a row that reach the target.
    """
    ordered = [row for _, row in sorted({row["update"]: row for row in rows}.items())]
    reached = [reaches(row.get(metric), target, mode) for row in ordered]
    first = next((i for i, hit in enumerate(reached) if hit), None)
    confirmed = next((i for i in range(len(reached) - 1) if reached[i] and reached[i + 1]), None)
    return tuple(
        None
        if i is None
        else {"value": ordered[i][metric], **{a: ordered[i][a] for a in AXES if ordered[i].get(a) is not None}}
        for i in (first, confirmed)
    )


def best_value(rows: list[dict], metric: str, mode: str) -> float | None:
    """The best finite value of a metric over the rows, None if there is none."""
    values = [row[metric] for row in rows if row.get(metric) is not None and math.isfinite(row[metric])]
    return (max if mode == "max" else min)(values, default=None)


def target_key(target: float) -> str:
    """How a target is written as a key: 65 and 65.0 are both "65"."""
    return f"{target:.10g}"


class Clock:
    """Train seconds (pausable), total seconds and teacher seconds of a run; its state survives a resume.

    Args:
        sync: called before each reading of a boundary of train time, so that queued device work is counted where it
            belongs (`torch.cuda.synchronize`).
        now: a monotonic clock in seconds.
    """

    def __init__(self, sync: Callable[[], None] = lambda: None, now: Callable[[], float] = time.perf_counter) -> None:
        self.sync, self.now = sync, now
        self.teacher_seconds = 0.0
        self._train, self._total = 0.0, 0.0
        self._created = now()
        self._started: float | None = None

    @property
    def running(self) -> bool:
        """Whether train time is being counted."""
        return self._started is not None

    @property
    def train_seconds(self) -> float:
        """Seconds between `start` and `pause`, summed."""
        return self._train + (self.now() - self._started if self.running else 0.0)

    @property
    def total_seconds(self) -> float:
        """Seconds since the run began, evaluations and start-up included, time between two processes excluded."""
        return self._total + self.now() - self._created

    def start(self) -> None:
        """Begin or continue to count train time."""
        if not self.running:
            self.sync()
            self._started = self.now()

    def pause(self) -> None:
        """Stop counting train time."""
        if self.running:
            self.sync()
            self._train, self._started = self.train_seconds, None

    def set_back(self, train_seconds: float) -> None:
        """Leave out the train time since it stood at `train_seconds`."""
        if self.running:
            self.sync()
            self._train, self._started = train_seconds, self.now()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave a block (an evaluation, a checkpoint) out of train time; a paused clock stays paused after it."""
        was_running = self.running
        self.pause()
        try:
            yield
        finally:
            if was_running:
                self.start()

    def state_dict(self) -> dict:
        """The three sums as of now."""
        return {"train": self.train_seconds, "total": self.total_seconds, "teacher": self.teacher_seconds}

    def load_state_dict(self, state: dict) -> None:
        """Continue from the sums of an earlier process."""
        self._train, self._total, self.teacher_seconds = state["train"], state["total"], state["teacher"]
