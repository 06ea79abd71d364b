"""--kd-control: what stands in for the teacher's knowledge, so that a comparison shows whether that is the cause.

A control keeps all else as it is: lambda(u), T(u), and the rule of the switch-off, for which the student is compared
with the score of the true teacher, loaded and scored as ever. A student that a control helps less may pass it later;
arms whose windows must be equal to the update take `--kd-off EPOCH`.

    shuffled  each example gets the teacher's outputs for another one of its batch: the same outputs, not of this image
    uniform   the term against the uniform distribution, without a forward of the teacher. Forward KL, uniform first:
              label smoothing; the confidence penalty is the reverse direction (Pereyra et al. 2017, arXiv 1701.06548)
    labels    the term against the true label at the teacher's confidence, the other classes alike: the virtual teacher
              of Yuan et al. 2020 (Tf-KD, arXiv 1909.11723), whose probability of the label, a constant there, is here
              the mean of the teacher's highest probability over the batch, at the same T
    random    a teacher of the same architecture that was never trained, its weights drawn from the run's seed
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2s.engine.errors import InputError
from w2s.engine.randomness import mix_seed, own_randomness
from w2s.teacher import Teacher

UNTRAINED = 0x756E7472  # tells the seed of a random teacher from the run's others


class Control(NamedTuple):
    """What one process puts in the teacher's place; `place` below is (update, micro-batch)."""

    kind: str
    seed: int
    process: int

    def shuffle(self, rows: Tensor, place: tuple[int, int]) -> Tensor:
        """`shuffled`: (B, ...) in another order, no row in its own place; any other control: as they are."""
        return rows[self._order(len(rows), place).to(rows.device)] if self.kind == "shuffled" else rows

    def shuffle_images(self, seen: "w2s.detection.models.Seen", place: tuple[int, int]) -> "w2s.detection.models.Seen":  # noqa: F821
        """`shuffled`: a detector's batch with its images exchanged, whatever else was seen of it left in place."""
        if self.kind != "shuffled":
            return seen
        images, order = seen.images, self._order(len(seen.images.tensors), place)
        sizes = [images.image_sizes[row] for row in order.tolist()]
        return seen._replace(images=type(images)(images.tensors[order.to(images.tensors.device)], sizes))

    def logits(
        self, teacher: Teacher, images: Tensor, targets: Tensor, temperature: float, place: tuple[int, int]
    ) -> Tensor:
        """What is distilled at T in place of the teacher's logits (B, classes); targets: labels (B,) or mixed ones."""
        if self.kind == "uniform":
            return torch.zeros(len(images), teacher.model.num_classes, device=images.device)
        logits = teacher(images)
        if self.kind == "labels":
            return _softened(logits.float(), targets, temperature)
        return self.shuffle(logits, place)

    def _order(self, count: int, place: tuple[int, int]) -> Tensor:
        """One random cycle through all rows (Sattolo 1986), of (seed, update, process, micro-batch) alone."""
        update, micro = place
        generator = torch.Generator().manual_seed(mix_seed(self.seed, update, self.process, micro))
        cycle = torch.randperm(count, generator=generator)
        return torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1))


def _softened(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Logits whose softmax at T gives the label the teacher's mean confidence at T and shares the rest out evenly."""
    classes = logits.shape[-1]
    confidence = (logits / temperature).softmax(-1).amax(-1).mean()
    labels = (F.one_hot(targets, classes) if targets.ndim == 1 else targets).float()
    weight = (confidence * classes - 1) / (classes - 1)
    probabilities = weight * labels + (1 - weight) / classes
    return temperature * probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()


def make_control(args, process: int) -> Control | None:
    """What `--kd-control` asks of this process; None without it.

    Raises:
        InputError: no teacher to stand in for, or no other example in the batch to change places with.
    """
    if not args.kd_control:
        return None
    if not args.teacher:
        raise InputError(
            f"--kd-control {args.kd_control} takes a teacher's place and its schedule: give --teacher, too"
        )
    if args.kd_control == "shuffled" and args.batch_size < 2:
        raise InputError("--kd-control shuffled exchanges the examples of a batch: --batch-size must be at least 2")
    return Control(args.kd_control, args.seed, process)


def untrain(teacher: Teacher, build: Callable[[], nn.Module], seed: int) -> None:
    """`random`: give a teacher that has been scored the weights that `build` draws for a new one, of `seed` alone."""
    with own_randomness():
        torch.random.default_generator.manual_seed(mix_seed(seed, UNTRAINED))
        fresh = build()
    teacher.model.load_state_dict(fresh.state_dict())
