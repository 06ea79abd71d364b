"""The early phase: how strongly the teacher speaks at progress u, and when it falls silent for good. Pure Python."""

import math

LEVEL = 1e-9  # of the first lead: what is left of less is the rounding of a mean that is level


class EarlyPhase:
    """Weight lambda(u) and temperature T(u) of the distillation term, and its permanent switch-off.

    `u` is training progress in any unit that the windows share: epochs as a float, or updates.

        lambda(u)   rises from 0 to `weight` over `warmup`, holds for `hold`, falls to 0 over `decay`, then is exactly 0
        T(u)        falls linearly from `temperature[0]` to `temperature[1]` over the same window

    `observe` compares student and teacher on held-out data: strictly better at `patience` consecutive evaluations
    switches the teacher off for the rest of the run. So does reaching the end of the window.

    With `fade`, lambda is also multiplied by what is left of the teacher's lead: its mean over the last `patience`
    evaluations, as a share of the first lead that was seen. This factor never rises again, and the teacher is switched
    off where it reaches 0, which is never at an evaluation that the student has lost: as long as the teacher is ahead
    at the last one, its lead there counts where the mean is gone.

    Args:
        weight: the plateau of lambda, >= 0.
        warmup, hold, decay: lengths of the three parts, >= 0, in units of u.
        temperature: (start, end), both > 0.
        patience: consecutive evaluations the student has to win, >= 1.
        mode: "max" where a higher metric is better, "min" where a lower one is.
        off: "surpass" (the method); "never" (lambda holds for the whole run, an always-on baseline); or a number: a
            fixed switch-off at that u, whoever is better.
        fade: let lambda follow the teacher's lead; it has an effect only where `off` is "surpass".

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        weight: float = 1.0,
        warmup: float = 0.0,
        hold: float = math.inf,
        decay: float = 0.0,
        temperature: tuple[float, float] = (6.0, 1.0),
        patience: int = 2,
        mode: str = "max",
        off: str | float = "surpass",
        fade: bool = False,
    ) -> None:
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"weight must be finite and not negative, got {weight}")
        for name, length in (("warmup", warmup), ("hold", hold), ("decay", decay)):
            if not length >= 0:
                raise ValueError(f"{name} must not be negative, got {length}")
        if not all(t > 0 and math.isfinite(t) for t in temperature):
            raise ValueError(f"temperatures must be positive, got {temperature}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {mode!r}")
        if off not in ("surpass", "never") and (isinstance(off, str) or not off >= 0):
            raise ValueError(f"off must be 'surpass', 'never' or a number, got {off!r}")
        self.full_weight, self.warmup, self.hold, self.decay = weight, warmup, hold, decay
        self.start_temperature, self.end_temperature = temperature
        self.patience, self.mode, self.off, self.fade = patience, mode, off, fade
        self.wins = 0  # consecutive evaluations won so far
        self.leads: list[float] = []  # of the teacher, at the last `patience` evaluations
        self.first_lead: float | None = None  # the unit of the fade
        self.lead_left = 1.0  # the factor of the fade
        self.kd_off: dict | None = None  # {"at": u, "reason": ...} once switched off

    @property
    def window(self) -> float:
        """Length of warmup, hold and decay together."""
        return self.warmup + self.hold + self.decay

    @property
    def end(self) -> float:
        """The progress at which lambda is 0 for good, surpassed or not."""
        if self.off == "never":
            return math.inf
        return self.window if self.off == "surpass" else min(self.window, float(self.off))

    @property
    def active(self) -> bool:
        """False once switched off; never True again."""
        return self.kd_off is None

    @property
    def reason(self) -> str | None:
        """Why: "surpass", "window" (end of the decay), "fixed" (`off` was a number), or None while active."""
        return self.kd_off and self.kd_off["reason"]

    def weight(self, u: float) -> float:
        """lambda(u); exactly 0 outside the window and after the switch-off."""
        if not self.active or u < 0 or u >= self.end:
            return 0.0
        height = self.full_weight * self.lead_left
        if u < self.warmup:
            return height * u / self.warmup
        into_decay = u - self.warmup - self.hold
        if into_decay <= 0 or self.off == "never":
            return height
        return height * max(0.0, 1 - into_decay / self.decay)

    def temperature(self, u: float) -> float:
        """T(u); the start value for a window without end, the end value after the window."""
        if math.isinf(self.window) or self.window == 0:
            return self.start_temperature
        progress = min(max(u / self.window, 0.0), 1.0)
        return self.start_temperature + (self.end_temperature - self.start_temperature) * progress

    def advance(self, u: float) -> bool:
        """Switch off if the window has ended at u; call it before every update. Returns `active`."""
        if self.active and u >= self.end:
            fixed = self.off != "surpass" and u < self.window
            self.switch_off(u, reason="fixed" if fixed else "window")
        return self.active

    def lead(self, student: float, teacher: float) -> float:
        """By how much the teacher's metric is better than the student's; below 0 the student is strictly better."""
        return teacher - student if self.mode == "max" else student - teacher

    def observe(self, student: float, teacher: float, u: float | None = None) -> bool:
        """Compare both metrics of an evaluation (at u, for the record); switch off if the student has won often enough.

        A metric that is NaN does not win and ends a series of wins. Returns `active`.
        """
        if self.active and self.off == "surpass":
            lead = self.lead(student, teacher)
            self.wins = self.wins + 1 if lead < 0 else 0
            if self.fade and math.isfinite(lead):
                self._follow(lead)
            if self.wins >= self.patience or self.lead_left == 0:
                self.switch_off(u, reason="surpass")
        return self.active

    def _follow(self, lead: float) -> None:
        """Lower the factor of the fade to what is left of the teacher's lead."""
        if self.first_lead is None and lead > 0:
            self.first_lead = lead
        if self.first_lead is not None:
            self.leads = [*self.leads, lead][-self.patience :]
            left = sum(self.leads) / len(self.leads) / self.first_lead
            if left < LEVEL:
                left = lead / self.first_lead
            self.lead_left = min(self.lead_left, left if left >= LEVEL else 0.0)

    def switch_off(self, u: float | None, reason: str) -> None:
        """End the phase at u for good; a phase that has ended keeps its place and reason."""
        if self.active:
            self.kd_off = {"at": u, "reason": reason}

    def state_dict(self) -> dict:
        """All that changes during a run."""
        fade = {"leads": self.leads, "first_lead": self.first_lead, "lead_left": self.lead_left}
        return {"wins": self.wins, "kd_off": self.kd_off, **fade}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`; a phase that was off stays off."""
        self.wins, self.kd_off = state["wins"], state["kd_off"]
        self.leads, self.first_lead, self.lead_left = state["leads"], state["first_lead"], state["lead_left"]
