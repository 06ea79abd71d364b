"""The method in a run."""

import math
from collections.abc import Callable

from w2s.engine.errors import InputError
from w2s.teacher import Teacher


def score_teacher(
    teacher: Teacher,
    run: "w2s.engine.run.Run",  # noqa: F821
    metric: str,
    report: Callable[[], float],
    switch: Callable[[], float],
    mode: str = "max",
    error: Callable[[float], float] | None = None,
) -> dict:
    """Measure a teacher on both splits in the student's pipeline, say what it scores, and what summary.json says of it.

    Args:
        teacher: callable like a student.
        run: gives `--teacher-score`, which takes the place of `switch`, and the log.
        metric: name of the metric.
        report, switch: measure the teacher on the reporting split and on the switch split.
        mode: "max" or "min".
        error: the standard error of a score on the switch split, where it is known; with it comes the warning of a
            score that is too good to be true.

    Raises:
        InputError: a score is not finite: its weights are broken, and nothing could ever beat it.
    """
    reported, given = report(), run.args.teacher_score
    score = switch() if given is None else given
    if not (math.isfinite(reported) and math.isfinite(score)):
        raise InputError(
            f"the teacher from {teacher.source} scores {metric} {reported:g}, {score:g} on the switch split"
        )
    how = "measured on the switch split" if given is None else "given by --teacher-score"
    run.log(
        f"teacher {teacher.name} ({teacher.params / 1e6:.2f} M) from {teacher.source}: {metric} {reported:.4g} on the "
        f"reporting split; to beat: {score:.4g}, {how}" + (f" (standard error {error(score):.2g})" if error else "")
    )
    lead = score - reported if mode == "max" else reported - score
    if given is None and error and lead > abs(reported) / 50 + 2 * error(score):
        run.log(
            "warning: the teacher scores clearly better on the switch split than on the reporting split; if it was "
            "trained on that data the student may never pass it: give its held-out score with --teacher-score"
        )
    return {
        "model": teacher.name,
        "switch": score,
        "report": reported,
        "params": teacher.params,
        "checkpoint": teacher.source,
    }
