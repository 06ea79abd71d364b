"""The distillation terms: forward Kullback-Leibler divergences, teacher first. Pure functions of tensors.

The teacher is the reference distribution and gets no gradient. Logits are cast to float32 before any softmax or log,
and every term of logits carries the factor T^2 of Hinton et al. 2015 (arXiv 1503.02531), so that its gradient keeps its
scale when the temperature changes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_softmax(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, classes: Tensor | None = None
) -> Tensor:
    """`T^2 * KL(softmax(z_t / T) || softmax(z_s / T))`, the mean over all but the last dimension.

    Args:
        student_logits: (..., classes), any float type.
        teacher_logits: the same shape; detached here.
        temperature: T > 0, softens both distributions.
        classes: labels (n,) of the classes that both sides know. Both distributions are then renormalised over these,
            and the other logits have no part in the term: how much probability they get is left to the student.

    Returns:
        A float32 scalar, 0 when both sides agree. Its gradient with respect to `student_logits` is
        `T * (softmax(z_s / T) - softmax(z_t / T)) / N` with N distributions in the batch.

    Raises:
        ValueError: the shapes differ or T is not positive.
    """
    _check(student_logits, teacher_logits, temperature)
    if classes is not None:
        student_logits, teacher_logits = student_logits[..., classes], teacher_logits[..., classes]
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    distributions = max(student.shape[:-1].numel(), 1)  # an empty batch gives 0, not 0 / 0
    return F.kl_div(student, teacher, reduction="sum", log_target=True) / distributions * temperature**2


def kl_sigmoid(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """`T^2 * KL(Bernoulli(sigmoid(z_t / T)) || Bernoulli(sigmoid(z_s / T)))` of every logit, for dense detector heads.

    Args:
        student_logits: (...), one independent yes/no each, any float type.
        teacher_logits: the same shape; detached here.
        temperature: T > 0, softens both distributions.
        weight: non-negative, broadcast against the logits; the result is then the weighted sum divided by the sum of
            the broadcast weights (0 where all weights are 0). Without it: the mean.

    Returns:
        A float32 scalar, 0 when both sides agree.

    Raises:
        ValueError: the shapes differ or T is not positive.
    """
    _check(student_logits, teacher_logits, temperature)
    student = student_logits.float() / temperature
    teacher = teacher_logits.detach().float() / temperature
    p = teacher.sigmoid()
    # log(p/q) and log((1-p)/(1-q)) through logsigmoid: finite however sure either side is
    on = F.logsigmoid(teacher) - F.logsigmoid(student)
    off = F.logsigmoid(-teacher) - F.logsigmoid(-student)
    divergence = p * on + (-teacher).sigmoid() * off
    if weight is None:
        return divergence.sum() / max(divergence.numel(), 1) * temperature**2
    weight = weight.detach().to(torch.float32, copy=True)  # autograd keeps it, and would not keep one of inference mode
    weighted = divergence * weight
    # the sum of the broadcast weights, without a tensor of the size of all anchors and classes that would hold them
    total = weight.sum() * (weighted.numel() / max(weight.numel(), 1))
    return weighted.sum() / torch.where(total > 0, total, 1.0) * temperature**2


def mse_epsilon(student: Tensor, teacher: Tensor) -> Tensor:
    """`mean ||eps_t - eps_s||^2`, the forward KL of two Gaussian reverse steps of diffusion up to its weight.

    With equal variances the divergence of p_t(x_{t-1} | x_t) from p_s(x_{t-1} | x_t) is the squared distance of their
    means, and these differ by a known multiple of the predicted noise; as in Ho et al. 2020 (arXiv 2006.11239, eq. 14)
    that multiple is dropped. A Gaussian has no temperature.

    Args:
        student: (B, ...), the prediction at x_t and t, any float type.
        teacher: the same shape, at the same x_t and t; detached here.

    Returns:
        A float32 scalar, the mean over all elements; 0 when both sides agree.

    Raises:
        ValueError: the shapes differ.
    """
    _check(student, teacher)
    return F.mse_loss(student.float(), teacher.detach().float())


def interpolated_logits(student_logits: Tensor, teacher_logits: Tensor, t: Tensor | float) -> Tensor:
    """`(1 - t) z_s + t z_t`, the logits of a target on the way from the student's own distribution to the teacher's.

    They take the place of the teacher's logits in a term (TAID, Shing et al. 2025, arXiv 2501.16937, eq. 4).

    Args:
        student_logits: (..., classes), any float type; detached here, so that the target has no gradient.
        teacher_logits: the same shape; detached here.
        t: between 0, the student's distribution, and 1, the teacher's.

    Raises:
        ValueError: the shapes differ.
    """
    _check(student_logits, teacher_logits)
    return torch.lerp(student_logits.detach().float(), teacher_logits.detach().float(), torch.as_tensor(t).float())


def moved_target(
    t: Tensor, momentum: Tensor, previous: Tensor, loss: Tensor, linear: float, *, step: float, beta: float, end: float
) -> tuple[Tensor, Tensor]:
    """The next t of `interpolated_logits`, and its momentum, after an update (TAID, arXiv 2501.16937, algorithm 1).

    t never falls behind its line, and leaps ahead of it the further the faster the loss falls.

    Args:
        t, momentum: as of this update, scalars.
        previous: the loss of the update before, infinite in the first, which then changes nothing.
        loss: of this update.
        linear: where a t that rises evenly to `end` would stand now.
        step: the highest leap, as a share of what is left to 1.
        beta: of the momentum.
        end: the highest t.
    """
    change = (previous - loss) / (previous + 1e-15)
    next_momentum = beta * momentum + (1 - beta) * change
    leap = t + step * next_momentum.sigmoid() * (1 - t)
    first = previous.isinf()
    return torch.where(first, t, leap.clamp_min(linear).clamp_max(end)), torch.where(first, momentum, next_momentum)


def enhanced_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    gamma: float = 1.0,
    classes: Tensor | None = None,
) -> Tensor:
    """`-T^2 sum_c [(p_c + 1_c)^gamma - 1_c] log q_c`, the mean over the batch, with 1_c = 1 for the label and else 0.

    p and q are the distributions of teacher and student at T. This is the adaptive target enhancement of OFA-KD (Hao et
    al. 2023, arXiv 2310.19444) as the authors' code has it: the share of the cross entropy with the label that belongs
    to the task's own loss is left out. With gamma = 1 it is the cross entropy with the teacher; a larger one raises the
    label, the more the surer the teacher is of it, and lowers the other classes.

    Args:
        student_logits: (B, classes), any float type.
        teacher_logits: the same shape; detached here.
        labels: (B,), int64.
        temperature: T > 0, softens both distributions.
        gamma: the strength of the enhancement, at least 1.
        classes: see `kl_softmax`; of an image of another class only the teacher's distribution is left.

    Raises:
        ValueError: the shapes differ or T is not positive.
    """
    _check(student_logits, teacher_logits, temperature)
    label = F.one_hot(labels, student_logits.shape[-1]).float()
    if classes is not None:
        student_logits, teacher_logits = student_logits[..., classes], teacher_logits[..., classes]
        label = label[..., classes]
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.softmax(teacher_logits.detach().float() / temperature, dim=-1)
    target = (teacher + label) ** gamma - label
    return -(target * student).sum() / max(len(student), 1) * temperature**2


def norm_and_direction(student: Tensor, teacher: Tensor, centres: Tensor) -> Tensor:
    """`1 - <f_s, e> / max(|f_s|, |f_t|)`, the mean over the batch, with the unit vector e of the centre of the class.

    The student's feature is to point to the centre of the teacher's features of the image's class, and to be at least
    as long as the teacher's feature of the image (ND, Wang et al. 2023, arXiv 2305.17007; the constant 1 is that of the
    authors' code, so that the term has its minimum 0 where both hold).

    Args:
        student: (B, D), pooled features, any float type.
        teacher: (B, D), of the same images; detached here.
        centres: (B, D), the centre of the class of each image, of any length; a row of zeros has no direction.

    Raises:
        ValueError: the shapes differ.
    """
    _check(student, teacher)
    _check(student, centres)
    student, teacher = student.float(), teacher.detach().float()
    direction = F.normalize(centres.detach().float(), dim=-1)
    longer = torch.maximum(student.norm(dim=-1), teacher.norm(dim=-1)).clamp_min(1e-12)
    return (1 - (student * direction).sum(-1) / longer).mean()


def mse_features(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared error between pooled features (B, D), the teacher's detached; as timm's FeatureDistillationTask.

    Raises:
        ValueError: the shapes differ.
    """
    _check(student, teacher)
    return F.mse_loss(student.float(), teacher.detach().float())


def _check(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"student and teacher differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
