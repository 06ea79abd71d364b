"""The frozen teacher: a forward that costs no more than it must and is timed, and a release that frees its memory."""

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


class Teacher:
    """A frozen model that answers for the student's inputs.

    It runs in eval mode and without gradients. It is no module and no part of the student, and a framework does not
    prepare it, so it is in no checkpoint and no optimiser. A task whose teacher needs more than its model's forward
    overrides `forward`.

    Args:
        model: a model with weights.
        name: its architecture, for the record.
        source: where the weights come from, for the record.
        device: where it runs.
        autocast: makes the context of each forward, as `accelerator.autocast` or `partial(torch.autocast, "cuda")` do;
            the default leaves the precision to the caller.
        channels_last: whether the weights take the NHWC memory format, as the student's do.
        rebuild: makes a model of the same architecture with random weights, for `--kd-control random`.
    """

    TIMING_INTERVAL = 10  # one call in so many is timed
    note: str | None = None  # what the first lines of a run say of it beside its score

    def __init__(
        self,
        model: nn.Module,
        name: str,
        source: str,
        device: torch.device | str,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        channels_last: bool = False,
        rebuild: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.model = model.eval().requires_grad_(False).to(self.device)
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.name, self.source, self.autocast, self.rebuild = name, source, autocast, rebuild
        self.params = sum(p.numel() for p in model.parameters())
        self.calls = 0  # forward passes so far
        self._timed_from, self._timings = 0, []
        self._marked = 0, 0  # calls and timings

    @torch.no_grad()
    def __call__(self, *inputs: object) -> object:
        """The result of `forward`, without gradients and under `autocast`."""
        self.calls += 1
        timed = (self.calls - self._timed_from) % self.TIMING_INTERVAL == 1
        stop = self._start_timing() if timed else None
        with self.autocast():
            outputs = self.forward(*inputs)
        if stop:
            stop()
        return outputs

    def forward(self, *inputs: object) -> object:
        """The model's outputs for the student's inputs."""
        return self.model(*inputs)

    @property
    def evaluated(self) -> object:
        """What an evaluation takes in the student's place: something that answers as a student does."""
        return self

    def facts(self, *, switch: float | None, report: float) -> dict:
        """What summary.json says of it: `Distillation.score`.

        Args:
            switch, report: its metric on the switch split (None where that is not looked at) and on the reporting
                split, measured as the student's is.
        """
        return {
            "model": self.name,
            "switch": switch,
            "report": report,
            "params": self.params,
            "checkpoint": self.source,
        }

    def shuffled(self, permutation: Callable[[int, torch.device], Tensor], *inputs: object) -> object:
        """For `--kd-control shuffled`: each example gets the outputs for another example of its batch.

        Args:
            permutation: takes the batch size and a device, and gives the new order of the rows there.
            inputs: as for a call.
        """
        outputs = self(*inputs)
        return outputs[permutation(len(outputs), outputs.device)]

    def compile(self, backend: str) -> None:
        """Compile the forward with torch.compile, apart from the student's."""
        self.model.compile(backend=backend)

    def _start_timing(self) -> Callable[[], None]:
        """Start timing a call; returns what ends it. On a GPU these are events, so that nothing waits."""
        if self.device.type == "cuda":
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            begin.record()
            self._timings.append(lambda: begin.elapsed_time(end) / 1000)
            return end.record
        begin = time.perf_counter()

        def stop() -> None:
            seconds = time.perf_counter() - begin
            self._timings.append(lambda: seconds)

        return stop

    def restart_timer(self) -> None:
        """Forget the calls so far, which were a warm-up or an evaluation."""
        self._timed_from, self._timings = self.calls, []
        self.mark()

    def mark(self) -> None:
        """Mark the calls from now on, so that `forget_marked` can leave them out."""
        self._marked = self.calls, len(self._timings)

    def forget_marked(self) -> None:
        """Leave the calls since `mark` out of the time: compiling them took longer than they do."""
        calls, timings = self._marked
        self._timed_from += self.calls - calls
        del self._timings[timings:]

    def take_seconds(self) -> float:
        """Seconds of all calls since the timer was started, estimated from the timed ones. Restarts the timer."""
        if self._timings and self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = [timing() for timing in self._timings]
        total = sum(seconds) / len(seconds) * (self.calls - self._timed_from) if seconds else 0.0
        self.restart_timer()
        return total

    def release(self) -> None:
        """Free the model's memory. A released teacher cannot be called."""
        self.model = self.rebuild = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
