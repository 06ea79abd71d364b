"""The detectors' distillation terms: zero where both agree, hand-made numbers, gradients; who lines up with whom."""

import copy
import dataclasses

import accelerate
import pytest
import torch
from detection.detectors import KINDS, batch, tiny
from torch.distributions import Bernoulli, kl_divergence

from w2s.detection.models import TERMS, Seen, build_detector, export
from w2s.detection.teacher import DetectorTeacher, check_lined_up, load_detector_teacher
from w2s.detection.terms import distillation_terms
from w2s.engine.errors import InputError


@pytest.fixture(scope="module")
def accelerator():
    return accelerate.Accelerator(cpu=True)


def pair(kind: str, accelerator, same: bool = False):
    """A student in training, and a teacher: its copy, or one of another backbone and width."""
    torch.manual_seed(0)
    student = build_detector(tiny(kind, norm="gn"))
    narrow = {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    other = None if same else tiny(kind, "convnext_atto", model_kwargs=narrow, fpn_channels=8)
    model = copy.deepcopy(student) if same else build_detector(other)
    return student, DetectorTeacher(model, "somewhere", accelerator, student)


@KINDS
def test_every_term_is_zero_where_the_teacher_is_the_student(kind, accelerator):
    student, teacher = pair(kind, accelerator, same=True)
    _, seen = student(*batch(student.first_label))
    terms = distillation_terms(seen, teacher(seen), 3.0)
    assert tuple(terms) == TERMS[kind]
    assert all(term.item() == 0 for term in terms.values())


@KINDS
def test_terms_are_positive_and_teach_the_student_only(kind, accelerator):
    student, teacher = pair(kind, accelerator)
    if kind == "fasterrcnn":  # an untrained teacher sees no object
        teacher.model.roi_heads.box_predictor.cls_score.bias[2] = 5.0
    images, targets = batch(student.first_label)
    _, seen = student(images, targets)
    terms = distillation_terms(seen, teacher(seen), 2.0)
    assert tuple(terms) == TERMS[kind] and all(term.item() > 0 for term in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert all(p.grad is not None for n, p in student.named_parameters() if "extra" not in n and p.requires_grad)
    assert teacher.calls == 1


@KINDS
def test_teacher_and_student_see_the_same_pixels_whatever_their_normalisation(kind, accelerator):
    student, teacher = pair(kind, accelerator, same=True)
    _, seen = student(*batch(student.first_label))
    expected = teacher(seen)
    shifted = copy.deepcopy(student)
    shifted.transform.image_mean, shifted.transform.image_std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    torch.manual_seed(0)
    _, other = shifted(*batch(student.first_label))
    assert not torch.equal(other.images.tensors, seen.images.tensors)
    adapted = DetectorTeacher(teacher.model, "somewhere", accelerator, shifted)
    outputs = adapted(other._replace(proposals=seen.proposals))
    for name in expected:
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-4, atol=1e-5)


def test_dense_terms_are_the_weighted_sums_by_hand():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        {"cls": 2 * torch.randn(2, 7, 3, generator=generator), "box": torch.randn(2, 7, 4, generator=generator)}
        for _ in range(2)
    )
    terms = distillation_terms(Seen(None, ours, None), theirs, 2.0)
    weight = theirs["cls"].sigmoid().amax(-1)
    divergence = kl_divergence(Bernoulli(logits=theirs["cls"] / 2), Bernoulli(logits=ours["cls"] / 2)).sum(-1) * 4
    torch.testing.assert_close(terms["cls"], ((divergence * weight).sum(1) / weight.sum(1)).mean())
    distance = (ours["box"] - theirs["box"]).abs()
    huber = torch.where(distance < 1 / 9, 4.5 * distance**2, distance - 1 / 18).sum(-1)
    torch.testing.assert_close(terms["box"], ((huber * weight).sum(1) / weight.sum(1)).mean())


