"""The distillation term of classification: the logits, and the kinds of knowledge that `--kd-term` puts beside them.

    nd        norm and direction of the pooled features: to the centre of the teacher's features of the image's class
              (arXiv 2305.17007)
    ofa       intermediate features of the student, turned into logits by small branches, against the teacher's logits
              with an enhanced label (arXiv 2310.19444); fits pairs of different architecture, and any teacher
    features  the pooled features against the teacher's, as timm's FeatureDistillationTask has it

Features of another width than the teacher's go through a linear map. The term is

    L_kd = KL of the logits at T(u) + --kd-term-weight * the further term

and lambda(u) multiplies both, so that one window, one fade and one switch-off hold for all of it. `--kd-target taid`
has the KL, and nothing else, go to a target that moves from the student's own distribution to the teacher's
(arXiv 2501.16937).
"""

import itertools
from collections.abc import Callable, Iterable

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from w2s.distillation import Distillation
from w2s.engine.errors import InputError
from w2s.engine.plan import Plan, accumulation_dtype
from w2s.engine.randomness import mix_seed, own_randomness
from w2s.engine.run import Run
from w2s.images.branches import LogitHead, StudentBranches, branch_flops, find_features
from w2s.images.data import ImageData
from w2s.images.models import classifier_flops
from w2s.images.teacher import ImageTeacher
from w2s.losses import (
    enhanced_cross_entropy,
    interpolated_logits,
    kl_softmax,
    moved_target,
    mse_features,
    norm_and_direction,
)

TERMS = ("nd", "ofa", "features")
TERMS_OF_FEATURES = ("nd", "features")  # those that take the teacher's pooled features
OFA_GAMMA = 1.5  # a mild enhancement; the authors choose it for each pair
CENTRE_IMAGES = 100  # of each class, for the centres of the teacher's features, where an epoch has so many
BRANCHES = 0x6272616E  # keeps the seed of the branches apart from the run's other seeds
TAID_START, TAID_END, TAID_STEP, TAID_BETA = 0.4, 1.0, 5e-4, 0.99  # as in its authors' code


def hits(logits: Tensor, targets: Tensor) -> Tensor:
    """100 where the largest logit (B, classes) is that of the label and 0 elsewhere, (B,); a mixed target (B, classes)
    stands for its largest share."""
    labels = targets if targets.ndim == 1 else targets.argmax(-1)
    return 100.0 * (logits.argmax(-1) == labels)


