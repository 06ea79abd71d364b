"""The frozen weaker teacher: found, built, fitted to the student's inputs, timed, scored, and let go."""

import gc
import time

import torch
from torch import nn


class Teacher:
    """A frozen model that answers for the student's inputs, at no more than its forward's cost.

    Eval mode, no gradient, in the accelerator's precision; never prepared by the accelerator, so in no checkpoint. A
    task whose teacher needs more than its model's forward overrides `forward`.

    Args:
        model: a model with weights.
        name: its architecture, for the record.
        source: where the weights come from, for the record.
        accelerator: gives device and autocast.
        channels_last: memory format, as the student's.
    """

    SAMPLE = 10  # every how many calls one is timed

    def __init__(
        self,
        model: nn.Module,
        name: str,
        source: str,
        accelerator: "accelerate.Accelerator",  # noqa: F821
        channels_last: bool = False,
    ) -> None:
        self.model = model.eval().requires_grad_(False).to(accelerator.device)
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.name, self.source, self.accelerator = name, source, accelerator
        self.params = sum(p.numel() for p in model.parameters())
        self.calls = 0  # forward passes so far
        self._timed_from, self._timings = 0, []

    @torch.no_grad()
    def __call__(self, *inputs: object) -> object:
        """What `forward` gives, without gradient, in the accelerator's precision."""
        self.calls += 1
        stop = self._time() if (self.calls - self._timed_from) % self.SAMPLE == 1 else None
        with self.accelerator.autocast():
            outputs = self.forward(*inputs)
        if stop:
            stop()
        return outputs

    def forward(self, *inputs: object) -> object:
        """The model's outputs for the student's inputs."""
        return self.model(*inputs)

    def _time(self):
        """Start timing a call; returns what ends it. Device events, so that nothing waits."""
        if self.accelerator.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self._timings.append(lambda: begin.elapsed_time(end) / 1000)
            return end.record
        begin = time.perf_counter()

        def end() -> None:
            seconds = time.perf_counter() - begin
            self._timings.append(lambda: seconds)

        return end

    def restart_timer(self) -> None:
        """Forget the calls so far: warm-up, or an evaluation."""
        self._timed_from, self._timings = self.calls, []

    def take_seconds(self) -> float:
        """Seconds of all calls since the timer's start, from the timed ones; restarts it."""
        if self._timings and self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = [timing() for timing in self._timings]
        total = sum(seconds) / len(seconds) * (self.calls - self._timed_from) if seconds else 0.0
        self.restart_timer()
        return total

    def release(self) -> None:
        """Free the model's memory. A released teacher cannot be called."""
        self.model = None
        gc.collect()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
