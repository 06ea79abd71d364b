"""The distillation terms of detectors, on the same anchors and proposals."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import fastrcnn_loss

from w2s.detection.models import StudentView
from w2s.losses import kl_sigmoid, kl_softmax

BETA = 1 / 9  # of smooth L1 on box deltas, as in torchvision


def distillation_terms(
    student: StudentView, teacher: dict[str, Tensor], temperature: float, known: Tensor | None = None
) -> dict[str, Tensor]:
    """The terms of L_kd by the names of `DetectorKind.terms`. Each is 0 where teacher and student agree.

    Args:
        student: of a training forward.
        teacher: the teacher's `head_outputs` for it; gets no gradient.
        temperature: T; the class terms carry the factor T^2.
        known: the student's classes (n,), from 0 up, that the teacher knows; None where it knows them all. RetinaNet's
            term is on these classes alone; for Faster R-CNN all others count as background, on both sides.
    """
    student_outputs = dict(student.outputs)
    teacher_outputs = {name: output.detach().float() for name, output in teacher.items()}
    if "cls" in student_outputs:
        if known is not None:
            for outputs in (student_outputs, teacher_outputs):
                outputs["cls"] = outputs["cls"][..., known]
        return _anchor_terms(student_outputs, teacher_outputs, temperature=temperature)
    for outputs in (student_outputs, teacher_outputs):
        for name in ("rpn_cls", "rpn_box"):  # torchvision has the anchors of all images in one dimension here
            outputs[name] = outputs[name].unflatten(0, (len(student.proposals), -1))
    return {
        **_anchor_terms(student_outputs, teacher_outputs, temperature=temperature, prefix="rpn_"),
        **_roi_terms(student_outputs, teacher_outputs, temperature=temperature, known=known),
    }


def compared_loss(outputs: dict[str, Tensor], view: StudentView, detector: nn.Module) -> Tensor:
    """torchvision's loss of head outputs for a training batch, as one number: what --kd-off running compares.

    For Faster R-CNN it is the loss of the RoI head on the proposals that the student sampled. That of the RPN samples
    anchors at random, which would change what is drawn afterwards.

    Args:
        outputs: of the student or of a teacher, by the names of `DetectorKind.terms`.
        view: of the batch.
        detector: the student.
    """
    if "cls" in outputs:
        heads = {"cls_logits": outputs["cls"].float(), "bbox_regression": outputs["box"].float()}
        return sum(detector.compute_loss(view.targets, heads, view.anchors).values())
    heads = detector.roi_heads
    boxes, labels = ([target[name] for target in view.targets] for name in ("boxes", "labels"))
    matches, labels = heads.assign_targets_to_proposals(view.proposals, boxes, labels)
    matched = [
        of_image[match] if len(of_image) else torch.zeros_like(proposals)
        for of_image, match, proposals in zip(boxes, matches, view.proposals, strict=True)
    ]
    deltas = heads.box_coder.encode(matched, view.proposals)
    return sum(fastrcnn_loss(outputs["roi_cls"].float(), outputs["roi_box"].float(), labels, deltas))


def merge_background(logits: Tensor, kept: Tensor) -> Tensor:
    """Logits (n, 1 + m) of the background and `kept` classes, where every other class counts as background.

    The probabilities of classes that are merged are summed, which keeps a softmax a softmax.

    Args:
        logits: (n, classes + 1); class 0 is the background.
        kept: labels (m,) from 1 up.
    """
    is_kept = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device).index_fill(0, kept, True)
    background = logits.masked_fill(is_kept, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([background, logits[..., kept]], -1)


def _anchor_terms(
    student: dict[str, Tensor], teacher: dict[str, Tensor], *, temperature: float, prefix: str = ""
) -> dict[str, Tensor]:
    """Bernoulli KL and smooth L1, anchor by anchor.

    An anchor counts as much as the teacher's highest class probability there, and the sum over an image is divided by
    the sum of its weights: without weights, a hundred thousand background anchors would drown the objects. The terms
    are means over images, as torchvision's own losses are, and so the same on one process as on several.

    Args:
        student, teacher: outputs of shape (images, anchors, classes or 4) on equal anchors.
        temperature: T.
        prefix: of the names of these outputs, which are also those of the terms.
    """
    cls, box = f"{prefix}cls", f"{prefix}box"
    weight = teacher[cls].sigmoid().amax(-1, keepdim=True)
    weight = weight / weight.sum(1, keepdim=True)
    # kl_sigmoid divides by the weights of all classes; here the classes of an anchor are summed
    divergence = kl_sigmoid(student[cls], teacher[cls], temperature, weight) * student[cls].shape[-1]
    distance = F.smooth_l1_loss(student[box].float(), teacher[box], beta=BETA, reduction="none")
    return {cls: divergence, box: (distance * weight).sum() / len(weight)}


def _roi_terms(
    student: dict[str, Tensor], teacher: dict[str, Tensor], *, temperature: float, known: Tensor | None
) -> dict[str, Tensor]:
    """Softmax KL of the classes, and smooth L1 of the deltas of the teacher's class where the teacher sees an object.

    Both are means over the proposals; class 0 is the background.

    Args:
        student, teacher: outputs `roi_cls` (proposals, classes + 1) and `roi_box` (proposals, 4 (classes + 1)).
        temperature: T.
        known: see `distillation_terms`.
    """
    classes = teacher["roi_cls"].argmax(-1)
    rows = torch.arange(len(classes), device=classes.device)
    student_box = student["roi_box"].float().unflatten(-1, (-1, 4))[rows, classes]
    teacher_box = teacher["roi_box"].float().unflatten(-1, (-1, 4))[rows, classes]
    is_object = (classes > 0).float()
    distance = F.smooth_l1_loss(student_box, teacher_box, beta=BETA, reduction="none").sum(-1)
    student_cls, teacher_cls = student["roi_cls"], teacher["roi_cls"]
    if known is not None:
        student_cls, teacher_cls = (
            merge_background(logits.float(), known + 1) for logits in (student_cls, teacher_cls)
        )
    return {
        "roi_cls": kl_softmax(student_cls, teacher_cls, temperature),
        "roi_box": (distance * is_object).sum() / max(len(is_object), 1),
    }
