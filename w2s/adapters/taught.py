"""A run of the method whose training loop belongs to another library."""

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from w2s.crossing import Clock
from w2s.distillation import Distillation
from w2s.losses import kl_softmax
from w2s.record import RunRecord, read_metrics
from w2s.schedule import EarlyPhase
from w2s.teacher import Teacher

logger = logging.getLogger(__name__)


class LogitTeacher(Teacher):
    """A frozen classifier whose forward gives logits, or an output of `transformers` that holds them."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) for what the student saw."""
        outputs = self.model(images)
        return getattr(outputs, "logits", outputs)


class TaughtRun:
    """`Distillation`, `RunRecord` and `Clock` of one run, as an adapter drives them. Without a phase, a student alone.

    The loss of a micro-batch is `loss + run.term(logits, images)`. Everything else is called by the adapter:

        begin -> { advance -> term and saw, for each micro-batch } -> evaluated -> finish

    Args:
        folder: the run folder: args.yaml, metrics.csv and summary.json, which `python -m w2s.compare` reads.
        metric: name of the reported metric, as the adapter finds it.
        mode: "max" where a higher metric is better, "min" where a lower one is.
        targets: tau values, fixed before the run.
        phase: lambda(u), T(u) with u in epochs, and the rule of the switch-off.
        teacher: a trained classifier for the student's images. It is freed when it falls silent, unless the caller
            holds on to it, too.
        teacher_name, teacher_source: what the record says of it: its architecture, and where its weights come from.
        seed: of the run; a comparison pairs the runs of two arms by it.
        options: whatever else the run was made with; a comparison refuses runs that differ in one.

    Raises:
        ValueError: a phase without a teacher or the other way round, or a mode that is none.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        metric: str,
        mode: str = "max",
        targets: tuple[float, ...] = (),
        phase: EarlyPhase | None = None,
        teacher: nn.Module | None = None,
        teacher_name: str | None = None,
        teacher_source: str = "",
        seed: int = 0,
        options: dict | None = None,
    ) -> None:
        if (phase is None) != (teacher is None):
            raise ValueError("a phase needs a teacher, and a teacher a phase: give both, or none for a student alone")
        if phase and phase.mode != mode:
            raise ValueError(f"the phase says that the best metric is its {phase.mode}, the run its {mode}")
        self.folder, self.metric, self.mode, self.targets = Path(folder), metric, mode, list(targets)
        self.distillation, self.clock, self.record = Distillation(phase), Clock(), None
        self.teacher_name, self.teacher_source = teacher_name or type(teacher).__name__, teacher_source
        self.seed, self.options = seed, dict(options or {})
        self.samples = 0  # seen so far, by all processes
        self._model, self._rows = teacher, None
        self._settled: int | None = None  # the update whose lambda is settled

    def adapt_teacher(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Have the teacher, if there is one, answer through a module that fits it to the student's images."""
        if self._model is not None:
            self._model = wrap(self._model)

    @property
    def begun(self) -> bool:
        """Whether `begin` was called."""
        return self.record is not None

    def begin(
        self,
        *,
        updates_per_epoch: int,
        device: torch.device,
        processes: int = 1,
        is_main: bool = True,
        score: Callable[[Teacher], dict[str, float]] | None = None,
        params: int | None = None,
        options: dict | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        """Make the teacher ready, measure it once, and open the run folder. A silent teacher is not touched.

        Args:
            updates_per_epoch: what turns updates into u.
            device: where the student runs.
            processes: how many train together.
            is_main: whether this process writes the folder.
            score: the teacher's metric on the two splits, {"switch": ..., "report": ...}, measured as the student's is.
            params: of the student, for the record.
            options: further ones that the adapter knows.
            autocast: in which the teacher's forward runs, where the library's own does not hold around `term`.

        Raises:
            ValueError: the folder holds another run, or the teacher's score is not finite.
        """
        kd, resumed = self.distillation, self._rows is not None
        if not resumed:
            _refuse_another_run(self.folder)
        kd.updates_per_epoch = updates_per_epoch
        self.clock.sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        if kd.active:
            kd.teacher = LogitTeacher(self._model, self.teacher_name, self.teacher_source, device, autocast)
            if kd.score is None:
                kd.score = self._measure(kd.teacher, score)
            kd.restart_timer()
        self._model = None
        self.record = RunRecord(
            self.folder if is_main else None,
            metric=self.metric,
            mode=self.mode,
            targets=self.targets,
            reported=(self.metric,),
            facts={
                "task": "cls",
                "name": self.folder.name,
                "status": "running",
                "seed": self.seed,
                "params": params,
                "teacher": kd.score,
                "kd_off": kd.off,
                "environment": _environment(device, processes),
            },
        )
        self.record.start(_plain({**self.options, **(options or {}), **_phase_options(kd.phase)}), rows=self._rows)
        if line := kd.describe():
            logger.info(line)

    def _measure(self, teacher: Teacher, score: Callable[[Teacher], dict[str, float]] | None) -> dict:
        if score is None:
            raise ValueError("nothing measures the teacher: give a function that scores it on both splits")
        scores = {split: float(value) for split, value in score(teacher).items()}
        if not all(map(math.isfinite, scores.values())):
            raise ValueError(f"the teacher's {self.metric} is not finite: {scores}")
        return teacher.facts(switch=scores["switch"], report=scores["report"])

    def advance(self, update: int) -> None:
        """Settle lambda(u) and T(u) of the update that begins after so many, for all of its micro-batches."""
        self.clock.start()
        if update == self._settled:
            return
        self._settled = update
        was_active = self.distillation.active
        self.distillation.advance(update)
        self.distillation.count_update()
        self._note_silence(was_active)

    def term(self, logits: Tensor, images: Tensor) -> Tensor | float:
        """`lambda(u) * T(u)^2 * KL(teacher || student)` of a micro-batch, its mean; 0.0 while the teacher is silent.

        Args:
            logits: (B, classes) of the student.
            images: what it saw.
        """
        kd = self.distillation
        return kd.weight * kl_softmax(logits, kd.teach(images), kd.temperature) if kd.weight > 0 else 0.0

    def saw(self, samples: int) -> None:
        """Count the examples of a micro-batch, over all processes."""
        self.samples += samples

    def evaluated(self, update: int, *, report: float, switch: float | None, lr: float | None = None) -> None:
        """Compare student and teacher on the switch split, and write the evaluation down. Once for an update.

        Args:
            update: how many are done.
            report, switch: the student's metric on the two splits; that on the switch split may be missing when the
                teacher is silent.
            lr: the learning rate.
        """
        if self.record.rows and self.record.rows[-1]["update"] >= update:
            return
        self.clock.pause()
        kd = self.distillation
        was_active = kd.active
        kd.advance(update)  # the window may end here
        if kd.active:
            kd.observe(switch, update=update)
        self.clock.teacher_seconds += kd.take_seconds()
        self.record.add(
            epoch=update / kd.updates_per_epoch,
            update=update,
            samples=self.samples,
            train_seconds=self.clock.train_seconds,
            total_seconds=self.clock.total_seconds,
            teacher_seconds=self.clock.teacher_seconds,
            lr=lr,
            **{"switch": switch, **kd.take_evaluation(), self.metric: report},
        )
        self._note_silence(was_active)

    def _note_silence(self, was_active: bool) -> None:
        if was_active and not self.distillation.active:
            self.record.write_summary(kd_off=self.distillation.off)
            logger.info(self.distillation.describe_off())

    def finish(self) -> None:
        """Close the record and log where each target was first reached."""
        self.clock.pause()
        self.record.write_summary(status="finished", kd_off=self.distillation.off)
        for tau, crossing in self.record.summary()["targets"].items():
            first = crossing["first"]
            logger.info(f"first@{tau}: " + ("epoch {epoch:.4g}, update {update}".format(**first) if first else "never"))

    def state_dict(self) -> dict:
        """What a checkpoint of the other library keeps: plain numbers, strings, lists and dicts."""
        self.clock.teacher_seconds += self.distillation.take_seconds()
        return {
            **self.distillation.state_dict(),
            "clock": self.clock.state_dict(),
            "rows": self.record.rows if self.record else [],
            "samples": self.samples,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a checkpoint, before `begin`; a teacher that was off stays off and is not touched."""
        self.distillation.load_state_dict(state)
        self.clock.load_state_dict(state["clock"])
        self._rows, self.samples = list(state["rows"]), state["samples"]


def _refuse_another_run(folder: Path) -> None:
    """Raise ValueError where a folder holds a run that a new one would overwrite."""
    try:
        status = json.loads((folder / "summary.json").read_text())["status"]
    except FileNotFoundError:
        return
    if status == "finished":
        raise ValueError(f"{folder} holds a finished run: choose another folder, or remove it")
    if rows := read_metrics(folder / "metrics.csv"):
        raise ValueError(
            f"{folder} holds a run that was interrupted after update {rows[-1]['update']:.10g}: resume it from its "
            "checkpoint, or choose another folder"
        )


def _plain(value: object) -> object:
    """A value as YAML can hold it; what it cannot hold, such as a path or a class, as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def _phase_options(phase: EarlyPhase | None) -> dict:
    """The schedule under the names that the scripts' options have."""
    if phase is None:
        return {}
    return {
        "kd_weight": phase.full_weight,
        "kd_warmup": phase.warmup,
        "kd_hold": phase.hold,
        "kd_decay": phase.decay,
        "kd_temperature": [phase.start_temperature, phase.end_temperature],
        "kd_patience": phase.patience,
        "kd_off": phase.off,
        "kd_fade": phase.fade,
    }


def _environment(device: torch.device, processes: int) -> dict:
    """Versions and hardware, for summary.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores"
    return {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": name,
        "processes": processes,
    }
