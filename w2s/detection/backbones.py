"""timm's feature extractors under torchvision's feature pyramid."""

import math

import timm
import torch
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from w2s.engine.errors import InputError, first_line, on_one_line
from w2s.images.models import pretrained_cfg


class TimmFPN(nn.Module):
    """A timm feature extractor and torchvision's feature pyramid, whose weights have the names of torchvision's
    BackboneWithFPN.

    Args:
        name: timm's name of the backbone.
        strides: of the backbone's levels, ascending.
        extra_levels: levels above them: 0, 1 (pooled, as Faster R-CNN has it) or 2 (convolutions, as RetinaNet has
            them).
        channels: of the pyramid.
        norm: "frozen_bn", "bn" or "gn"; "gn" also normalises the pyramid.
        trainable_layers: how many of the backbone's last stages are trained; None for all.
        model_kwargs: further arguments of timm's backbone.
        pretrained: start from timm's weights.

    Attributes:
        memory_format: of the images that the backbone gets; torch.channels_last where the weights have it.

    Raises:
        InputError: the backbone cannot be built or loaded, has no such strides, or does not take images of any size.
    """

    def __init__(
        self,
        name: str,
        strides: list[int],
        *,
        extra_levels: int = 0,
        channels: int = 256,
        norm: str = "bn",
        trainable_layers: int | None = None,
        model_kwargs: dict | None = None,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels = channels
        self.memory_format = torch.preserve_format
        feature_info = _feature_extractor(name, model_kwargs or {}).feature_info.info
        indices = {entry["reduction"]: k for k, entry in enumerate(feature_info)}  # the last feature of each stride
        for stride in strides:
            if stride not in indices:
                raise InputError(f"backbone '{name}' has no stride {stride}, it has {sorted(indices)}; see --strides")
        body = _feature_extractor(
            name, model_kwargs or {}, pretrained, out_indices=[indices[stride] for stride in strides]
        )
        self.channels_first = str(getattr(body, "output_fmt", "NCHW")).rpartition(".")[2] == "NCHW"
        stages = [entry["module"] for entry in feature_info]
        trained = len(stages) if trainable_layers is None else trainable_layers
        if trained > len(stages):
            raise InputError(f"--trainable-layers {trained}: backbone '{name}' has {len(stages)} stages")
        self.body = _replace_norm(body, norm)
        _freeze(self.body, stages, len(stages) - trained)
        extra = (None, LastLevelMaxPool(), LastLevelP6P7(channels, channels))[extra_levels]
        norm_layer = group_norm if norm == "gn" else None
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), channels, extra, norm_layer)
        self._try_out(name, strides)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps "0", "1", ... of `channels` channels, the finest first, then the extra levels."""
        features = self.body(images.to(memory_format=self.memory_format))
        if not self.channels_first:
            features = [feature.permute(0, 3, 1, 2).contiguous() for feature in features]
        return self.fpn({str(k): feature for k, feature in enumerate(features)})

    def _try_out(self, name: str, strides: list[int]) -> None:
        """Run an image that is not square through the backbone: some architectures take only the size they were made
        for.

        Parameters that get no gradient are frozen: some architectures keep layers that no feature comes from, and
        DistributedDataParallel does not allow a trained parameter without a gradient.

        Raises:
            InputError: the backbone fails, or its features have other sizes than the strides say.
        """
        self.eval()
        height, width = 128, 192
        try:
            with torch.enable_grad():
                maps = list(self(torch.zeros(1, 3, height, width)).values())
        except Exception as error:  # assertions and shape errors of all kinds
            reason = on_one_line(error, limit=150)
            raise InputError(f"backbone '{name}' does not take images of any size: {reason}") from None
        self.train()
        sizes = [tuple(feature.shape[-2:]) for feature in maps[: len(strides)]]
        if sizes != [(height // stride, width // stride) for stride in strides]:
            raise InputError(f"the features of backbone '{name}' do not have the strides {strides}")
        trained = [parameter for parameter in self.body.parameters() if parameter.requires_grad]
        if trained:
            total = sum(feature.sum() for feature in maps)
            gradients = torch.autograd.grad(total, trained, allow_unused=True)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.requires_grad_(gradient is not None)


def _feature_extractor(name: str, model_kwargs: dict, pretrained: bool = False, **options: object) -> nn.Module:
    """timm's feature extractor. An architecture of fixed size (Swin, ViT) is asked to take any size, by the argument
    that it knows for this.

    Raises:
        InputError: it cannot be built, or its weights cannot be loaded.
    """
    is_fixed = pretrained_cfg(name).get("fixed_input_size")
    any_size_arguments = [{"strict_img_size": False}, {"dynamic_img_size": True}, {}] if is_fixed else [{}]
    for any_size in any_size_arguments:
        try:
            kwargs = {**any_size, **model_kwargs, **options}
            return timm.create_model(name, pretrained=pretrained, features_only=True, **kwargs)
        except Exception as error:  # timm raises whatever its constructors and the hub raise
            if any_size and isinstance(error, TypeError):
                continue  # the architecture does not know this argument
            what = "cannot load pretrained weights of" if pretrained else "cannot build"
            raise InputError(f"{what} backbone '{name}': {type(error).__name__}: {first_line(error)}") from None
    raise AssertionError("the last attempt returns or raises")


def _replace_norm(module: nn.Module, norm: str) -> nn.Module:
    """`module` with its BatchNorm frozen ("frozen_bn"), as it is ("bn"), or replaced by GroupNorm with the same scale
    and shift ("gn")."""
    if norm == "frozen_bn":
        return freeze_batch_norm_2d(module)
    if norm == "gn":
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                module.set_submodule(name, _as_group_norm(child))
            else:
                _replace_norm(child, norm)
    return module


def _as_group_norm(batch_norm: nn.BatchNorm2d) -> nn.Module:
    """GroupNorm in place of a BatchNorm, followed by whatever timm's BatchNorm does after normalising."""
    group = group_norm(batch_norm.num_features)
    state = batch_norm.state_dict()
    group.load_state_dict({name: state[name] for name in ("weight", "bias") if name in state})
    if isinstance(batch_norm, BatchNormAct2d):
        return nn.Sequential(group, batch_norm.drop, batch_norm.act)
    return group


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups, or of the largest number below that divides both 32 and the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def _freeze(body: nn.Module, stages: list[str], frozen: int) -> None:
    """Freeze the first stages of a backbone. Whatever comes before the second stage belongs to the first.

    Args:
        body: timm's feature extractor.
        stages: the names of its stages as timm's feature_info has them.
        frozen: how many to freeze.
    """
    prefixes = [f"{stage.replace('.', '_')}_" for stage in stages]  # timm flattens stages.1 to stages_1
    stage = 0
    for name, parameter in body.named_parameters():
        flat = name.removeprefix("model.").replace(".", "_")
        stage = next((k for k, prefix in enumerate(prefixes) if flat.startswith(prefix)), stage)
        if stage < frozen:
            parameter.requires_grad_(False)