@KINDS
def test_the_terms_of_a_batch_are_the_means_over_its_images(kind):
    """So that two processes with half the batch each have the gradient of one."""
    generator = torch.Generator().manual_seed(0)
    prefix, shape = ("", (4, 7)) if kind == "retinanet" else ("rpn_", (4 * 7,))
    rows = 1 if prefix else 3

    def part(outputs: dict, rows: slice) -> dict:
        return {k: (v[rows] if not k.startswith("rpn") else v.unflatten(0, (4, 7))[rows].flatten(0, 1))
                if not k.startswith("roi") else v.unflatten(0, (4, 5))[rows].flatten(0, 1)
                for k, v in outputs.items()}  # fmt: skip

    sides = []
    for _ in range(2):
        side = {f"{prefix}cls": 2 * torch.randn(*shape, rows, generator=generator)}
        side[f"{prefix}box"] = torch.randn(*shape, 4, generator=generator)
        if prefix:
            side |= {"roi_cls": torch.randn(20, 3, generator=generator)}
            side |= {"roi_box": torch.randn(20, 12, generator=generator)}
        sides.append(side)
    whole = distillation_terms(Seen(None, sides[0], [None] * 4), sides[1], 2.0)
    halves = [
        distillation_terms(Seen(None, part(sides[0], half), [None] * 2), part(sides[1], half), 2.0)
        for half in (slice(0, 2), slice(2, 4))
    ]
    for name in whole:
        torch.testing.assert_close(whole[name], (halves[0][name] + halves[1][name]) / 2)


@KINDS
def test_an_update_on_two_images_is_the_mean_of_those_on_each(kind, accelerator):
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
    teacher = DetectorTeacher(model, "somewhere", accelerator, student)
    images = list(torch.rand(2, 3, 64, 64))
    boxes = torch.tensor([[[5.0, 8, 40, 50], [30, 20, 62, 44]], [[1.0, 2, 30, 33], [20, 24, 60, 62]]])
    targets = [{"boxes": each, "labels": torch.tensor([1, 3])} for each in boxes]

    def update(rows: slice) -> tuple[dict, torch.Tensor]:
        losses, seen = student(images[rows], targets[rows])
        losses |= {f"kd_{name}": term for name, term in distillation_terms(seen, teacher(seen), 2.0).items()}
        assert all(loss > 0 for loss in losses.values())
        return losses, torch.autograd.grad(sum(losses.values()), student.backbone.fpn.inner_blocks[0][0].weight)[0]

    whole, one, other = (update(rows) for rows in (slice(0, 2), slice(0, 1), slice(1, 2)))
    for name in whole[0]:
        torch.testing.assert_close(whole[0][name], (one[0][name] + other[0][name]) / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole[1], (one[1] + other[1]) / 2, rtol=1e-3, atol=1e-5)


def test_roi_boxes_follow_the_class_the_teacher_sees():
    dense = {"rpn_cls": torch.zeros(5, 1), "rpn_box": torch.zeros(5, 4)}
    ours = dense | {"roi_cls": torch.zeros(3, 3), "roi_box": torch.zeros(3, 12)}
    theirs = dense | {"roi_cls": torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9]]), "roi_box": torch.zeros(3, 12)}
    theirs["roi_box"][0] = 7.0  # the teacher sees background there
    theirs["roi_box"][1, 8:] = 7.0  # not the class it sees
    assert distillation_terms(Seen(None, ours, [None]), theirs, 1.0)["roi_box"] == 0
    theirs["roi_box"][2, 8:] = 1.0  # the class it sees, in one of three proposals
    torch.testing.assert_close(
        distillation_terms(Seen(None, ours, [None]), theirs, 1.0)["roi_box"], torch.tensor(4 * (1 - 1 / 18) / 3)
    )
    theirs["roi_cls"] = torch.tensor([[9.0, 0, 0]] * 3)
    assert distillation_terms(Seen(None, ours, [None]), theirs, 1.0)["roi_box"] == 0  # no object


@KINDS
def test_a_teacher_detects_on_lists_of_images(kind, accelerator):
    student, teacher = pair(kind, accelerator, same=True)
    images, _ = batch()
    with torch.no_grad():
        for ours, theirs in zip(teacher(images), student.eval()(images), strict=True):
            assert torch.equal(ours["boxes"], theirs["boxes"])


@KINDS
def test_a_teacher_detects_at_the_students_size(kind, accelerator):
    torch.manual_seed(0)
    student, smaller = build_detector(tiny(kind)), build_detector(tiny(kind, min_size=32, max_size=48))
    smaller.load_state_dict(student.state_dict())
    teacher = DetectorTeacher(smaller, "somewhere", accelerator, student)
    images, _ = batch()
    sizes = [model.transform(images)[0].image_sizes for model in (teacher.model, student.eval())]
    assert sizes[0] == sizes[1]


