"""The diffusion process, through diffusers' schedulers: noising, loss, sampling."""

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from w2s.engine.errors import InputError
from w2s.engine.randomness import mix_seed

BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # our names, diffusers' names
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}
SAMPLERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}


def noise_schedule(betas: str = "linear", steps: int = 1000, prediction: str = "epsilon") -> DDPMScheduler:
    """The diffusion process: "linear" or "cosine" betas, "epsilon" or "v" prediction.

    Linear betas run from 1e-4 to 0.02 at 1,000 steps (Ho et al. 2020), scaled by 1000 / steps at others (Nichol and
    Dhariwal 2021, arXiv 2102.09672). Sampling with fewer steps begins at the last one, where x is noise ("trailing").
    Cosine betas leave so little of the image there that any error of epsilon would saturate the image that is read off
    it: with these, n steps begin 1/n of the process before its end ("leading", as DDIM has it, arXiv 2010.02502).

    Raises:
        InputError: fewer than 21 steps of linear betas, which would exceed 1.
    """
    scale = 1000 / steps
    if betas == "linear" and scale * 0.02 >= 1:
        raise InputError(f"{steps} diffusion steps are too few for linear betas; take 21 or more")
    return DDPMScheduler(
        num_train_timesteps=steps,  # by name: diffusers' from_config takes what came by place for a mere default
        beta_start=scale * 1e-4,
        beta_end=scale * 0.02,
        beta_schedule=BETAS[betas],
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing="leading" if (betas, prediction) == ("cosine", "epsilon") else "trailing",
    )


def draw_noise(
    images: Tensor, steps: int, key: tuple[int, ...], rank: int = 0, world: int = 1
) -> tuple[Tensor, Tensor]:
    """Noise (B, C, H, W) and time steps (B,) for the batch of process `rank` out of `world`.

    Both are cut from a draw for the whole global batch that depends on `key` (seed, update, micro-batch) alone: two
    processes with batch B get what one with batch 2B would.
    """
    generator = torch.Generator(images.device).manual_seed(mix_seed(*key))
    shape, own = (world * len(images), *images.shape[1:]), slice(rank * len(images), (rank + 1) * len(images))
    noise = torch.randn(shape, generator=generator, device=images.device)[own]
    return noise, torch.randint(steps, shape[:1], generator=generator, device=images.device)[own]


def as_epsilon(scheduler: DDPMScheduler, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The epsilon (B, C, H, W) that a prediction of epsilon, or v, means at x_t and t (B,).

    From v it is `sqrt(abar) v + sqrt(1 - abar) x_t` (Salimans and Ho 2022, arXiv 2202.00512).
    """
    if scheduler.config.prediction_type != "v_prediction":
        return prediction
    bar = scheduler.alphas_cumprod.to(t.device)[t].view(-1, 1, 1, 1)
    return bar.sqrt() * prediction.float() + (1 - bar).sqrt() * x_t


def denoising_loss(
    scheduler: DDPMScheduler,
    prediction: Tensor,
    images: Tensor,
    noise: Tensor,
    t: Tensor,
    min_snr: float | None = None,
) -> Tensor:
    """The mean squared error of a prediction of epsilon, or v, as the scheduler has it; a float32 scalar.

    Args:
        scheduler: made the x_t.
        prediction, images, noise: (B, C, H, W).
        t: (B,).
        min_snr: gamma of the min-SNR weighting (Hang et al. 2023, arXiv 2303.09556), None for none.
    """
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(images, noise, t) if velocity else noise
    if min_snr is None:
        return F.mse_loss(prediction.float(), target)
    snr = compute_snr(scheduler, t)
    weight = snr.clamp(max=min_snr) / (snr + 1 if velocity else snr)
    return (F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1) * weight).mean()


@torch.no_grad()
def generate(
    model: nn.Module,
    scheduler: DDPMScheduler,
    count: int,
    seed: int,
    accelerator: "accelerate.Accelerator",  # noqa: F821
    shape: tuple[int, int, int],
    sampler: str = "ddim",
    steps: int = 50,
    batch_size: int = 256,
    num_classes: int | None = None,
) -> Tensor | None:
    """Samples (count, C, H, W), uint8, on the CPU of every process.

    The noise of sample i, at the start and in every step of "ddpm", depends on (seed, i) alone, its class is
    i modulo `num_classes`. Batches are shared out whole: another number of processes computes the very same ones.

    Args:
        model: any denoiser, called under the accelerator's autocast.
        scheduler: the diffusion process; `sampler` walks it back in `steps` steps.
        shape: (C, H, W).

    Returns:
        None, on all processes, if a pixel was not finite.
    """
    walk = SAMPLERS[sampler].from_config(scheduler.config)
    walk.set_timesteps(steps)
    device = accelerator.device
    images = torch.zeros(count, *shape, dtype=torch.uint8, device=device)
    bad = torch.zeros((), device=device)
    starts = range(0, count, batch_size)[accelerator.process_index :: accelerator.num_processes]
    for start in starts:
        rows = range(start, min(start + batch_size, count))
        generators = [torch.Generator().manual_seed(mix_seed(seed, row)) for row in rows]
        labels = torch.tensor(rows, device=device) % num_classes if num_classes else None
        x = randn_tensor((len(rows), *shape), generator=generators, device=device)
        for t in walk.timesteps:
            with accelerator.autocast():
                prediction = model(x, torch.full((len(rows),), int(t), device=device), labels)
            x = walk.step(prediction.float(), t, x, generator=generators).prev_sample
        bad += (~x.isfinite()).any()
        images[start : rows.stop] = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    bad, images = accelerator.reduce(bad, "sum"), accelerator.reduce(images, "sum")  # the rows of others are 0 here
    return None if bad.item() else images.cpu()