class Term:
    """L_kd of a batch.

    Args:
        kd: the method of the run.
        model: what is trained: the student, or `StudentBranches` around it.
        kind: one of `TERMS`, None for the logits alone.
        weight: of the further term, relative to the KL of the logits.
        flops: of the branches in one update.
    """

    def __init__(
        self, kd: Distillation, model: nn.Module, kind: str | None = None, weight: float = 1.0, flops: int = 0
    ) -> None:
        self.kd, self.model, self.kind, self.weight, self.flops = kd, model, kind, weight, flops
        self.state = getattr(model, "state", None) or TermState()

    @property
    def has_branches(self) -> bool:
        """Whether something is trained beside the student."""
        return isinstance(self.model, StudentBranches) and any(True for _ in self.model.branches().parameters())

    def __call__(self, logits: Tensor, taught: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch that was forwarded by `model`, before its multiplication with lambda.

        Args:
            logits: of the student (B, classes).
            taught: what `Distillation.teach` gave for the same images (B, classes).
            targets: labels (B,) or mixed ones (B, classes), of which the terms take the largest share.
        """
        temperature, known = self.kd.temperature, self.kd.teacher.known
        loss = kl_softmax(logits, self.state.target(logits, taught), temperature, known)
        self.state.follow(loss.detach())
        if self.kind is None:
            return loss
        labels = targets if targets.ndim == 1 else targets.argmax(-1)
        features, head_logits = self.model.outputs
        if self.kind == "nd":
            further = norm_and_direction(features, self.kd.teacher.features, self.state.centres[labels])
        elif self.kind == "features":
            further = mse_features(features, self.kd.teacher.features)
        else:
            options = {"temperature": temperature, "gamma": OFA_GAMMA, "classes": known}
            further = sum(enhanced_cross_entropy(head, taught, labels, **options) for head in head_logits)
        return loss + self.weight * further


class TermState(nn.Module):
    """What a term keeps in the checkpoints beside its branches.

    Args:
        centres: the shape (classes, D) of the centres of the teacher's features, for `nd`.
        length: updates until the target of TAID has moved all the way; None for a target that is the teacher.
        micro_batches: of an update, each of which calls `follow`.
    """

    def __init__(
        self, centres: tuple[int, int] | None = None, length: float | None = None, micro_batches: int = 1
    ) -> None:
        super().__init__()
        self.length, self.micro_batches = length, micro_batches
        self._losses: list[Tensor] = []  # of the micro-batches of this update so far
        self.register_buffer("centres", None if centres is None else torch.zeros(centres))
        if length is not None:
            for name, value in (("t", TAID_START), ("momentum", 0.0), ("previous", torch.inf), ("updates", 0.0)):
                self.register_buffer(name, torch.tensor(value))

    def target(self, logits: Tensor, taught: Tensor) -> Tensor:
        """The logits that the student's are compared with."""
        return taught if self.length is None else interpolated_logits(logits, taught, self.t)

    def follow(self, loss: Tensor) -> None:
        """Move the target on after an update, of which a micro-batch has this loss, alike on all processes.

        An update that overflowed leaves it where it was.
        """
        if self.length is None:
            return
        self._losses.append(loss)
        if len(self._losses) < self.micro_batches:
            return
        loss = reduce(torch.stack(self._losses).mean(), "mean")
        self._losses.clear()
        linear = TAID_START + (TAID_END - TAID_START) * (self.updates / self.length).clamp_max(1)
        moved = moved_target(
            self.t, self.momentum, self.previous, loss, linear, step=TAID_STEP, beta=TAID_BETA, end=TAID_END
        )
        for buffer, value in zip((self.t, self.momentum, self.previous), (*moved, loss), strict=True):
            buffer.copy_(torch.where(loss.isfinite(), value, buffer))
        self.updates += 1


def check_term(args, student: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Refuse a `--kd-term` or a student that do not go together, before anything long begins.

    Raises:
        InputError: the student gives no features, or another option excludes the term.
    """
    if not args.kd_term or not args.teacher:
        return
    what = f"--kd-term {args.kd_term}"
    if args.torchcompile:
        raise InputError(f"{what} takes features from inside the student: leave out --torchcompile")
    if args.layer_decay is not None:
        raise InputError(f"{what} trains branches beside the student's layers: leave out --layer-decay")
    if args.kd_control in ("uniform", "labels") and args.kd_term in TERMS_OF_FEATURES:
        raise InputError(f"--kd-control {args.kd_control} has no features to put in the teacher's place for {what}")
    if args.kd_control == "shuffled" and args.kd_term == "nd":
        raise InputError(f"{what} has centres of the true classes, which --kd-control shuffled leaves as they are")
    found = find_features(student, image_shape)
    if found is None:
        raise InputError(f"{what}: {args.model} gives no pooled features in front of its classifier")
    if args.kd_term == "ofa" and not found[1]:
        raise InputError(f"{what}: {args.model} gives no intermediate features (timm's forward_intermediates)")


def build_term(
    args,
    run: Run,
    plan: Plan,
    kd: Distillation,
    *,
    student: nn.Module,
    data: ImageData,
    train_batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
) -> Term:
    """The term of a run, with the model to train in place of the student.

    Args:
        args: resolved options; this reads --kd-term, --kd-term-weight and --kd-target.
        run, plan, kd: the run, its updates and its method, whose teacher is there while its phase lasts.
        student: on its device, with the images of the run in its pretrained_cfg.
        data: of the run.
        train_batches: gives endless (images, labels) of this process from the beginning, for the centres of `nd`.
    """
    if kd.phase is None or not (args.kd_term or args.kd_target):
        return Term(kd, student)
    pooled, shapes = find_features(student, student.pretrained_cfg["input_size"]) if args.kd_term else (0, {})
    width = kd.score["features"] if args.kd_term in TERMS_OF_FEATURES else 0
    projection, heads = None, {}
    with own_randomness():
        torch.random.default_generator.manual_seed(mix_seed(run.seed, BRANCHES))
        if width not in (0, pooled):
            projection = nn.Linear(pooled, width)
        if args.kd_term == "ofa":
            heads = {stage: LogitHead(shape, pooled, data.num_classes) for stage, shape in shapes.items()}
    length = None
    if args.kd_target == "taid":
        length = min(kd.phase.window * plan.updates_per_epoch, plan.total) or plan.total
    state = TermState((data.num_classes, width) if args.kd_term == "nd" else None, length, args.grad_accum_steps)
    model = StudentBranches(
        student, wanted=lambda: kd.weight > 0, pooled=width > 0, projection=projection, heads=heads, state=state
    ).to(run.device)
    if args.kd_term == "nd" and not run.state:
        most = plan.updates_per_epoch * args.grad_accum_steps
        state.centres.copy_(class_centres(kd.teacher, train_batches(), most=most, num_classes=data.num_classes))
        kd.restart_timer()
    flops = branch_flops(model, pooled, shapes, plan.batch)
    params = sum(parameter.numel() for parameter in model.branches().parameters())
    run.log(_describe(args, params))
    return Term(kd, model, args.kd_term, args.kd_term_weight, flops)


def _describe(args, params: int) -> str:
    parts = ["KL of the logits" + (", to a target that moves to the teacher (taid)" if args.kd_target else "")]
    if args.kd_term:
        parts.append(f"{args.kd_term_weight:g} times {args.kd_term}")
    beside = f"; branches of {params / 1e6:.3g} M parameters beside the student, in no export" if params else ""
    return f"distillation term: {' and '.join(parts)}{beside}"


def update_flops(term: Term, student: nn.Module, batch: int, student_update: int) -> dict[str, int]:
    """FLOPs of one update of the student, of the teacher's forward in it, and of the branches where there are any.

    Args:
        term: of the run.
        student: with the images of the run in its pretrained_cfg.
        batch: images of an update, over all processes.
        student_update: from `student_flops`.
    """
    flops = {"student_update": student_update, "teacher_forward": 0}
    if term.kd.needs_forward:
        flops["teacher_forward"] = forward_flops(term.kd.teacher, student, batch=batch)
    return flops | ({"branches": term.flops} if term.flops else {})


def forward_flops(teacher: ImageTeacher, student: nn.Module, batch: int) -> int:
    """FLOPs of a teacher's forward in an update, with the arguments of `update_flops`."""
    shape = (student.pretrained_cfg["input_size"][0], *teacher.size)
    return classifier_flops(teacher.model, shape, batch=batch, train=False)


@torch.no_grad()
def class_centres(
    teacher: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], *, most: int, num_classes: int
) -> Tensor:
    """The mean of the teacher's pooled features of each class (classes, D), over all processes.

    It takes training batches, augmented as the student sees them, until every class has had `CENTRE_IMAGES` images or
    an epoch is over, and keeps nothing but the sums. A class without an image has a centre of 0.

    Args:
        teacher: an `ImageTeacher` that gives features.
        batches: (images, labels) of this process.
        most: batches of this process in an epoch.
        num_classes: of the labels.
    """
    sums = counts = None
    for images, labels in itertools.islice(batches, most):
        teacher(images)
        features = teacher.features.to(accumulation_dtype(images.device))
        one_hot = nn.functional.one_hot(labels, num_classes).to(features)
        batch_sums, batch_counts = (reduce(part, "sum") for part in (one_hot.T @ features, one_hot.sum(0)))
        sums, counts = (batch_sums, batch_counts) if sums is None else (sums + batch_sums, counts + batch_counts)
        if counts.min() >= CENTRE_IMAGES:
            break
    return sums / counts.clamp_min(1)[:, None]
