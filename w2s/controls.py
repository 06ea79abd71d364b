"""--kd-control: what stands in for the teacher's knowledge, so that a comparison shows whether that is the cause.

A control leaves everything else as it is: lambda(u), T(u), and the rule of the switch-off, for which the student is
still compared with the score of the true teacher. A student that a control helps less may pass it later; arms whose
windows must be equal to the update take `--kd-off EPOCH`.

    shuffled  each example gets the teacher's outputs for another example of its batch
    uniform   the term against the uniform distribution, without a forward of the teacher. This is forward KL with the
              uniform distribution first, which is label smoothing; the confidence penalty is the reverse direction
              (Pereyra et al. 2017, arXiv 1701.06548)
    labels    the term against the true label at the teacher's confidence, with the rest shared by the other classes.
              This is the virtual teacher of Yuan et al. 2020 (Tf-KD, arXiv 1909.11723), where the probability of the
              label is a constant; here it is the mean over the batch of the teacher's highest probability at the same T
    random    a teacher of the same architecture that was never trained; its weights depend on the run's seed alone
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from w2s.teacher import Teacher


class Control(NamedTuple):
    """What takes the teacher's place in the term.

    Attributes:
        kind: "shuffled", "uniform", "labels" or "random".
        seed_of: turns (update, micro-batch) into a seed; it differs between processes and runs.
    """

    kind: str
    seed_of: Callable[[int, int], int]

    def outputs(
        self, teacher: Teacher, *inputs: object, targets: Tensor | None, temperature: float, update: int, micro: int
    ) -> object:
        """What the term compares the student with, in place of the teacher's outputs for `inputs`.

        Args:
            teacher: the frozen teacher.
            inputs: what the student saw.
            targets: labels (B,) or mixed ones (B, classes), for `labels`.
            temperature: T of this update.
            update, micro: number of the update, and of the micro-batch in it.
        """
        if self.kind == "uniform":
            return torch.zeros(len(inputs[0]), teacher.model.num_classes, device=inputs[0].device)
        if self.kind == "labels":
            return _softened_labels(teacher(*inputs).float(), targets, temperature)
        if self.kind == "shuffled":
            seed = self.seed_of(update, micro)
            return teacher.shuffled(lambda count, device: cyclic_permutation(count, seed, device), *inputs)
        return teacher(*inputs)


def cyclic_permutation(count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """One random cycle through all rows (Sattolo 1986), drawn on a device: no row keeps its place."""
    cycle = torch.randperm(count, generator=torch.Generator(device).manual_seed(seed), device=device)
    return torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1))


def _softened_labels(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Logits whose softmax at T gives the label the teacher's mean confidence at T and shares the rest out evenly.

    Classes that the teacher does not know have logits of -inf and no part in it.
    """
    classes = (logits > -torch.inf).sum(-1, keepdim=True)
    confidence = (logits / temperature).softmax(-1).amax(-1).mean()
    labels = (F.one_hot(targets, logits.shape[-1]) if targets.ndim == 1 else targets).float()
    weight = (confidence * classes - 1) / (classes - 1)
    probabilities = weight * labels + (1 - weight) / classes
    return temperature * probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()
