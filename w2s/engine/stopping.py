"""What stops a run before its end: a signal, or losses that are not finite. All processes come to the same answer."""

import signal
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import accelerate
import torch
from torch import nn

from w2s.engine.errors import Preempted
from w2s.engine.sharding import InStep

PATIENCE = 10  # losses in a row that may overflow under a gradient scaler, which halves its scale after each of them
ASK_SECONDS = 2.0  # on a GPU, roughly how long a signal may go unnoticed
ASK_UPDATES = 10  # and after how many updates it is noticed at the latest

Batch = TypeVar("Batch")


class Stopping:
    """Remembers signals and broken losses until the processes of a run ask for them together.

    Args:
        accelerator: gives the device, the processes and the gradient scaler. Under a scaler one loss may overflow:
            the scaler skips that step. Elsewhere the first loss that is not finite has broken the weights.
    """

    def __init__(self, accelerator: accelerate.Accelerator) -> None:
        self.accelerator = accelerator
        self.patience = 1 if accelerator.scaler is None else PATIENCE
        self._signal: int | None = None
        self._in_step: InStep | None = None  # where the model that is evaluated is sharded
        self._cut_short = False  # a signal has ended the evaluation of this process early
        self._streak = torch.zeros((), device=accelerator.device)  # the last losses in a row that were not finite
        self._longest = torch.zeros_like(self._streak)
        self._asked = (0, time.perf_counter())  # the update at which the processes last asked, and when
        self._ask_at = 0

    def listen(self) -> None:
        """Remember SIGTERM and SIGINT from now on, instead of dying of them."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self._signal = number
        if number == signal.SIGINT:  # a second Ctrl-C does not wait
            signal.signal(number, signal.default_int_handler)

    def keep_in_step(self, model: nn.Module) -> None:
        """Have all processes make as many forwards of a sharded model in its evaluations."""

        def stop() -> None:
            self._signal = self._signal or signal.SIGTERM

        self._in_step = InStep(self.accelerator, model, signalled=lambda: self._signal is not None, stop=stop)

    def watch(self, loss: torch.Tensor) -> None:
        """Remember whether a loss was not finite, without waiting for the device."""
        self._streak = (self._streak + 1) * ~torch.isfinite(loss.detach())
        self._longest = torch.maximum(self._longest, self._streak)

    def ask(self, update: int, now: bool = False) -> tuple[bool, bool]:
        """Whether a signal asks the run to stop, and whether its loss is broken; the same on all processes.

        Waiting for a GPU after every update would slow it down, so there the question is asked every 2 seconds or 10
        updates, whichever comes first, and when `now` is set.
        """
        device = self.accelerator.device
        if not now and device.type != "cpu" and update < self._ask_at:
            return False, False
        before, seconds = self._asked[0], time.perf_counter() - self._asked[1]
        signalled = torch.full_like(self._longest, float(self._signal is not None))
        broken = (self._longest >= self.patience).to(signalled.dtype)
        pace = torch.full_like(signalled, seconds / max(update - before, 1))
        signalled, broken, pace = self.accelerator.reduce(torch.stack([signalled, broken, pace]), "sum").tolist()
        pace = max(pace / self.accelerator.num_processes, 1e-9)  # seconds an update, the same on all processes
        self._asked, self._ask_at = (update, time.perf_counter()), update + int(min(ASK_SECONDS / pace, ASK_UPDATES))
        return signalled > 0, broken > 0

    def polled(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of an evaluation, until a signal asks to stop. `end_evaluation` must follow."""
        for batch in batches:
            if self._signal is not None:
                self._cut_short = True
                return
            yield batch

    def end_evaluation(self) -> None:
        """Make sure that an evaluation has seen all of its batches. All processes call this.

        Raises:
            Preempted: on all processes, if a signal has ended the evaluation of one of them early.
        """
        if self._in_step:
            self._in_step.finish()
        cut_short, self._cut_short = torch.full_like(self._streak, float(self._cut_short)), False
        if self.accelerator.reduce(cut_short, "sum").item():
            raise Preempted("stopped by a signal during an evaluation")
