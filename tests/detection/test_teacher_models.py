"""Detectors as teachers: every way to name one, torchvision's own, and those of other classes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from detection.detectors import KINDS, batch, tiny
from helpers import refused
from safetensors.torch import save_file
from timm.layers import freeze_batch_norm_2d
from torchvision.models import detection

from w2s.detection.config import DetectorConfig
from w2s.detection.models import build_detector, export_detector
from w2s.detection.teacher import build_detector_teacher
from w2s.detection.teacher_models import load_detector_teacher
from w2s.detection.terms import distillation_terms
from w2s.engine.errors import InputError

COCO = ["zebra", "person", "traffic light"]  # in another order than COCO's
COCO_IDS = [24, 1, 10]


def test_a_teacher_is_a_folder_or_a_weights_file_with_its_backbone(tmp_path):
    model = build_detector(tiny(backbone="resnet14t"))
    export_detector(model, tmp_path / "old" / "model")
    kwargs = model.config.model_kwargs
    for spec, backbone, given in (("old", None, {}), ("old/model/model.safetensors", "resnet14t", kwargs)):
        student = tiny(backbone="convnext_atto", trainable_layers=0)  # which says nothing of the teacher's stages
        loaded, source, class_map = load_detector_teacher(
            str(tmp_path / spec), backbone=backbone, model_kwargs=given, student=student
        )
        assert loaded.config.trainable_layers is None and class_map is None
        assert source.startswith(str(tmp_path / "old"))
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    for norm in ("gn", "bn", "frozen_bn"):  # a weights file says itself how wide its pyramid is, and how normalised
        other = build_detector(tiny(norm=norm, fpn_channels=24))
        torch.save(other.state_dict(), tmp_path / f"{norm}.pth")
        loaded, _, _ = load_detector_teacher(
            str(tmp_path / f"{norm}.pth"), backbone="resnet10t", model_kwargs=kwargs, student=tiny()
        )
        assert (loaded.config.norm, loaded.config.fpn_channels) == (norm, 24)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), other.parameters(), strict=True))
    for spec, backbone, message in (
        ("old/model/model.safetensors", None, "name its timm backbone"),
        ("old/model/model.safetensors", "resnet10t", "another architecture|does not fit"),
        ("old", "resnet14t", "go with a weights file"),
        ("new", None, "no such run folder or file"),
    ):
        with pytest.raises(InputError, match=message):
            load_detector_teacher(
                str(tmp_path / spec), backbone=backbone, model_kwargs=kwargs if backbone else {}, student=tiny()
            )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"fc.weight": torch.zeros(1)}, "holds no weights of a detector"),
        ({"backbone.body.conv1.weight": torch.zeros(1)}, "name its timm backbone"),
    ],
)
def test_weights_files_that_are_no_detectors_are_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pth")
    with refused("w.pth", words):
        load_detector_teacher(str(tmp_path / "w.pth"), backbone=None, model_kwargs={}, student=tiny())


def test_a_classifiers_folder_is_called_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    (tmp_path / "model.safetensors").touch()
    with refused(str(tmp_path), "no detector"):
        load_detector_teacher(str(tmp_path), backbone=None, model_kwargs={}, student=tiny())


# ---- other classes ----


def teach(theirs: list[str], ours: list[str], kind: str, tmp_path: Path, **options: object) -> tuple:
    """A student, a teacher from a folder of a detector of other classes, and that detector."""
    torch.manual_seed(0)
    own = build_detector(dataclasses.replace(tiny(kind), classes=theirs))
    with torch.no_grad():
        for part in (own.head.classification_head,) if kind == "retinanet" else (own.roi_heads.box_predictor,):
            for parameter in part.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    export_detector(own, tmp_path / "own")
    student = build_detector(dataclasses.replace(tiny(kind), classes=ours))
    spec = {"backbone": None, "model_kwargs": {}, "device": "cpu"}
    return student, build_detector_teacher(str(tmp_path / "own"), student=student, **spec, **options), own.eval()


def view_of(student: torch.nn.Module) -> object:
    torch.manual_seed(0)
    images, targets = batch(student.first_label)
    for target in targets:
        target["labels"] = target["labels"].clamp_max(student.first_label)
    return student.train()(images, targets)[1]


@KINDS
def test_a_teacher_of_more_classes_answers_for_the_students(kind, tmp_path):
    student, teacher, own = teach(["a", "b", "c", "d"], ["d", "b"], kind, tmp_path)
    view = view_of(student)
    answers, expected = teacher(view), own.head_outputs(view)
    if kind == "retinanet":
        torch.testing.assert_close(answers["cls"], expected["cls"][..., [3, 1]])
        torch.testing.assert_close(answers["box"], expected["box"])
    else:  # an object of another class is background to this student
        probabilities = expected["roi_cls"].softmax(-1)
        background = probabilities[:, [0, 1, 3]].sum(-1)
        torch.testing.assert_close(
            answers["roi_cls"].softmax(-1), torch.stack([background, probabilities[:, 4], probabilities[:, 2]], -1)
        )
        boxes = expected["roi_box"].unflatten(-1, (-1, 4))
        torch.testing.assert_close(answers["roi_box"].unflatten(-1, (-1, 4))[:, 1:], boxes[:, [4, 2]])
    assert teacher.known is None and "2 of the 2 classes, matched by name" in teacher.note


@KINDS
def test_detections_carry_the_students_labels(kind, tmp_path):
    student, teacher, own = teach(["a", "b", "c"], ["c", "a"], kind, tmp_path)
    images, _ = batch()
    if kind == "fasterrcnn":
        teacher.model.roi_heads.score_thresh = 0.0
    own.transform.min_size, own.transform.max_size = student.transform.min_size, student.transform.max_size
    for detector in (teacher.model, own):  # nothing is left out: other classes would count against a limit
        detector.detections_per_img, detector.topk_candidates, detector.nms_thresh = 100_000, 100_000, 1.0
    for detected, original in zip(teacher(images), own(images), strict=True):
        labels = detected["labels"] - student.first_label
        assert len(labels) and set(labels.tolist()) <= {0, 1}
        if kind == "retinanet":
            for label, own_label in ((0, 2), (1, 0)):
                scores = original["scores"][original["labels"] == own_label]
                torch.testing.assert_close(detected["scores"][labels == label], scores)


@KINDS
def test_a_teacher_of_fewer_classes_leaves_the_others_to_the_student(kind, tmp_path):
    student, teacher, own = teach(["a", "c"], ["a", "b", "c"], kind, tmp_path)
    assert teacher.known.tolist() == [0, 2] and "2 of the 3 classes" in teacher.note
    view = view_of(student)
    answers = teacher(view)
    for outputs in view.outputs.values():
        outputs.retain_grad()
    terms = distillation_terms(view, answers, 1.0, teacher.known)
    assert all(term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    if kind == "retinanet":
        gradient = view.outputs["cls"].grad
        assert gradient[..., [0, 2]].abs().sum() > 0 and gradient[..., 1].abs().sum() == 0
        return
    # by hand: background and the class that only the student knows are one class to the teacher
    ours = view.outputs["roi_cls"].detach().softmax(-1)
    merged = torch.stack([ours[:, 0] + ours[:, 2], ours[:, 1], ours[:, 3]], -1)
    theirs = own.head_outputs(view)["roi_cls"].detach()
    expected = torch.nn.KLDivLoss(reduction="batchmean")(merged.log(), theirs.softmax(-1))
    torch.testing.assert_close(terms["roi_cls"].detach(), expected, rtol=1e-4, atol=1e-6)


@KINDS
def test_a_mapped_teacher_is_rebuilt_as_it_is(kind, tmp_path):
    _, teacher, _ = teach(["a", "c"], ["a", "b", "c"], kind, tmp_path)
    assert teacher.rebuild().state_dict().keys() == teacher.model.state_dict().keys()


def test_a_file_says_which_classes_belong_together(tmp_path):
    (tmp_path / "map.yaml").write_text("cat: Katze\ndog: 0\n")
    _, teacher, _ = teach(["Hund", "Katze"], ["cat", "dog"], "retinanet", tmp_path, map_file=f"{tmp_path}/map.yaml")
    assert teacher.known is None
    with refused("--teacher-classes"):
        teach(["cat", "Katze", "Hund"], ["cat", "dog"], "retinanet", tmp_path)


@KINDS
def test_a_weights_file_of_as_many_classes_has_the_students(kind, tmp_path):
    save_file(build_detector(tiny(kind)).state_dict(), tmp_path / "w.safetensors")
    options = {"backbone": "resnet10t", "model_kwargs": tiny(kind).model_kwargs}
    model, _, class_map = load_detector_teacher(str(tmp_path / "w.safetensors"), student=tiny(kind), **options)
    assert class_map is None and model.config.classes == tiny(kind).classes
    fewer = dataclasses.replace(tiny(kind), classes=["x", "y"])
    with refused("the teacher has 5 classes, the data 2", "--teacher-classes"):
        load_detector_teacher(str(tmp_path / "w.safetensors"), student=fewer, **options)


# ---- torchvision's own ----


BUILDERS = pytest.mark.parametrize(
    "builder", ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn"]
)


def coco_student(kind: str) -> torch.nn.Module:
    small = {"channels": [8, 8, 16, 16], "stem_width": 8}
    size = {"min_size": 64, "max_size": 96, "fpn_channels": 16}
    return build_detector(DetectorConfig(kind, backbone="resnet10t", classes=COCO, model_kwargs=small, **size))


@BUILDERS
def test_a_detector_of_torchvision_answers_by_cocos_ids(builder, tmp_path):
    torch.manual_seed(0)
    own = detection.__dict__[builder](weights=None, weights_backbone=None).eval()
    kind = builder.partition("_")[0]
    for name, parameter in own.named_parameters():
        if "cls_logits" in name or "cls_score" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if builder == "retinanet_resnet50_fpn":  # as in torchvision's own weights
        own.backbone = freeze_batch_norm_2d(own.backbone)
    torch.save({"model": own.state_dict(), "epoch": 26}, tmp_path / "coco.pth")
    student = coco_student(kind)
    teacher = build_detector_teacher(
        str(tmp_path / "coco.pth"),
        backbone=f"torchvision/{builder}",
        model_kwargs={},
        student=student,
        device="cpu",
    )
    view = view_of(student)
    answers = teacher(view)
    features = own.backbone(view.images.tensors)
    if kind == "retinanet":
        expected = own.head(list(features.values()))
        torch.testing.assert_close(answers["cls"], expected["cls_logits"][..., COCO_IDS], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(answers["box"], expected["bbox_regression"], rtol=1e-4, atol=1e-4)
    else:
        pooled = own.roi_heads.box_roi_pool(features, view.proposals, view.images.image_sizes)
        logits, _ = own.roi_heads.box_predictor(own.roi_heads.box_head(pooled))
        given, expected = answers["roi_cls"].softmax(-1), logits.softmax(-1)
        torch.testing.assert_close(given[:, 1:], expected[:, COCO_IDS], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(given.sum(-1), torch.ones(len(given)))
    assert teacher.name == f"{kind}_torchvision/{builder}" and teacher.known is None
    assert all(term.isfinite() for term in distillation_terms(view, answers, 1.0).values())
    assert teacher(batch()[0])[0].keys() == {"boxes", "labels", "scores"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision/ssdlite320_mobilenet_v3_large", ("neither RetinaNet nor Faster R-CNN", "retinanet_resnet50_fpn")),
        ("torchvision/fasterrcnn_mobilenet_v3_large_320_fpn", ("has anchors of", "fasterrcnn_resnet50_fpn")),
        ("torchvision/retinanet_resnet50", ("no detector", "did you mean retinanet_resnet50_fpn")),
        ("torchvision/retinanet_resnet50_fpn.COCO_V9", ("no weights 'COCO_V9', it has COCO_V1",)),
    ],
)
def test_detectors_without_a_student_are_refused(name, words, tmp_path):
    weights = {"backbone.x": torch.zeros(1), "roi_heads.box_predictor.cls_score.bias": torch.zeros(91)}
    torch.save(weights, tmp_path / "w.pth")
    with refused(*words):
        load_detector_teacher(str(tmp_path / "w.pth"), backbone=name, model_kwargs={}, student=tiny())


def test_a_detector_without_a_student_is_refused_before_it_is_downloaded(monkeypatch):
    def download(*args, **kwargs):
        raise AssertionError("downloaded")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    with refused("neither RetinaNet nor Faster R-CNN"):
        load_detector_teacher(
            "torchvision/ssdlite320_mobilenet_v3_large",
            backbone=None,
            model_kwargs={},
            student=coco_student("retinanet").config,
        )
    with refused("cannot build", "downloaded"):  # one that fits is
        load_detector_teacher(
            "torchvision/retinanet_resnet50_fpn",
            backbone=None,
            model_kwargs={},
            student=coco_student("retinanet").config,
        )
