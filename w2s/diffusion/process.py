"""The diffusion process on top of diffusers' schedulers: noising, the task loss, and sampling."""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from w2s.engine.errors import InputError
from w2s.engine.parsing import not_negative, positive_int
from w2s.engine.randomness import mix_seed
from w2s.engine.stopping import Stopping

BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # our names: diffusers' names
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}
SAMPLERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}


def add_process_options(group: argparse._ArgumentGroup) -> None:
    """The diffusion process, what a denoiser predicts, and how its loss is weighted."""
    group.add_argument("--betas", choices=BETAS, default="linear", help="how the noise grows over the process")
    group.add_argument("--diffusion-steps", type=positive_int, default=1000, metavar="N", help="of the whole process")
    group.add_argument("--prediction", choices=PREDICTIONS, default="epsilon", help="what the denoiser predicts")
    group.add_argument("--min-snr", type=not_negative, metavar="GAMMA", help="min-SNR weighting of the loss, e.g. 5")


def noise_schedule(betas: str = "linear", steps: int = 1000, prediction: str = "epsilon") -> DDPMScheduler:
    """The diffusion process with "linear" or "cosine" betas, for a denoiser that predicts "epsilon" or "v".

    Linear betas run from 1e-4 to 0.02 over 1,000 steps (Ho et al. 2020); over another number of steps they are scaled
    by 1000 / steps (Nichol and Dhariwal 2021, arXiv 2102.09672). Sampling in fewer steps begins at the very last one,
    where x is pure noise ("trailing"). Cosine betas leave so little of the image at that step that the slightest error
    in a predicted epsilon would saturate the image computed from it. In that case, sampling in n steps begins 1/n of
    the process before its end ("leading", as in DDIM, arXiv 2010.02502).

    Raises:
        InputError: linear betas over fewer than 21 steps, which would exceed 1.
    """
    scale = 1000 / steps
    if betas == "linear" and scale * 0.02 >= 1:
        raise InputError(f"{steps} diffusion steps are too few for linear betas; take 21 or more")
    return DDPMScheduler(
        # as keywords: diffusers' from_config would take positional arguments for mere defaults
        num_train_timesteps=steps,
        beta_start=scale * 1e-4,
        beta_end=scale * 0.02,
        beta_schedule=BETAS[betas],
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing="leading" if (betas, prediction) == ("cosine", "epsilon") else "trailing",
    )


def draw_noise(
    images: Tensor,
    accelerator: Accelerator,
    *,
    steps: int,
    key: tuple[int, ...],
    micro: int = 0,
    micro_batches: int = 1,
) -> tuple[Tensor, Tensor]:
    """Noise (B, C, H, W) and time steps (B,) for a batch of images.

    Both are a slice of a draw for all images of the update, so that two processes with batches of B get what a single
    one gets with a batch of 2B, or with two micro-batches of B.

    Args:
        images: the batch (B, C, H, W) of this process, used for its shape and device only.
        accelerator: gives the processes.
        steps: length of the diffusion process.
        key: seeds the draw.
        micro, micro_batches: which micro-batch of the update this is, and how many there are.
    """
    place = micro * accelerator.num_processes + accelerator.process_index
    generator = torch.Generator(images.device).manual_seed(mix_seed(*key))
    global_shape = (micro_batches * accelerator.num_processes * len(images), *images.shape[1:])
    rows = slice(place * len(images), (place + 1) * len(images))
    noise = torch.randn(global_shape, generator=generator, device=images.device)
    t = torch.randint(steps, global_shape[:1], generator=generator, device=images.device)
    return noise[rows].clone(), t[rows]  # a view would keep the noise of all processes through the backward


def as_epsilon(process: DDPMScheduler, prediction: Tensor, *, x_t: Tensor, t: Tensor) -> Tensor:
    """The epsilon (B, C, H, W) that follows from a denoiser's prediction at x_t (B, C, H, W) and t (B,).

    A prediction of v gives `sqrt(abar) v + sqrt(1 - abar) x_t` (Salimans and Ho 2022, arXiv 2202.00512). One of the
    image x itself, which diffusers calls a sample, gives `(x_t - sqrt(abar) x) / sqrt(1 - abar)`.
    """
    if process.config.prediction_type == "epsilon":
        return prediction
    abar = _alpha_bar(process, t)
    if process.config.prediction_type == "sample":
        return (x_t - abar.sqrt() * prediction.float()) / (1 - abar).sqrt()
    return abar.sqrt() * prediction.float() + (1 - abar).sqrt() * x_t


