"""The first lines that a run writes about itself, and its last ones."""

from torch import nn

from w2s.crossing import target_key
from w2s.distillation import Distillation
from w2s.engine.plan import Plan
from w2s.engine.run import Run

PARTS = {
    "train": "images to train on",
    "boxes": "boxes in them",
    "switch": "held out for the switch-off",
    "report": "to report on",
}
PRECISIONS = {"no": "float32"}


def first_lines(
    run: Run,
    plan: Plan,
    distillation: Distillation,
    *,
    student: nn.Module,
    model: str,
    optimizer: str,
    data: dict[str, int],
    averaged: bool,
    metric: str,
    targets: list[float],
    flops: dict[str, int],
) -> list[str]:
    """What will happen.

    Args:
        student, model: the student and what it is called.
        optimizer: what it is trained with, in words.
        data: the sizes of the splits by name.
        averaged: whether the moving average of the weights is evaluated.
        metric, targets: the reported metric and its values tau.
        flops: see `Job`.
    """
    processes = run.accelerator.num_processes
    where = run.device.type if processes == 1 else f"{processes} processes ({run.device.type})"
    precision = run.accelerator.mixed_precision
    params = sum(p.numel() for p in student.parameters())
    parts = [f"{size} {PARTS.get(part, part)}" for part, size in data.items() if size]
    teacher = f", teacher {flops['teacher_forward'] / 1e15:.3g}" if flops["teacher_forward"] else ""
    crossings = f"first@tau of {metric} at {', '.join(map(target_key, targets))}" if targets else "no --target to time"
    lines = [
        f"{run.name}: {model} ({params / 1e6:.2f} M parameters) on {where} in {PRECISIONS.get(precision, precision)}; "
        f"{optimizer}; {plan.total} updates of {plan.batch} images, {plan.updates_per_epoch} an epoch",
        f"data: {', '.join(parts)}; {'an average of the weights is' if averaged else 'the raw weights are'} evaluated",
        f"{crossings}; PFLOPs an update: student {flops['student_update'] / 1e15:.3g}{teacher}",
    ]
    return [*lines, *filter(None, [distillation.describe()])]


def scores_text(
    metrics: dict[str, float], evaluation: dict, teacher: dict | None, running: tuple[float, float] | None
) -> str:
    """What an evaluation has found.

    Args:
        metrics: the reported ones.
        evaluation: from `Distillation.take_evaluation`.
        teacher: its score.
        running: the scores of student and teacher in training, with --kd-off running.
    """
    text = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    if "switch" in evaluation:
        text += f"; switch split {evaluation['switch']:.4g}, teacher {teacher['switch']:.4g}"
    if running:
        text += "; in training {:.4g}, teacher {:.4g}".format(*running)
    return text


def last_lines(summary: dict, place: str) -> list[str]:
    """What came of it. `place` says where its files are."""
    best = summary["best"] if summary["best"] is None else f"{summary['best']:.4g}"
    lines = [f"done: {summary['metric']} {summary['last']:.4g} at the end, {best} at best; {place}"]
    for tau, crossing in summary["targets"].items():
        where = "never"
        if first := crossing["first"]:
            where = "epoch {epoch:.4g}, update {update}, {train_seconds:.1f} train seconds".format(**first)
        lines.append(f"first@{tau}: {where}")
    return lines
