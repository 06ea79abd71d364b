"""Denoisers of two families.

Every denoiser is called as `model(x, t, labels=None)`, with noisy images x (B, C, H, W), integer time steps t (B,) and
classes labels (B,) or None, and predicts epsilon or v in the shape of x. The two families are diffusers' U-Net, named
`ncN-rbM`, and timm's vision transformers.
"""

import copy
import math
import re
from typing import NamedTuple

import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from timm.models import is_model_in_modules
from torch import Tensor, nn

from w2s.engine.errors import InputError, on_one_line
from w2s.engine.plan import count_flops
from w2s.images.models import create_model, pretrained_cfg

VIT_MODULES = {"vision_transformer", "deit"}  # of timm, whose models are of class VisionTransformer


class Signature(NamedTuple):
    """What a denoiser takes."""

    image_size: int | tuple[int, int]  # in pixels; a pair where the images are not square
    channels: int
    classes: int | None  # None: unconditional


class UNet(UNet2DModel):
    """diffusers' `UNet2DModel` with the call of this module; exports have the plain class."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The prediction (B, C, H, W)."""
        return super().forward(x, t, labels, return_dict=False)[0]

    @property
    def name(self) -> str:
        """As in `unet(name, ...)`; it does not show the channel multipliers."""
        return f"nc{self.config.block_out_channels[0]}-rb{self.config.layers_per_block}"

    @property
    def signature(self) -> Signature:
        """Image size, channels and classes."""
        size = self.config.sample_size
        if isinstance(size, list | tuple):
            size = size[0] if len(set(size)) == 1 else tuple(size)
        return Signature(size, channels=self.config.in_channels, classes=self.config.num_class_embeds)


def unet(
    name: str,
    image_size: int,
    in_chans: int = 3,
    *,
    num_classes: int | None = None,
    channel_mult: tuple[int, ...] | None = None,
    attention: tuple[int, ...] = (16, 8),
    dropout: float = 0.0,
    head_dim: int = 64,
) -> UNet:
    """A U-Net with scale-shift norm (Nichol and Dhariwal 2021, arXiv 2102.09672).

    Args:
        name: "ncN-rbM" with N base channels and M residual blocks per level: "nc64-rb2" (9.9 M parameters at 32 px),
            "nc128-rb3" (52.5 M), "nc160-rb3" (82.1 M), or any other.
        image_size: in pixels; it is halved from each level to the next.
        in_chans: channels of the images.
        num_classes: makes the U-Net class-conditional.
        channel_mult: width of each level in units of N (default: 1, 2, 2, 2, without levels below 4 px).
        attention: resolutions in pixels that have self-attention.
        dropout: in the residual blocks.
        head_dim: channels per attention head, reduced to the largest number that divides all widths.

    Raises:
        InputError: the name or the multipliers are not valid, or the size cannot be halved that often.
    """
    match = re.fullmatch(r"nc([1-9]\d*)-rb([1-9]\d*)", name)
    if not match:
        raise InputError(f"unknown U-Net '{name}': give ncN-rbM, N base channels and M residual blocks, e.g. nc64-rb2")
    base, blocks = int(match[1]), int(match[2])
    if base % 4:
        raise InputError(f"U-Net '{name}': the base channels must be a multiple of 4")
    if channel_mult is None:
        channel_mult = (1, 2, 2, 2)[: max(int(math.log2(max(image_size, 1))) - 1, 1)]
    for option, value in (("channel_mult", channel_mult), ("attention", attention)):
        if not isinstance(value, list | tuple):
            raise InputError(f"U-Net '{name}': {option}={value} must be a list, as in '{option}=[{value}]'")
    if not channel_mult or not all(isinstance(factor, int) and factor >= 1 for factor in channel_mult):
        raise InputError(f"U-Net '{name}': channel_mult={channel_mult} must be integers from 1 up, one per level")
    halvings = 2 ** (len(channel_mult) - 1)
    if image_size % halvings:
        raise InputError(f"U-Net '{name}': {len(channel_mult)} levels need an image size divisible by {halvings}")
    attended = [image_size >> level in attention for level in range(len(channel_mult))]
    widths = tuple(base * factor for factor in channel_mult)
    return UNet(
        sample_size=image_size,
        in_channels=in_chans,
        out_channels=in_chans,
        block_out_channels=widths,
        layers_per_block=blocks,
        down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attended),
        up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attended)),
        dropout=dropout,
        attention_head_dim=math.gcd(head_dim, *widths),  # it must divide every width
        norm_num_groups=math.gcd(32, base),
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=num_classes,
    )