def as_velocity(process: DDPMScheduler, epsilon: Tensor, *, x_t: Tensor, t: Tensor) -> Tensor:
    """The v (B, C, H, W) that follows from epsilon: what `as_epsilon` does to v, the other way round."""
    abar = _alpha_bar(process, t)
    return (epsilon.float() - (1 - abar).sqrt() * x_t) / abar.sqrt()


def _alpha_bar(process: DDPMScheduler, t: Tensor) -> Tensor:
    """abar (B, 1, 1, 1) at the steps t (B,)."""
    process.alphas_cumprod = process.alphas_cumprod.to(t.device)  # stays there, as in `add_noise`: one copy, one wait
    return process.alphas_cumprod[t].view(-1, 1, 1, 1)


def denoising_loss(
    process: DDPMScheduler,
    prediction: Tensor,
    *,
    images: Tensor,
    noise: Tensor,
    t: Tensor,
    min_snr: float | None = None,
) -> Tensor:
    """The mean squared error of a denoiser's prediction of epsilon or v, as a float32 scalar.

    Args:
        process: has produced the x_t that the denoiser saw, and says what it predicts.
        prediction, images, noise: (B, C, H, W).
        t: time steps (B,).
        min_snr: gamma of the min-SNR weighting (Hang et al. 2023, arXiv 2303.09556); None for no weighting.
    """
    predicts_v = process.config.prediction_type == "v_prediction"
    target = process.get_velocity(images, noise, t) if predicts_v else noise
    if min_snr is None:
        return F.mse_loss(prediction.float(), target)
    snr = compute_snr(process, t)
    weight = snr.clamp(max=min_snr) / (snr + 1 if predicts_v else snr)
    errors = F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)
    return (errors * weight).mean()


@torch.no_grad()
def generate(
    model: nn.Module,
    process: DDPMScheduler,
    accelerator: Accelerator,
    *,
    shape: tuple[int, int, int],
    count: int,
    seed: int,
    sampler: str = "ddim",
    steps: int = 50,
    batch_size: int = 256,
    num_classes: int | None = None,
    stopping: Stopping | None = None,
) -> Tensor | None:
    """Sample images from a denoiser: uint8 (count, C, H, W), on the CPU of every process.

    All noise of sample i, that at the start and that of every "ddpm" step, depends on (seed, i) alone. The processes
    share out whole batches, so that their number does not change the samples.

    Args:
        model: any denoiser; it is called under the accelerator's autocast. One with a `timestep_spacing` is sampled so.
        process: the diffusion process that the sampler reverses.
        accelerator: gives the device, the precision and the processes.
        shape: (C, H, W) of an image.
        count: number of samples.
        seed: of the noise.
        sampler, steps: "ddim" or "ddpm", and in how many steps.
        batch_size: samples in one forward.
        num_classes: of a class-conditional denoiser: sample i is of class i modulo `num_classes`.
        stopping: of a run that a signal may stop.

    Returns:
        None, on all processes, if any pixel was not finite.

    Raises:
        Preempted: on all processes, if a signal has stopped the sampling.
    """
    spacing = getattr(model, "timestep_spacing", process.config.timestep_spacing)
    sampling_scheduler = SAMPLERS[sampler].from_config(process.config, timestep_spacing=spacing)
    sampling_scheduler.set_timesteps(steps)
    device = accelerator.device
    images = torch.zeros(count, *shape, dtype=torch.uint8, device=device)
    nonfinite = torch.zeros((), device=device)
    polled = stopping.polled if stopping else iter
    for start in polled(range(0, count, batch_size)[accelerator.process_index :: accelerator.num_processes]):
        rows = range(start, min(start + batch_size, count))
        generators = [torch.Generator().manual_seed(mix_seed(seed, row)) for row in rows]
        labels = torch.tensor(rows, device=device) % num_classes if num_classes else None
        x = randn_tensor((len(rows), *shape), generator=generators, device=device)
        for t in polled(sampling_scheduler.timesteps):
            with accelerator.autocast():
                prediction = model(x, torch.full((len(rows),), int(t), device=device), labels)
            x = sampling_scheduler.step(prediction.float(), t, x, generator=generators).prev_sample
        nonfinite += (~x.isfinite()).any()
        images[start : rows.stop] = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    if stopping:
        stopping.end_evaluation()
    # rows that another process sampled are 0 here
    nonfinite, images = accelerator.reduce(nonfinite, "sum"), accelerator.reduce(images, "sum")
    return None if nonfinite.item() else images.cpu()
