"""A ladder of teachers: each one teaches until it is passed or its window has ended, and hands over to the next."""

from collections.abc import Callable
from typing import Protocol

from w2s.distillation import Distillation
from w2s.engine.errors import InputError
from w2s.teacher import Teacher

PASSED = "passed before it taught"  # why a teacher is silent that the student had passed when its turn came


class Introduce(Protocol):
    """Loads the teacher of a name in --teacher, ready to teach, and scores it unless its score is known."""

    def __call__(self, spec: str, score: dict | None) -> tuple[Teacher, dict]: ...


class Ladder(Distillation):
    """A `Distillation` whose teachers follow one another. Only the one of now is in memory.

    With each of them the early phase begins anew: u, the window, the temperature, the fade and all that is measured in
    training are counted from the hand-over. A teacher that the student has passed when its turn comes is skipped. After
    the last one it is silent for good.

    Args:
        specs: the teachers as --teacher names them, in the order in which they teach.
        renew: makes the phase and what is measured in training, as arguments of `Distillation`, for a teacher that is
            the last one or not.
        introduce: see `Introduce`.
        measure: gives a model's metric on the switch split.
        log: writes a line.
        options: control, unit and updates_per_epoch, see `Distillation`.

    Attributes:
        rungs: what summary.json holds of each teacher that has had its turn; the last one is that of now.
        forwards: FLOPs of each teacher's forward in an update.
    """

    def __init__(
        self,
        specs: list[str],
        *,
        renew: Callable[[bool], dict],
        introduce: Introduce,
        measure: Callable[[object], float],
        log: Callable[[str], None],
        **options: object,
    ) -> None:
        super().__init__(**renew(False), **options)
        self.specs, self.renew, self.introduce, self.measure, self.log = specs, renew, introduce, measure, log
        self.rungs: list[dict] = []
        self.forwards: list[int] = []
        self._backend: str | None = None
        self._student: tuple[int, float | None] = (-1, None)  # what was observed last: the update and the metric

    @property
    def waiting(self) -> list[str]:
        """The teachers whose turn has not come yet."""
        return self.specs[len(self.rungs) :]

    @property
    def handing_over(self) -> bool:
        """Whether the teacher of now has fallen silent and the next one is to take its place."""
        return not self.active and bool(self.waiting)

    @property
    def off(self) -> dict | None:
        """Where and why the last teacher fell silent, see `Distillation.off`."""
        return None if self.waiting else super().off

    def start(self, load: Callable[[str], Teacher], count: Callable[[Teacher], int]) -> None:
        """Look at every teacher that is still to come, one at a time, and begin with the one of now.

        Args:
            load: makes a teacher.
            count: gives the FLOPs of its forward in an update.

        Raises:
            InputError: one of them cannot be loaded or does not fit.
        """
        resumed = bool(self.forwards)
        for spec in self.waiting:
            teacher = load(spec)
            if not resumed:
                self.forwards.append(count(teacher))
            teacher.release()
        if not self.rungs:
            self._climb(update=0)
        elif self.active:
            self.teacher, _ = self.introduce(self.specs[len(self.rungs) - 1], self.score)

    def _climb(self, update: int) -> None:
        """Begin with the next teacher."""
        spec, last = self.waiting[0], len(self.waiting) == 1
        self._begin(**self.renew(last), since=update)
        self.teacher, self.score = self.introduce(spec, None)
        begun = {"epoch": update / self.updates_per_epoch, "update": update}
        self.rungs.append({**self.score, "since": begun, "off": None, "updates": 0, "seconds": 0.0})

    def hand_over(self, update: int, student: Callable[[], object]) -> None:
        """Begin with the next teacher that the student has not passed, if there is one.

        Args:
            update: how many are done.
            student: gives the model that is evaluated.
        """
        while self.handing_over:
            before, reason = self.specs[len(self.rungs) - 1], self.phase.reason
            epoch = update / self.updates_per_epoch
            self.log(f"epoch {epoch:.4g}, update {update}: {before} ({reason}) hands over to {self.waiting[0]}")
            self._climb(update)
            if self._backend:
                self.teacher.compile(self._backend)
            self.teacher.restart_timer()
            if not self.running:
                self._warn_of_weakness()
            if self.phase.off == "surpass" and not self.running:
                self._skip_if_passed(update, student)

    def _warn_of_weakness(self) -> None:
        """Say so where a teacher before this one was better on the switch split."""
        *earlier, now = (rung["switch"] for rung in self.rungs)
        if any(self.phase.lead(now, score) > 0 for score in earlier):
            self.log(
                f"warning: {self.specs[len(self.rungs) - 1]} is weaker on the switch split than a teacher before it; "
                "--teacher takes them from the weakest to the strongest"
            )

    def _skip_if_passed(self, update: int, student: Callable[[], object]) -> None:
        if self._student[0] != update:
            self._student = (update, self.measure(student()))
        metric = self._student[1]
        if self.phase.lead(metric, self.score["switch"]) < 0:
            spec = self.specs[len(self.rungs) - 1]
            self.log(f"{spec} is skipped: the student, at {metric:.4g} on the switch split, has passed it already")
            self.silence(update, reason=PASSED)

    def observe(self, student: float | None, update: int) -> None:
        """See `Distillation.observe`."""
        self._student = (update, student)
        super().observe(student, update)

    def count_update(self) -> bool:
        """See `Distillation.count_update`."""
        taught = super().count_update()
        self.rungs[-1]["updates"] += int(taught)
        return taught

    def taught_flops(self, forward: int) -> int:
        """FLOPs of the forwards of all teachers so far, each at its own cost; `forward`, the first one's, is known."""
        return sum(rung["updates"] * flops for rung, flops in zip(self.rungs, self.forwards, strict=False))

    def take_seconds(self) -> float:
        """See `Distillation.take_seconds`."""
        seconds = super().take_seconds()
        self.rungs[-1]["seconds"] += seconds
        return seconds

    def compile(self, backend: str) -> None:
        """See `Distillation.compile`; those that take over are compiled, too."""
        self._backend = backend
        super().compile(backend)

    def _release(self) -> None:
        super()._release()
        self.rungs[-1]["off"] = super().off

    def facts(self) -> dict:
        """See `Distillation.facts`: `teacher` is the one of now, and `teachers` are all that have had their turn."""
        rungs = zip(self.rungs, self.forwards, strict=False)
        teachers = [{**rung, "pflops": rung["updates"] * forward / 1e15} for rung, forward in rungs]
        return {**super().facts(), "teachers": teachers}

    def describe(self) -> str:
        """See `Distillation.describe`; names the teachers that follow."""
        waiting = ", ".join(self.waiting)
        if self.handing_over:
            return f"distillation: {self.specs[len(self.rungs) - 1]} ({self.phase.reason}) is to hand over to {waiting}"
        return super().describe() + (f"; each with such a window of its own, then: {waiting}" if waiting else "")

    def state_dict(self) -> dict:
        """See `Distillation.state_dict`."""
        ladder = {"since": self.since, "rungs": self.rungs, "forwards": self.forwards}
        return {**super().state_dict(), "ladder": ladder}

    def load_state_dict(self, state: dict) -> None:
        """See `Distillation.load_state_dict`."""
        ladder = state["ladder"]
        self.rungs, self.forwards = ladder["rungs"], ladder["forwards"]
        self._begin(**self.renew(not self.waiting), since=ladder["since"])
        super().load_state_dict(state)


def check_ladder(args) -> None:
    """Refuse options that several teachers cannot share.

    Raises:
        InputError: --teacher-score, which is of one teacher, or a term that has parts made for one.
    """
    for option, why in (
        ("teacher_score", "is the score of one teacher"),
        ("kd_term", "has parts that are made for one teacher"),
        ("kd_target", "moves to one teacher"),
    ):
        if getattr(args, option, None) is not None:
            raise InputError(f"--{option.replace('_', '-')} {why}: leave it out, or give one --teacher")
