"""Denoisers of two families, and how they are kept on disk.

Every denoiser is called as `model(x, t, labels=None)` with x (B, C, H, W) in [-1, 1], t (B,) integer time steps and
labels (B,) classes or None, and predicts epsilon (or v) of the shape of x. The families: `ncN-rbM` on diffusers'
U-Net, and timm's vision transformers.
"""

import json
import math
import re
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import save_file
from timm.models import is_model_in_modules
from torch import Tensor, nn

from w2s.engine.errors import InputError
from w2s.engine.files import replacing_folder
from w2s.images.models import create_model, load_weights, pretrained_cfg

VIT_MODULES = {"vision_transformer", "deit"}  # timm's


class UNet(UNet2DModel):
    """diffusers' `UNet2DModel` under the call signature of this module; `export` writes the plain class."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The prediction (B, C, H, W)."""
        return super().forward(x, t, labels, return_dict=False)[0]

    @property
    def name(self) -> str:
        """As in `unet(name, ...)`, whatever the multipliers."""
        return f"nc{self.config.block_out_channels[0]}-rb{self.config.layers_per_block}"

    @property
    def facts(self) -> tuple[int, int, int | None]:
        """Image size in pixels (a pair where not square), channels, classes (None: unconditional)."""
        size = self.config.sample_size
        if isinstance(size, list | tuple):
            size = size[0] if len(set(size)) == 1 else tuple(size)
        return size, self.config.in_channels, self.config.num_class_embeds


def unet(
    name: str,
    image_size: int,
    in_chans: int = 3,
    num_classes: int | None = None,
    channel_mult: tuple[int, ...] | None = None,
    attention: tuple[int, ...] = (16, 8),
    dropout: float = 0.0,
    head_dim: int = 64,
) -> UNet:
    """A U-Net `ncN-rbM`: N base channels, M residual blocks a level, scale-shift norm (Nichol and Dhariwal 2021).

    Args:
        name: "nc64-rb2" (9.9 M parameters at 32 px), "nc128-rb3" (52.5 M), "nc160-rb3" (82.1 M), or any other N and M.
        image_size: in pixels; divisible by 2 for every level but the first.
        in_chans: image channels.
        num_classes: class-conditional where given.
        channel_mult: width of each level in units of N (default: 1, 2, 2, 2, levels below 4 px left out).
        attention: at which resolutions, in pixels, there is self-attention.
        dropout: in the residual blocks.
        head_dim: channels of an attention head (64: 4 heads at 256 channels), of the whole width where that is less.

    Raises:
        InputError: no such name, no such levels, or a size that they cannot halve.
    """
    match = re.fullmatch(r"nc([1-9]\d*)-rb([1-9]\d*)", name)
    if not match:
        raise InputError(f"unknown U-Net '{name}': ncN-rbM has N base channels and M residual blocks, as nc64-rb2")
    base, blocks = map(int, match.groups())
    if base % 4:
        raise InputError(f"U-Net '{name}': the base channels must be a multiple of 4")
    if channel_mult is None:
        channel_mult = (1, 2, 2, 2)[: max(int(math.log2(max(image_size, 1))) - 1, 1)]
    if not channel_mult or not all(isinstance(factor, int) and factor >= 1 for factor in channel_mult):
        raise InputError(f"U-Net '{name}': channel_mult={channel_mult} must be integers from 1 up, one a level")
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
        attention_head_dim=math.gcd(head_dim, *widths),  # every head whole, also in narrow models
        norm_num_groups=math.gcd(32, base),
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=num_classes,
    )


