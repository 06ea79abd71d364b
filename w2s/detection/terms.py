"""The distillation terms of detectors, on the same anchors and proposals."""

import torch
import torch.nn.functional as F
from torch import Tensor

from w2s.detection.models import Seen
from w2s.losses import kl_sigmoid, kl_softmax


def distillation_terms(student: Seen, teacher: dict[str, Tensor], temperature: float) -> dict[str, Tensor]:
    """The terms of L_kd by the names of `detection.TERMS`, each 0 where teacher and student agree.

    Args:
        student: of a training forward.
        teacher: what `look` gives for it; gets no gradient.
        temperature: T; the class terms carry the factor T^2.
    """
    ours, theirs = dict(student.outputs), {name: output.detach().float() for name, output in teacher.items()}
    if "cls" in ours:
        return _dense_terms(ours, theirs, "", temperature)
    images = len(student.proposals)
    for outputs in (ours, theirs):  # torchvision runs the anchors of all images together here
        outputs |= {name: outputs[name].unflatten(0, (images, -1)) for name in ("rpn_cls", "rpn_box")}
    return _dense_terms(ours, theirs, "rpn_", temperature) | _roi_terms(ours, theirs, temperature)


def _dense_terms(ours: dict[str, Tensor], theirs: dict[str, Tensor], prefix: str, temperature: float):
    """Bernoulli KL and smooth L1 anchor by anchor, on equal anchors; (images, anchors, classes or 4).

    An anchor counts as much as the teacher's highest class probability there, and the sum over an image is divided by
    the sum of its weights: unweighted, a hundred thousand background anchors would drown the objects. The mean over
    images, as torchvision's own losses are, is the same on one process and on several.
    """
    cls, box = f"{prefix}cls", f"{prefix}box"
    weight = theirs[cls].sigmoid().amax(-1, keepdim=True)
    weight = weight / weight.sum(1, keepdim=True)
    # kl_sigmoid divides by the weights of all classes; here the classes of an anchor are summed
    divergence = kl_sigmoid(ours[cls], theirs[cls], temperature, weight) * ours[cls].shape[-1]
    distance = F.smooth_l1_loss(ours[box].float(), theirs[box], beta=BETA, reduction="none")
    return {cls: divergence, box: (distance * weight).sum() / len(weight)}


def _roi_terms(ours: dict[str, Tensor], theirs: dict[str, Tensor], temperature: float) -> dict[str, Tensor]:
    """Softmax KL; smooth L1 of the teacher's class where the teacher sees an object. Means over the proposals."""
    classes = theirs["roi_cls"].argmax(-1)
    rows = torch.arange(len(classes), device=classes.device)
    box, target = (side["roi_box"].float().unflatten(-1, (-1, 4))[rows, classes] for side in (ours, theirs))
    foreground = (classes > 0).float()
    distance = F.smooth_l1_loss(box, target, beta=BETA, reduction="none").sum(-1)
    return {
        "roi_cls": kl_softmax(ours["roi_cls"], theirs["roi_cls"], temperature),
        "roi_box": (distance * foreground).sum() / max(len(foreground), 1),
    }


BETA = 1 / 9  # of smooth L1 on box deltas, as in torchvision
