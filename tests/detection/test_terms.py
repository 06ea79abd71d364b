"""The detectors' distillation terms: zero where both agree, hand-made numbers, gradients, means over images."""

import dataclasses

import torch
from detection.detectors import KINDS, batch, student_and_teacher, tiny
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from w2s.detection.config import DETECTOR_KINDS
from w2s.detection.models import StudentView, build_detector
from w2s.detection.teacher import DetectorTeacher
from w2s.detection.terms import compared_loss, distillation_terms


@KINDS
def test_every_term_is_zero_where_the_teacher_is_the_student(kind):
    student, teacher = student_and_teacher(kind, same=True)
    _, view = student(*batch(student.first_label))
    terms = distillation_terms(view, teacher(view), 3.0)
    assert tuple(terms) == DETECTOR_KINDS[kind].terms
    # kernels with and without gradients may round differently: 1e-7 of a logit, times T^2 and the number of classes
    assert all(abs(term.item()) < 1e-5 for term in terms.values())


@KINDS
def test_terms_are_positive_and_teach_the_student_only(kind):
    student, teacher = student_and_teacher(kind)
    if kind == "fasterrcnn":  # an untrained teacher sees no object
        teacher.model.roi_heads.box_predictor.cls_score.bias[2] = 5.0
    images, targets = batch(student.first_label)
    _, view = student(images, targets)
    terms = distillation_terms(view, teacher(view), 2.0)
    assert tuple(terms) == DETECTOR_KINDS[kind].terms and all(term.item() > 0 for term in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert all(p.grad is not None for n, p in student.named_parameters() if "extra" not in n and p.requires_grad)
    assert teacher.calls == 1


@KINDS
def test_the_compared_loss_is_torchvisions_own(kind):
    """All of RetinaNet's loss, and that of Faster R-CNN's RoI head; it draws no random number."""
    student, teacher = student_and_teacher(kind)
    images, targets = batch(student.first_label)
    targets[0] = {name: value[:0] for name, value in targets[0].items()}  # no object
    losses, view = student(images, targets)
    own = losses if kind == "retinanet" else {k: losses[k] for k in ("loss_classifier", "loss_box_reg")}
    state = torch.get_rng_state()
    torch.testing.assert_close(compared_loss(view.outputs, view, student), sum(own.values()))
    assert compared_loss(teacher(view), view, student) > 0
    assert torch.equal(torch.get_rng_state(), state)


def view_of(outputs: dict[str, Tensor], images: int = 1) -> StudentView:
    """A view with nothing but head outputs, for so many images."""
    return StudentView(images=None, outputs=outputs, proposals=[None] * images, heads=[], targets=[])


def test_anchor_terms_are_the_weighted_sums_by_hand():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        {"cls": 2 * torch.randn(2, 7, 3, generator=generator), "box": torch.randn(2, 7, 4, generator=generator)}
        for _ in range(2)
    )
    terms = distillation_terms(view_of(ours), theirs, 2.0)
    weight = theirs["cls"].sigmoid().amax(-1)
    divergence = kl_divergence(Bernoulli(logits=theirs["cls"] / 2), Bernoulli(logits=ours["cls"] / 2)).sum(-1) * 4
    torch.testing.assert_close(terms["cls"], ((divergence * weight).sum(1) / weight.sum(1)).mean())
    distance = (ours["box"] - theirs["box"]).abs()
    huber = torch.where(distance < 1 / 9, 4.5 * distance**2, distance - 1 / 18).sum(-1)
    torch.testing.assert_close(terms["box"], ((huber * weight).sum(1) / weight.sum(1)).mean())