class ViT(nn.Module):
    """A timm `VisionTransformer` as denoiser: time, and class, as extra tokens; a linear head back to pixels.

    The in-context form of U-ViT (Bao et al. 2023, arXiv 2209.12152) and DiT (Peebles and Xie 2023, arXiv 2212.09748);
    the head starts at 0 as in DiT.

    Args:
        name: a timm architecture, e.g. vit_small_patch16_224.
        image_size: in pixels.
        in_chans: image channels.
        num_classes: class-conditional where given.
        kwargs: of timm's constructor: patch_size, embed_dim, depth, num_heads, ...

    Raises:
        InputError: no timm VisionTransformer of that name, arguments it does not take, patches that do not fit.
    """

    def __init__(
        self, name: str, image_size: int, in_chans: int = 3, num_classes: int | None = None, **kwargs: object
    ) -> None:
        super().__init__()
        if kwargs.get("img_size", image_size) != image_size:
            raise InputError(f"--model-kwargs img_size={kwargs['img_size']} is not the image size of {image_size}")
        kwargs = {"class_token": False, "global_pool": "", "img_size": image_size, **kwargs}
        if pretrained_cfg(name) is not None and not is_model_in_modules(name.partition(".")[0], VIT_MODULES):
            raise InputError(f"'{name}' is no timm VisionTransformer; denoisers are ncN-rbM or VisionTransformers")
        vit = create_model(name, 0, in_chans, image_size, model_kwargs=kwargs)
        self.name, self.facts = name, (image_size, in_chans, num_classes)
        self.config = dict(name=name, image_size=image_size, in_chans=in_chans, num_classes=num_classes, **kwargs)
        self.vit, self.patch, self.grid = vit, vit.patch_embed.patch_size, vit.patch_embed.grid_size
        if any(n * p != image_size for n, p in zip(self.grid, self.patch, strict=True)):
            raise InputError(f"'{name}': patches of {self.patch[0]} px do not cover {image_size} px; see patch_size")
        if isinstance(vit.norm, nn.Identity) or not isinstance(vit.patch_drop, nn.Identity):
            raise InputError(f"'{name}': no global_pool, fc_norm or patch_drop_rate here, a denoiser keeps all patches")
        self.time_proj = Timesteps(vit.embed_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(vit.embed_dim, vit.embed_dim)
        self.class_embedding = nn.Embedding(num_classes, vit.embed_dim) if num_classes else None
        self.head = nn.Linear(vit.embed_dim, math.prod(self.patch) * in_chans)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The prediction (B, C, H, W)."""
        if (labels is None) != (self.class_embedding is None):
            raise ValueError("a class-conditional denoiser takes labels, another takes none")
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
    name: str, image_size: int, in_chans: int = 3, num_classes: int | None = None, kwargs: dict | None = None
) -> UNet | ViT:
    """A denoiser of either family by its name.

    Raises:
        InputError: see `unet` and `ViT`.
    """
    make = unet if re.match(r"nc\d", name) else ViT
    try:
        return make(name, image_size, in_chans, num_classes, **(kwargs or {}))
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot build denoiser '{name}': {' '.join(str(error).split())}") from None


def rebuild(model: UNet | ViT) -> UNet | ViT:
    """A denoiser of the same architecture, before any training."""
    return UNet.from_config(model.config) if isinstance(model, UNet) else ViT(**model.config)


def export(model: UNet | ViT, scheduler: DDPMScheduler, folder: Path) -> None:
    """Write a denoiser and its process into `folder`, complete or as it was before.

    A U-Net becomes a diffusers pipeline, for `DDPMPipeline.from_pretrained` and `DDIMPipeline.from_pretrained` (whose
    call knows no classes: call `pipeline.unet` for a class-conditional one). diffusers has no such transformer: a ViT
    becomes model.safetensors, config.json and scheduler/, for `load_denoiser` alone.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with replacing_folder(folder) as beside:
        if isinstance(model, UNet):
            with torch.device("meta"):
                plain = UNet2DModel.from_config(model.config)
            plain.load_state_dict(state, assign=True)
            DDPMPipeline(plain, scheduler).save_pretrained(beside)
        else:
            scheduler.save_pretrained(beside / "scheduler")
            save_file(state, beside / "model.safetensors")
            (beside / "config.json").write_text(json.dumps(model.config, indent=2))


def load_denoiser(spec: str) -> tuple[UNet | ViT, DDPMScheduler, Path]:
    """The denoiser and its process from a run folder, a folder written by `export` or a diffusers pipeline folder.

    The parts of a pipeline lie in unet/ and scheduler/, or side by side as in diffusers' first ones.

    Raises:
        InputError: nothing of that kind is there, or it cannot be read.
    """

    def part(folder: Path, name: str) -> Path:
        return folder / name if (folder / name).is_dir() else folder

    for folder in (Path(spec) / "model", Path(spec)):
        network, process = part(folder, "unet"), part(folder, "scheduler")
        if (process / "scheduler_config.json").is_file() and (network / "config.json").is_file():
            break
    else:
        hint = f"; {Path(spec) / 'best'} has one" if (Path(spec) / "best" / "scheduler").is_dir() else ""
        raise InputError(f"{spec} holds no denoiser (model/, or a diffusers pipeline with scheduler_config.json){hint}")
    own = network == folder != process and not (folder / "model_index.json").is_file()  # a ViT
    diffusers_logging.disable_progress_bar()
    try:
        scheduler = DDPMScheduler.from_pretrained(process, local_files_only=True)
        if own:
            model = ViT(**json.loads((network / "config.json").read_text()))
            load_weights(model, network / "model.safetensors")
        else:
            options = {"output_loading_info": True, "low_cpu_mem_usage": False, "local_files_only": True}
            model, info = UNet.from_pretrained(network, **options)
            if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
                raise ValueError(f"weights do not fit: {wrong[0]}")
            if (out := model.config.out_channels) != (chans := model.config.in_channels):
                raise ValueError(f"{out} channels out for {chans} in: a learned variance is not supported")
    except InputError:
        raise
    except Exception as error:  # diffusers, safetensors and json raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot load the denoiser of {folder}: {type(error).__name__}: {reason}") from None
    return model.eval(), scheduler, folder


def check_same(student: UNet | ViT, process: DDPMScheduler, other: UNet | ViT, others: DDPMScheduler, who: str) -> None:
    """Refuse a denoiser whose epsilon at x_t and t is not that of the student's process; `who` it is, for the message.

    Raises:
        InputError: another image size, number of channels or classes, prediction type, steps or betas.
    """
    for what, here, there in zip(("image size", "channels", "classes"), student.facts, other.facts, strict=True):
        if here != there:
            raise InputError(f"{who} has {what} {there}, this run has {here}: they must see the same x_t")
    for what, key in (("--prediction", "prediction_type"), ("--diffusion-steps", "num_train_timesteps")):
        if (here := process.config[key]) != (there := others.config[key]):
            raise InputError(f"{who} was trained with {key} {there}, this run has {here}; see {what}")
    if not torch.allclose(others.alphas_cumprod.cpu(), process.alphas_cumprod.cpu(), atol=1e-6):
        raise InputError(f"{who} was trained with other betas than this run; see --betas")