@KINDS
def test_a_teacher_detects_with_the_students_thresholds(kind, accelerator):
    other = {"score_thresh": 0.9, "nms_thresh": 0.9, "detections_per_img": 1}
    other = {f"box_{k}": v for k, v in other.items()} if kind == "fasterrcnn" else other | {"topk_candidates": 2}
    if kind == "fasterrcnn":
        other |= {"rpn_pre_nms_top_n_test": 3, "rpn_post_nms_top_n_test": 2, "rpn_nms_thresh": 0.1}
        other |= {"rpn_score_thresh": 0.9}
    torch.manual_seed(0)
    base = {"box_score_thresh": 0.01} if kind == "fasterrcnn" else {"score_thresh": 0.001}
    student = build_detector(dataclasses.replace(tiny(kind), detector_kwargs=base))
    stricter = build_detector(dataclasses.replace(tiny(kind), detector_kwargs=other))
    stricter.load_state_dict(student.state_dict())
    teacher = DetectorTeacher(stricter, "somewhere", accelerator, student)
    images, _ = batch()
    with torch.no_grad():
        for ours, theirs in zip(teacher(images), student.eval()(images), strict=True):
            assert len(theirs["boxes"]) > 1
            assert torch.equal(ours["boxes"], theirs["boxes"]) and torch.equal(ours["scores"], theirs["scores"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"detector": "fasterrcnn", "extra_levels": 2, "anchor_scale": 4.0}, "its detector: fasterrcnn"),
        ({"classes": ["1", "2"]}, "number of classes: 2, the student's: 5"),
        ({"classes": ["1", "2", "3", "5", "4"]}, "its class '5' is '4' in the data"),
        ({"strides": [8, 16, 32]}, "strides"),
        ({"extra_levels": 1}, "number of extra levels: 1, the student's: 2"),
        ({"anchor_scale": 3.0}, "anchor sides"),
        ({"detector_kwargs": {"bbox_reg_weights": [1, 1, 1, 1]}}, r"its weights of box deltas: \(1, 1, 1, 1\)"),
    ],
)
def test_a_teacher_that_does_not_line_up_is_refused_with_the_reason(change, message):
    with pytest.raises(InputError, match=message):
        check_lined_up(tiny(), dataclasses.replace(tiny(), **change), "old_run")


def test_backbone_width_norm_and_size_may_differ():
    other = tiny(backbone="resnet14t", fpn_channels=32, norm="gn", min_size=32)
    check_lined_up(tiny(), other, "old_run")


def test_a_teacher_is_a_folder_or_a_weights_file_with_its_backbone(tmp_path):
    model = build_detector(tiny(backbone="resnet14t"))
    export(model, tmp_path / "old" / "model")
    kwargs = model.config.model_kwargs
    for spec, backbone, given in (("old", None, {}), ("old/model/model.safetensors", "resnet14t", kwargs)):
        student = tiny(backbone="convnext_atto", trainable_layers=0)  # which says nothing of the teacher's stages
        loaded, source = load_detector_teacher(str(tmp_path / spec), backbone, given, student)
        assert loaded.config.trainable_layers is None
        assert source.startswith(str(tmp_path / "old"))
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    for norm in ("gn", "bn", "frozen_bn"):  # a weights file says itself how wide its pyramid is, and how normalised
        other = build_detector(tiny(norm=norm, fpn_channels=24))
        torch.save(other.state_dict(), tmp_path / f"{norm}.pth")
        loaded, _ = load_detector_teacher(str(tmp_path / f"{norm}.pth"), "resnet10t", kwargs, tiny())
        assert (loaded.config.norm, loaded.config.fpn_channels) == (norm, 24)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), other.parameters(), strict=True))
    for spec, backbone, message in (
        ("old/model/model.safetensors", None, "name its timm backbone"),
        ("old/model/model.safetensors", "resnet10t", "another architecture|does not fit"),
        ("old", "resnet14t", "go with a weights file"),
        ("new", None, "no such run folder or file"),
    ):
        with pytest.raises(InputError, match=message):
            load_detector_teacher(str(tmp_path / spec), backbone, kwargs if backbone else {}, tiny())
