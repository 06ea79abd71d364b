"""timm's feature extractors under torchvision's feature pyramid."""

import math

import timm
import torch
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from w2s.engine.errors import InputError
from w2s.images.models import pretrained_cfg

NORMS = ("frozen_bn", "bn", "gn")


class TimmFPN(nn.Module):
    """A timm feature extractor and torchvision's feature pyramid, named as torchvision's BackboneWithFPN is.

    Args:
        name: timm's.
        strides: of the backbone's levels, ascending.
        extra_levels: above them: 0, 1 (pooled, as Faster R-CNN has it) or 2 (convolutions, as RetinaNet has them).
        width: channels of the pyramid.
        norm: one of NORMS; "gn" also normalises the pyramid.
        trainable_layers: how many of the backbone's last stages are trained; None: all.
        model_kwargs: for timm.
        pretrained: start from timm's weights.

    Raises:
        InputError: the backbone has no such strides, does not take images of any size, or cannot be had.
    """

    def __init__(
        self,
        name: str,
        strides: list[int],
        extra_levels: int = 0,
        width: int = 256,
        norm: str = "bn",
        trainable_layers: int | None = None,
        model_kwargs: dict | None = None,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels = width
        self.memory_format = torch.preserve_format  # of the images; torch.channels_last where the weights have it
        info = _features(name, model_kwargs or {}).feature_info.info
        indices = {entry["reduction"]: k for k, entry in enumerate(info)}  # the last feature of each stride
        if missing := [s for s in strides if s not in indices]:
            raise InputError(f"backbone '{name}' has no stride {missing[0]}, it has {sorted(indices)}; see --strides")
        body = _features(name, model_kwargs or {}, pretrained, out_indices=[indices[s] for s in strides])
        self.channels_first = str(getattr(body, "output_fmt", "NCHW")).rpartition(".")[2] == "NCHW"
        stages = [entry["module"] for entry in info]
        layers = len(stages) if trainable_layers is None else trainable_layers
        if layers > len(stages):
            raise InputError(f"--trainable-layers {layers}: backbone '{name}' has {len(stages)} stages")
        self.body = _normalised(body, norm)
        _freeze(self.body, stages, len(stages) - layers)
        extra = (None, LastLevelMaxPool(), LastLevelP6P7(width, width))[extra_levels]
        norm_layer = group_norm if norm == "gn" else None
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), width, extra, norm_layer)
        self._probe(name, strides)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps "0", "1", ... of `width` channels, the finest first, then the extra levels."""
        features = self.body(images.to(memory_format=self.memory_format))
        if not self.channels_first:
            features = [f.permute(0, 3, 1, 2).contiguous() for f in features]
        return self.fpn({str(k): f for k, f in enumerate(features)})

    def _probe(self, name: str, strides: list[int]) -> None:
        """An image that is not square: some architectures take only the size they were made for.

        Some keep layers that no feature comes from; a parameter without gradient stops DistributedDataParallel.
        """
        self.eval()
        try:
            with torch.enable_grad():
                maps = list(self(torch.zeros(1, 3, 128, 192)).values())
        except Exception as error:  # assertions and shape errors of all kinds
            reason = " ".join(str(error).split())[:150]
            raise InputError(f"backbone '{name}' does not take images of any size: {reason}") from None
        self.train()
        if [tuple(m.shape[-2:]) for m in maps[: len(strides)]] != [(128 // s, 192 // s) for s in strides]:
            raise InputError(f"the features of backbone '{name}' have not the strides {strides}")
        trained = [p for p in self.body.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(sum(m.sum() for m in maps), trained, allow_unused=True) if trained else ()
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


def _features(name: str, model_kwargs: dict, pretrained: bool = False, **options: object) -> nn.Module:
    """timm's feature extractor; one of fixed size (Swin, ViT) is asked for any size in the way it knows."""
    fixed = pretrained_cfg(name).get("fixed_input_size")
    for way in ({"strict_img_size": False}, {"dynamic_img_size": True}, {}) if fixed else ({},):
        try:
            kwargs = {**way, **model_kwargs, **options}
            return timm.create_model(name, pretrained=pretrained, features_only=True, **kwargs)
        except Exception as error:  # timm raises whatever its constructors and the hub raise
            if way and isinstance(error, TypeError):
                continue
            what = "cannot load pretrained weights of" if pretrained else "cannot build"
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            raise InputError(f"{what} backbone '{name}': {type(error).__name__}: {reason}") from None
    raise AssertionError("the last way returns or raises")


def _normalised(module: nn.Module, norm: str) -> nn.Module:
    """`module` with its BatchNorm frozen, as it is, or replaced by GroupNorm with the same scale and shift."""
    if norm == "frozen_bn":
        return freeze_batch_norm_2d(module)
    for name, child in list(module.named_children()) if norm == "gn" else ():
        if isinstance(child, nn.BatchNorm2d):
            group = group_norm(child.num_features)
            group.load_state_dict({k: v for k, v in child.state_dict().items() if k in ("weight", "bias")})
            acts = (child.drop, child.act) if isinstance(child, BatchNormAct2d) else ()
            module.set_submodule(name, nn.Sequential(group, *acts) if acts else group)
        else:
            _normalised(child, norm)
    return module


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups, or as many as divide the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def _freeze(body: nn.Module, stages: list[str], frozen: int) -> None:
    """Freeze the first stages of a backbone; what comes before the second belongs to the first."""
    prefixes = [f"{stage.replace('.', '_')}_" for stage in stages]  # timm flattens stages.1 to stages_1
    stage = 0
    for name, parameter in body.named_parameters():
        flat = name.removeprefix("model.").replace(".", "_")
        stage = next((k for k, prefix in enumerate(prefixes) if flat.startswith(prefix)), stage)
        if stage < frozen:
            parameter.requires_grad_(False)