class ViT(nn.Module):
    """A timm `VisionTransformer` as a denoiser, with the time step and the class as extra tokens.

    This is the in-context conditioning of U-ViT (Bao et al. 2023, arXiv 2209.12152) and DiT (Peebles and Xie 2023,
    arXiv 2212.09748). A linear head turns each patch token back into pixels; it starts at 0, as in DiT.

    Args:
        name: a timm architecture, e.g. vit_small_patch16_224.
        image_size: in pixels.
        in_chans: channels of the images.
        num_classes: makes the denoiser class-conditional.
        kwargs: arguments of timm's constructor: patch_size, embed_dim, depth, num_heads, ...

    Raises:
        InputError: timm has no VisionTransformer of that name, it does not take these arguments, or its patches do not
            cover the image.
    """

    def __init__(
        self, name: str, image_size: int, in_chans: int = 3, *, num_classes: int | None = None, **kwargs: object
    ) -> None:
        super().__init__()
        if kwargs.get("img_size", image_size) != image_size:
            raise InputError(f"--model-kwargs img_size={kwargs['img_size']} is not the image size of {image_size}")
        kwargs = {"class_token": False, "global_pool": "", "img_size": image_size, **kwargs}
        if pretrained_cfg(name) is not None and not is_model_in_modules(name.partition(".")[0], VIT_MODULES):
            raise InputError(f"'{name}' is no timm VisionTransformer; denoisers are ncN-rbM or VisionTransformers")
        vit = create_model(name, num_classes=0, in_chans=in_chans, img_size=image_size, model_kwargs=kwargs)
        self.name = name
        self.signature = Signature(image_size, channels=in_chans, classes=num_classes)
        self.config = dict(name=name, image_size=image_size, in_chans=in_chans, num_classes=num_classes, **kwargs)
        self.vit, self.patch, self.grid = vit, vit.patch_embed.patch_size, vit.patch_embed.grid_size
        if any(n * p != image_size for n, p in zip(self.grid, self.patch, strict=True)):
            raise InputError(f"'{name}': patches of {self.patch[0]} px do not cover {image_size} px; see patch_size")
        if isinstance(vit.norm, nn.Identity) or not isinstance(vit.patch_drop, nn.Identity):
            raise InputError(f"'{name}': a denoiser keeps all patches: no global_pool, fc_norm or patch_drop_rate")
        self.time_proj = Timesteps(vit.embed_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(vit.embed_dim, vit.embed_dim)
        self.class_embedding = nn.Embedding(num_classes, vit.embed_dim) if num_classes else None
        self.head = nn.Linear(vit.embed_dim, math.prod(self.patch) * in_chans)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The prediction (B, C, H, W)."""
        if (labels is None) != (self.class_embedding is None):
            raise ValueError("a class-conditional denoiser needs labels, an unconditional one takes none")
        vit, (rows, columns), (height, width) = self.vit, self.grid, self.patch
        patches = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
        context = [self.time_embedding(self.time_proj(t).to(self.head.weight.dtype))]
        if labels is not None:
            context.append(self.class_embedding(labels))
        tokens = torch.cat([torch.stack(context, 1).to(patches.dtype), patches], 1)
        pixels = self.head(vit.norm(vit.blocks(tokens))[:, -rows * columns :])
        pixels = pixels.view(-1, rows, columns, height, width, x.shape[1]).permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(x.shape)


def build_denoiser(
    name: str,
    image_size: int,
    in_chans: int = 3,
    *,
    num_classes: int | None = None,
    model_kwargs: dict | None = None,
) -> UNet | ViT:
    """A denoiser of the family that its name belongs to.

    Raises:
        InputError: see `unet` and `ViT`.
    """
    build = unet if re.match(r"nc\d", name) else ViT
    try:
        return build(name, image_size, in_chans, num_classes=num_classes, **(model_kwargs or {}))
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot build denoiser '{name}': {on_one_line(error)}") from None


def rebuild(model: UNet | ViT) -> UNet | ViT:
    """A denoiser of the same architecture that was never trained."""
    return UNet.from_config(model.config) if isinstance(model, UNet) else ViT(**model.config)


def denoiser_flops(model: UNet | ViT, batch: int, backward: bool) -> int:
    """FLOPs of a forward on `batch` images, or of a forward and backward. Nothing is computed to count them."""
    size, channels, classes = model.signature
    x = torch.empty(2, channels, size, size, device="meta")
    t = torch.empty(2, dtype=torch.long, device="meta")
    labels = t if classes else None
    meta_model = copy.deepcopy(model).to("meta").train(backward)
    if backward:
        return count_flops(lambda: meta_model(x, t, labels).sum().backward()) * batch // 2
    return count_flops(lambda: meta_model(x, t, labels)) * batch // 2
