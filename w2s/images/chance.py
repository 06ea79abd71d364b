"""What guessing scores on a split, to notice a student that does no better: its training has collapsed."""

import math

import numpy as np

from w2s.engine.training import Job

LOSS_MARGIN = 0.01  # a loss that is lower than that of guessing by less than this share of it is no better


def guessing_metrics(targets: np.ndarray, num_classes: int) -> dict[str, float]:
    """The metrics of the best guess that looks at no image: always the shares of the classes.

    Args:
        targets: the labels of a split (N,).
        num_classes: C.

    Returns:
        top1 in percent, which is that of always naming the largest class, its standard error top1_error, and
        eval_loss, which is ln C where the classes are equally large.
    """
    shares = np.bincount(targets, minlength=num_classes) / len(targets)
    largest, present = float(shares.max()), shares[shares > 0]
    return {
        "top1": 100 * largest,
        "top1_error": 100 * math.sqrt(largest * (1 - largest) / len(targets)),
        "eval_loss": float(-(present * np.log(present)).sum()),
    }


def is_guessing(metrics: dict[str, float], guess: dict[str, float]) -> bool:
    """Whether neither the loss nor the accuracy of an evaluation is better than those of guessing."""
    lost = metrics["eval_loss"] >= (1 - LOSS_MARGIN) * guess["eval_loss"]
    return lost and metrics["top1"] <= guess["top1"] + 3 * guess["top1_error"]


def warn_of_guessing(job: Job, metrics: dict[str, float], guess: dict[str, float]) -> None:
    """Log a warning, with what to lower, where an evaluation of the student is no better than guessing.

    The first evaluation is let pass: a healthy student may hardly have begun to learn by then.
    """
    if len(job.run.record.rows) < 2 or not is_guessing(metrics, guess):
        return
    taught = job.distillation.updates > 0
    young = ", or the average of its weights is still near the first ones (--model-ema-warmup)" if job.ema else ""
    job.run.log(
        f"warning: the student is at chance level (top1 {metrics['top1']:.4g}, loss {metrics['eval_loss']:.4g}; "
        f"guessing gives {guess['top1']:.4g} and {guess['eval_loss']:.4g}). Unless it has hardly begun to "
        f"learn{young}, its training has collapsed: lower --lr{' or --kd-weight' if taught else ''}, or clip the "
        "gradients (--clip-grad)"
    )
