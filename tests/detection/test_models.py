"""Detectors against torchvision's own: the same weights and inputs give the same losses, on any timm backbone."""

import copy
from functools import partial

import pytest
import torch
from detection.detectors import KINDS, NAMES, RESNET, SMALL, batch, tiny
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from w2s.detection.config import DetectorConfig
from w2s.detection.models import (
    build_detector,
    check_buildable,
    export_detector,
    load_detector,
    load_detector_weights,
    prepare_layout,
    read_config,
)
from w2s.engine.errors import InputError

# ---- torchvision's own ----


def torchvision_detector(kind: str, norm: str) -> torch.nn.Module:
    """torchvision's resnet50-FPN detector with random weights, sizes apart its reference settings."""
    layer = FrozenBatchNorm2d if norm == "frozen_bn" else torch.nn.BatchNorm2d
    build = partial(resnet_fpn_backbone, backbone_name="resnet50", weights=None, norm_layer=layer, trainable_layers=3)
    if kind == "fasterrcnn":
        return TorchvisionFasterRCNN(build(), num_classes=6, **SMALL)
    backbone = build(returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
    return TorchvisionRetinaNet(backbone, num_classes=5, **SMALL)


@KINDS
@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_losses_and_detections_are_torchvisions(kind, norm):
    torch.manual_seed(0)
    theirs = torchvision_detector(kind, norm)
    ours = build_detector(DetectorConfig(kind, "resnet50", NAMES, norm, trainable_layers=3, **SMALL))
    ours.load_state_dict(theirs.state_dict())  # the names are the same, too
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    images, targets = batch(ours.first_label)
    torch.manual_seed(1)
    expected = theirs(images, targets)
    torch.manual_seed(1)
    losses, view = ours(images, targets)
    assert tuple(losses) == tuple(expected) == ours.config.kind.losses
    # the same operations on the same weights in the same memory format: a difference of 0
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    assert view.images.tensors.shape[0] == 2
    gradients = [
        torch.autograd.grad(sum(each.values()), model.backbone.fpn.inner_blocks[0][0].weight)[0]
        for each, model in ((losses, ours), (expected, theirs))
    ]
    assert torch.equal(*gradients)
    with torch.no_grad():
        for mine, reference in zip(ours.eval()(images), theirs.eval()(images), strict=True):
            assert all(torch.equal(mine[name], reference[name]) for name in reference)


# ---- any backbone ----


@pytest.mark.parametrize(
    ("backbone", "kwargs"),
    [
        ("resnet10t", RESNET),
        ("convnext_atto", {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}),
        ("mobilenetv3_small_050", {}),
    ],
)
@KINDS
def test_any_backbone_trains_and_detects(backbone, kwargs, kind):
    torch.manual_seed(0)
    model = build_detector(tiny(kind, backbone, model_kwargs=kwargs))
    images, targets = batch(model.first_label)
    losses, view = model(images, targets)
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, "a parameter without gradient stops DistributedDataParallel"
    assert all(output.dtype == torch.float32 for output in view.outputs.values())
    with torch.no_grad():
        assert len(model.eval()(images)) == 2


@pytest.mark.parametrize(("strides", "extra"), [([4, 8, 16], 0), ([8, 16, 32], 2), ([4, 8], 1)])
def test_anchors_follow_the_strides_of_the_features(strides, extra):
    config = tiny(strides=strides, extra_levels=extra)
    model = build_detector(config)
    _, view = model(*batch())
    maps = model.backbone(view.images.tensors).values()
    height, width = view.images.tensors.shape[-2:]
    assert [(m.shape[-2], m.shape[-1]) for m in maps][: len(strides)] == [(height // s, width // s) for s in strides]
    assert len(maps) == len(config.anchors()) == len(strides) + extra
    assert [sides[0] for sides in config.anchors()] == [4 * strides[0] * 2**k for k in range(len(maps))]


@KINDS
def test_under_bfloat16_the_anchors_and_head_outputs_stay_float32(kind):
    torch.manual_seed(0)
    model = build_detector(tiny(kind))
    images, targets = batch(model.first_label)
    torch.manual_seed(1)
    exact, _ = model(images, targets)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        losses, view = model(images, targets)
    assert all(output.dtype == torch.float32 for output in view.outputs.values())
    generator = model.anchor_generator if kind == "retinanet" else model.rpn.anchor_generator
    assert all(cell.dtype == torch.float32 for cell in generator.cell_anchors)
    for name in losses:
        torch.testing.assert_close(losses[name].float(), exact[name], rtol=0.1, atol=0.02)


def test_a_deep_copy_keeps_its_own_outputs():
    """The moving average is a deep copy: its hooks must not write into the student."""
    model = build_detector(tiny())
    twin = copy.deepcopy(model)
    images, targets = batch()
    _, view = twin(images, targets)
    assert not model._recorded and not twin._recorded
    assert torch.equal(view.outputs["cls"], model(images, targets)[1].outputs["cls"])


@KINDS
def test_an_export_loads_as_it_was(kind, tmp_path):
    torch.manual_seed(0)
    model = build_detector(tiny(kind, norm="gn"))
    export_detector(model, tmp_path / "run" / "model")
    loaded, folder = load_detector(str(tmp_path / "run"))
    assert folder == tmp_path / "run" / "model" and loaded.config == model.config
    images, _ = batch()
    with torch.no_grad():
        for ours, theirs in zip(loaded.eval()(images), model.eval()(images), strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "yolo"}, "unknown detector 'yolo'"),
        ({"backbone": "resnet51"}, "unknown model 'resnet51'"),
        ({"strides": [3, 8]}, "no stride 3"),
        ({"extra_levels": 3}, "--extra-levels 3"),
        ({"norm": "ln"}, "--norm ln"),
        ({"min_size": 200}, "--min-size 200 is above"),
        ({"trainable_layers": 6}, "--trainable-layers 6"),
        ({"detector_kwargs": {"colour": 1}}, "--detector-kwargs.*colour"),
        ({"detector_kwargs": {"num_classes": 7}}, "--detector-kwargs: 'num_classes' follows from the other options"),
        ({"detector_kwargs": {"min_size": 7}}, "--detector-kwargs: 'min_size' follows from the other options"),
        ({"detector_kwargs": {"topk_candidates": -1}}, "topk_candidates is a number from 1 up, got -1"),
        ({"detector_kwargs": {"detections_per_img": 9.5}}, "detections_per_img is a number from 1 up, got 9.5"),
        ({"detector_kwargs": {"score_thresh": "abc"}}, r"score_thresh is a number in \[0, 1\], got 'abc'"),
        ({"detector_kwargs": {"nms_thresh": 1.5}}, r"nms_thresh is a number in \[0, 1\], got 1.5"),
        ({"detector_kwargs": {"proposal_matcher": 1}}, "'proposal_matcher' follows from"),
        ({"detector_kwargs": {"bg_iou_thresh": 0.6}}, "bg_iou_thresh 0.6 is above fg_iou_thresh 0.5"),
        ({"kind": "fasterrcnn", "detector_kwargs": {"bbox_reg_weights": [1, 2]}}, "four numbers above 0"),
        ({"anchor_scale": 0.0}, "--anchor-scale 0: no side in pixels on stride 4"),
        ({"anchor_scale": -1.0}, "--anchor-scale -1: no side"),
        ({"anchor_scale": 0.2}, "--anchor-scale 0.2: no side"),
        ({"anchor_scale": float("nan")}, "--anchor-scale nan: no side"),
        ({"model_kwargs": {"colour": 1}}, "cannot build backbone 'resnet10t'"),
        ({"backbone": "hiera_tiny_224", "strides": [4, 8]}, "does not take images of any size"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as error:
        build_detector(tiny(**options))
    assert "\n" not in str(error.value)


def test_a_config_is_tried_before_its_classes_are_known():
    check_buildable(tiny())
    with pytest.raises(InputError, match="no stride 3"):
        check_buildable(tiny(strides=[3, 8]))


def test_weights_come_from_a_folder_or_a_file(tmp_path):
    model, other = build_detector(tiny()), build_detector(tiny())
    export_detector(model, tmp_path / "run" / "model")
    for path in ("run", "run/model", "run/model/model.safetensors"):
        load_detector_weights(other, str(tmp_path / path))
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
        for parameter in other.parameters():
            parameter.data.zero_()
    (tmp_path / "run" / "model" / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(InputError, match="is no detector"):
        load_detector_weights(other, str(tmp_path / "run"))


def test_channels_last_is_the_layout_of_weights_and_images():
    torch.manual_seed(0)
    model = build_detector(tiny(norm="gn")).eval()
    assert prepare_layout(model, channels_last=False) is model
    images, inputs = torch.rand(2, 3, 64, 96), []
    with torch.no_grad():
        expected = model.backbone(images)
        model = prepare_layout(model, channels_last=True)
        model.backbone.body.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        features = model.backbone(images)
    assert inputs[0].is_contiguous(memory_format=torch.channels_last)
    weights = [p for p in model.parameters() if p.ndim == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    # another kernel adds up in another order, and a dozen layers carry that on: 1e-7 may become 1e-5 of the largest
    for name, feature in expected.items():
        torch.testing.assert_close(features[name], feature, rtol=0, atol=1e-4 * feature.abs().max().item())


def test_a_folder_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(InputError, match="no exported detector"):
        read_config(tmp_path)
    with pytest.raises(InputError, match="is no detector"):
        read_config(tmp_path)
    with pytest.raises(InputError, match="no exported model"):
        load_detector(str(tmp_path / "nothing"))
