"""Denoisers on disk: export, loading, and the check that another denoiser fits a run."""

import json
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import save_file

from w2s.diffusion.denoisers import UNet, ViT
from w2s.engine.errors import InputError, on_one_line
from w2s.engine.files import replacing_folder
from w2s.images.models import load_weights


def export_denoiser(model: UNet | ViT, process: DDPMScheduler, folder: Path) -> None:
    """Write a denoiser and its diffusion process into `folder`, which is replaced as a whole.

    A U-Net becomes a pipeline that diffusers' `DDPMPipeline.from_pretrained` and `DDIMPipeline.from_pretrained` load.
    A pipeline cannot be asked for classes: to sample from a class-conditional model, call `pipeline.unet`. diffusers
    has no transformer like ours, so a ViT becomes model.safetensors, config.json and scheduler/, which only
    `load_denoiser` reads.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with replacing_folder(folder) as beside:
        if isinstance(model, UNet):
            with torch.device("meta"):
                plain = UNet2DModel.from_config(model.config)
            plain.load_state_dict(state, assign=True)
            DDPMPipeline(plain, process).save_pretrained(beside)
        else:
            process.save_pretrained(beside / "scheduler")
            save_file(state, beside / "model.safetensors")
            (beside / "config.json").write_text(json.dumps(model.config, indent=2))


def load_denoiser(path: str) -> tuple[UNet | ViT, DDPMScheduler, Path]:
    """Load a denoiser and its diffusion process.

    Args:
        path: a run folder, a folder written by `export_denoiser`, or the folder of a diffusers pipeline, whose parts
            are in unet/ and scheduler/ or, as in diffusers' first pipelines, side by side.

    Returns:
        The denoiser in eval mode, its process, and the folder it came from.

    Raises:
        InputError: there is no denoiser, or it cannot be read.
    """
    folder, network, scheduler = _find_denoiser(path)
    _check_has_betas(scheduler)
    is_vit = network == folder != scheduler and not (folder / "model_index.json").is_file()
    diffusers_logging.disable_progress_bar()
    try:
        process = DDPMScheduler.from_pretrained(scheduler, local_files_only=True)
        if is_vit:
            model = ViT(**json.loads((network / "config.json").read_text()))
            load_weights(model, network / "model.safetensors")
        else:
            model = _load_unet(network)
    except InputError:
        raise
    except Exception as error:  # diffusers, safetensors and json raise many kinds
        reason = on_one_line(error, limit=200)
        raise InputError(f"cannot load the denoiser of {folder}: {type(error).__name__}: {reason}") from None
    return model.eval(), process, folder


def _find_denoiser(path: str) -> tuple[Path, Path, Path]:
    """The folder of a denoiser, and in it those of the network and of the scheduler."""
    for folder in (Path(path) / "model", Path(path)):
        network = folder / "unet" if (folder / "unet").is_dir() else folder
        scheduler = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
        if (network / "config.json").is_file() and (scheduler / "scheduler_config.json").is_file():
            return folder, network, scheduler
    best = Path(path) / "best"
    hint = f"; {best} has one" if (best / "scheduler").is_dir() else ""
    raise InputError(f"{path} holds no denoiser (model/, or a diffusers pipeline with scheduler_config.json){hint}")


def _check_has_betas(scheduler: Path) -> None:
    """Refuse schedulers, such as those of flow matching, that `DDPMScheduler` would take for one with default betas.

    Raises:
        InputError: it cannot be read, or has no betas.
    """
    try:
        config = json.loads((scheduler / "scheduler_config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the scheduler of {scheduler}: {on_one_line(error, limit=200)}") from None
    if not isinstance(config, dict) or not {"beta_schedule", "num_train_timesteps"} <= config.keys():
        kind = config.get("_class_name", "its scheduler") if isinstance(config, dict) else "its scheduler"
        raise InputError(f"{scheduler}: {kind} is no discrete diffusion process with betas")


def _load_unet(folder: Path) -> UNet:
    """A U-Net whose weights fit its config and that predicts nothing but epsilon or v."""
    model, info = UNet.from_pretrained(folder, output_loading_info=True, low_cpu_mem_usage=False, local_files_only=True)
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise ValueError(f"weights do not fit: {wrong[0]}")
    in_channels, out_channels = model.config.in_channels, model.config.out_channels
    if in_channels != out_channels:
        raise ValueError(f"{out_channels} channels out for {in_channels} in: a learned variance is not supported")
    return model


def load_compatible(path: str, student: UNet | ViT, process: DDPMScheduler, *, source: str) -> tuple[UNet | ViT, Path]:
    """Load a denoiser whose epsilon at x_t and t means what that of the student does.

    Args:
        path: see `load_denoiser`.
        student, process: the denoiser of this run and its diffusion process.
        source: what the loaded denoiser is called in messages, such as "--teacher RUN".

    Returns:
        The denoiser in eval mode, and the folder it came from.

    Raises:
        InputError: see `load_denoiser` and `check_compatible`.
    """
    model, model_process, folder = load_denoiser(path)
    check_compatible(student, process, other=model, other_process=model_process, source=source)
    return model, folder


def check_compatible(
    student: UNet | ViT, process: DDPMScheduler, *, other: UNet | ViT, other_process: DDPMScheduler, source: str
) -> None:
    """Refuse a denoiser whose epsilon at x_t and t does not mean what the student's does.

    Args:
        student, process: the denoiser of this run and its diffusion process.
        other, other_process: the denoiser to check and its diffusion process.
        source: what the other denoiser is called in the message.

    Raises:
        InputError: it has another image size, number of channels or classes, prediction type, number of steps or betas.
    """
    check_same_images(student, other=other, source=source)
    for option, key in (("--prediction", "prediction_type"), ("--diffusion-steps", "num_train_timesteps")):
        here, there = process.config[key], other_process.config[key]
        if here != there:
            raise InputError(f"{source} was trained with {key} {there}, this run has {here}; see {option}")
    if not torch.allclose(other_process.alphas_cumprod.cpu(), process.alphas_cumprod.cpu(), atol=1e-6):
        raise InputError(f"{source} was trained with other betas than this run; see --betas")


def check_same_images(student: UNet | ViT, *, other: UNet | ViT, source: str) -> None:
    """Refuse a denoiser of other images.

    Args:
        student: the denoiser of this run.
        other: the denoiser to check.
        source: what it is called in the message.

    Raises:
        InputError: it has another image size, number of channels or classes.
    """
    for name, here, there in zip(student.signature._fields, student.signature, other.signature, strict=True):
        if here != there:
            raise InputError(
                f"{source} has {name.replace('_', ' ')} {there}, this run has {here}: they must see the same x_t"
            )
