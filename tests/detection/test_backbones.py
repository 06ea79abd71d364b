"""timm's backbones under a feature pyramid: which stages are trained, and with which normalisation."""

import torch
from detection.detectors import RESNET, tiny

from w2s.detection.backbones import TimmFPN
from w2s.detection.models import build_detector


def test_trainable_layers_count_from_the_end():
    def trained(layers: int | None, name: str = "resnet10t", **kwargs) -> set[str]:
        fpn = TimmFPN(name, [8, 16], channels=8, trainable_layers=layers, model_kwargs=kwargs)
        return {n.partition(".")[0] for n, p in fpn.body.named_parameters() if p.requires_grad}

    assert trained(0, **RESNET) == set()
    assert trained(3, **RESNET) == {"layer2", "layer3"}  # layer4 is not needed for stride 16
    assert trained(None, **RESNET) == trained(5, **RESNET) == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    narrow = {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    assert trained(3, "convnext_atto", **narrow) == {"stages_1", "stages_2"}


def test_norms():
    kinds = {}
    for norm in ("frozen_bn", "bn", "gn"):
        model = build_detector(tiny(norm=norm))
        kinds[norm] = {type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__}
        kinds[norm] -= {"Conv2dNormActivation"}
    assert kinds == {"frozen_bn": {"FrozenBatchNorm2d"}, "bn": {"BatchNorm2d"}, "gn": {"GroupNorm"}}
    model = build_detector(tiny(backbone="mobilenetv3_small_050", norm="gn"))  # norm and activation in one module
    assert not [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