def random_outputs(kind: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Head outputs for 4 images of 7 anchors, and for Faster R-CNN 5 proposals; 3 classes."""
    if kind == "retinanet":
        return {
            "cls": 2 * torch.randn(4, 7, 3, generator=generator),
            "box": torch.randn(4, 7, 4, generator=generator),
        }
    return {
        "rpn_cls": 2 * torch.randn(4 * 7, 1, generator=generator),
        "rpn_box": torch.randn(4 * 7, 4, generator=generator),
        "roi_cls": torch.randn(4 * 5, 3, generator=generator),
        "roi_box": torch.randn(4 * 5, 12, generator=generator),
    }


def of_images(outputs: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """The outputs for some of the 4 images."""
    some = {}
    for name, output in outputs.items():
        if name.startswith(("rpn", "roi")):
            some[name] = output.unflatten(0, (4, -1))[rows].flatten(0, 1)
        else:
            some[name] = output[rows]
    return some


@KINDS
def test_the_terms_of_a_batch_are_the_means_over_its_images(kind):
    """So that two processes with half the batch each have the gradient of one."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = random_outputs(kind, generator), random_outputs(kind, generator)
    whole = distillation_terms(view_of(ours, images=4), theirs, 2.0)
    first, second = slice(0, 2), slice(2, 4)
    one = distillation_terms(view_of(of_images(ours, first), images=2), of_images(theirs, first), 2.0)
    other = distillation_terms(view_of(of_images(ours, second), images=2), of_images(theirs, second), 2.0)
    for name in whole:
        torch.testing.assert_close(whole[name], (one[name] + other[name]) / 2)


@KINDS
def test_an_update_on_two_images_is_the_mean_of_those_on_each(kind):
    """Which is what two processes compute; Faster R-CNN where it samples all anchors and proposals, none by chance."""
    everything = {"rpn_batch_size_per_image": 10**6, "box_batch_size_per_image": 10**6, "rpn_post_nms_top_n_train": 20}
    everything |= {"rpn_fg_iou_thresh": 0.5, "rpn_bg_iou_thresh": 0.5, "rpn_nms_thresh": 1.0}
    config = dataclasses.replace(
        tiny(kind, norm="gn", extra_levels=0), detector_kwargs=everything if kind == "fasterrcnn" else {}
    )
    torch.manual_seed(0)
    student, model = build_detector(config), build_detector(config)
    if kind == "fasterrcnn":
        model.roi_heads.box_predictor.cls_score.bias.data[2] = 5.0  # an untrained teacher sees no object
    teacher = DetectorTeacher(model, source="somewhere", device="cpu", student=student)
    images = list(torch.rand(2, 3, 64, 64))
    boxes = torch.tensor([[[5.0, 8, 40, 50], [30, 20, 62, 44]], [[1.0, 2, 30, 33], [20, 24, 60, 62]]])
    targets = [{"boxes": each, "labels": torch.tensor([1, 3])} for each in boxes]

    def update(rows: slice) -> tuple[dict[str, Tensor], Tensor]:
        losses, view = student(images[rows], targets[rows])
        losses |= {f"kd_{name}": term for name, term in distillation_terms(view, teacher(view), 2.0).items()}
        assert all(loss > 0 for loss in losses.values())
        return losses, torch.autograd.grad(sum(losses.values()), student.backbone.fpn.inner_blocks[0][0].weight)[0]

    losses, gradient = update(slice(0, 2))
    losses_of_one, gradient_of_one = update(slice(0, 1))
    losses_of_other, gradient_of_other = update(slice(1, 2))
    for name, loss in losses.items():
        torch.testing.assert_close(loss, (losses_of_one[name] + losses_of_other[name]) / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, (gradient_of_one + gradient_of_other) / 2, rtol=1e-3, atol=1e-5)


def test_roi_boxes_follow_the_class_the_teacher_sees():
    def roi_box_term() -> Tensor:
        return distillation_terms(view_of(ours), theirs, 1.0)["roi_box"]

    rpn = {"rpn_cls": torch.zeros(5, 1), "rpn_box": torch.zeros(5, 4)}
    ours = rpn | {"roi_cls": torch.zeros(3, 3), "roi_box": torch.zeros(3, 12)}
    theirs = rpn | {"roi_cls": torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9]]), "roi_box": torch.zeros(3, 12)}
    theirs["roi_box"][0] = 7.0  # the teacher sees background there
    theirs["roi_box"][1, 8:] = 7.0  # not the class it sees
    assert roi_box_term() == 0
    theirs["roi_box"][2, 8:] = 1.0  # the class it sees, in one of three proposals
    torch.testing.assert_close(roi_box_term(), torch.tensor(4 * (1 - 1 / 18) / 3))
    theirs["roi_cls"] = torch.tensor([[9.0, 0, 0]] * 3)
    assert roi_box_term() == 0  # no object
