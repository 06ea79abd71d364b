"""A detector's teacher: what it is given, how it is scored, which ones line up with a student, and how it is found."""

import copy
import dataclasses
import re

import pytest
import torch
from detection.detectors import KINDS, batch, student_and_teacher, tiny

from w2s.controls import cyclic_permutation
from w2s.detection.models import build_detector
from w2s.detection.options import add_detector_options
from w2s.detection.teacher import DetectorTeacher, check_lined_up
from w2s.engine.errors import InputError
from w2s.engine.parsing import Parser


@KINDS
def test_teacher_and_student_see_the_same_pixels_whatever_their_normalisation(kind):
    student, teacher = student_and_teacher(kind, same=True)
    _, view = student(*batch(student.first_label))
    expected = teacher(view)
    shifted = copy.deepcopy(student)
    shifted.transform.image_mean, shifted.transform.image_std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    torch.manual_seed(0)
    _, other = shifted(*batch(student.first_label))
    assert not torch.equal(other.images.tensors, view.images.tensors)
    adapted = DetectorTeacher(teacher.model, source="somewhere", device="cpu", student=shifted)
    outputs = adapted(other._replace(proposals=view.proposals))
    for name in expected:
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-4, atol=1e-5)


@KINDS
def test_a_teacher_detects_on_lists_of_images(kind):
    student, teacher = student_and_teacher(kind, same=True)
    images, _ = batch()
    with torch.no_grad():
        for ours, theirs in zip(teacher(images), student.eval()(images), strict=True):
            assert torch.equal(ours["boxes"], theirs["boxes"])


@KINDS
def test_a_teacher_detects_at_the_students_size(kind):
    torch.manual_seed(0)
    student, smaller = build_detector(tiny(kind)), build_detector(tiny(kind, min_size=32, max_size=48))
    smaller.load_state_dict(student.state_dict())
    teacher = DetectorTeacher(smaller, source="somewhere", device="cpu", student=student)
    images, _ = batch()
    sizes = [model.transform(images)[0].image_sizes for model in (teacher.model, student.eval())]
    assert sizes[0] == sizes[1]


@KINDS
def test_a_teacher_detects_with_the_students_thresholds(kind):
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
    teacher = DetectorTeacher(stricter, source="somewhere", device="cpu", student=student)
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


@pytest.mark.parametrize("change", [{"strides": [8, 16]}, {"anchor_scale": 2.0, "extra_levels": 0}])
def test_the_message_names_the_options_of_a_student_that_fits(change):
    teacher = dataclasses.replace(tiny(), **change)
    with pytest.raises(InputError, match=r"a student of .* fits") as caught:
        check_lined_up(tiny(), teacher, "old_run")
    named = re.search("a student of (.*) fits", str(caught.value))[1].split()
    parser = Parser("")
    add_detector_options(parser)
    args = parser.parse_args(named)
    fitting = dataclasses.replace(
        tiny(), strides=args.strides, extra_levels=args.extra_levels, anchor_scale=args.anchor_scale
    )
    assert args.detector == "retinanet"
    check_lined_up(fitting, teacher, "old_run")


# ---- --kd-control shuffled ----


@KINDS
def test_shuffled_images_give_the_detectors_outputs_of_other_images(kind):
    student, teacher = student_and_teacher(kind, same=True)
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64), torch.rand(3, 64, 40)]
    boxes = {"boxes": torch.tensor([[4.0, 4, 30, 30]]), "labels": torch.tensor([1])}
    _, view = student.train()(images, [boxes] * 3)
    seen = []
    forward = teacher.forward
    teacher.forward = lambda batch: seen.append(batch) or forward(batch)

    def permutation(count: int, device: torch.device) -> torch.Tensor:
        return cyclic_permutation(count, 7, device)

    order = permutation(3, torch.device("cpu")).tolist()
    plain, moved = teacher(view), teacher.shuffled(permutation, view)
    assert seen[1].images.image_sizes == [view.images.image_sizes[row] for row in order]
    assert seen[1].proposals is view.proposals
    for name in ("cls", "box") if kind == "retinanet" else ("rpn_cls", "rpn_box"):
        assert plain[name].shape == moved[name].shape
        torch.testing.assert_close(moved[name].unflatten(0, (3, -1)), plain[name].unflatten(0, (3, -1))[order])
