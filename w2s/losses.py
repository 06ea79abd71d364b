"""The distillation terms: forward Kullback-Leibler divergences, teacher first. Pure functions of tensors.

The teacher is the reference distribution and gets no gradient. Logits are cast to float32 before any softmax or log,
and every term carries the factor T^2 of Hinton et al. 2015 (arXiv 1503.02531), so that its gradient keeps its scale
when the temperature changes.
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


def _check(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"student and teacher differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
