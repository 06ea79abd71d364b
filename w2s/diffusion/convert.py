"""Denoisers of another diffusion process as teachers, converted where that is exact.

What a denoiser was trained to see at a time step depends on alpha_bar alone: x_t = sqrt(alpha_bar) x + sqrt(1 -
alpha_bar) noise. So one process can answer for another wherever it has a step of the same alpha_bar, and at such a step
predictions of epsilon, of v and of the image itself can be computed from one another (Salimans and Ho 2022, arXiv
2202.00512).
"""

from pathlib import Path

from diffusers import DDPMScheduler
from torch import Tensor, nn

from w2s.diffusion.denoisers import Signature, UNet, ViT, rebuild
from w2s.diffusion.exports import check_same_images, load_denoiser
from w2s.diffusion.process import BETAS, as_epsilon, as_velocity
from w2s.engine.errors import InputError

TOLERANCE = 1e-6  # of alpha_bar, which is a product of a thousand numbers in single precision
KNOWN = ("epsilon", "v_prediction", "sample")


class ConvertedDenoiser(nn.Module):
    """A denoiser that answers at the steps and in the kind of prediction of another process than its own.

    Args:
        model: the denoiser.
        own: its process.
        process: the process to answer in.
        steps: for each step of `process` the step of `own` with the same alpha_bar.
    """

    def __init__(self, model: UNet | ViT, own: DDPMScheduler, process: DDPMScheduler, steps: Tensor) -> None:
        super().__init__()
        self.model, self.own, self.process, self.name = model, own, process, model.name
        self.register_buffer("steps", steps, persistent=False)

    @property
    def signature(self) -> Signature:
        """That of the denoiser."""
        return self.model.signature

    @property
    def timestep_spacing(self) -> str:
        """How the steps at which it is sampled are spaced, see `noise_schedule`: as suits what it was trained for."""
        own = self.own.config
        is_unstable = (own.beta_schedule, own.prediction_type) == (BETAS["cosine"], "epsilon")
        return "leading" if is_unstable else self.process.config.timestep_spacing

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The prediction (B, C, H, W), float32, at the steps t (B,) of `process`."""
        own_t = self.steps[t]
        epsilon = as_epsilon(self.own, self.model(x, own_t, labels).float(), x_t=x, t=own_t)
        return as_velocity(self.process, epsilon, x_t=x, t=t) if _predicts(self.process) == "v_prediction" else epsilon

    def describe(self) -> str:
        """One line for the start of a run."""
        own, process = self.own.config, self.process.config
        return (
            f"the teacher predicts {own.prediction_type} over {own.num_train_timesteps} steps; they are converted to "
            f"{process.prediction_type} at the steps of the same alpha_bar"
        )

    def rebuilt(self) -> nn.Module:
        """The same of an architecture that was never trained."""
        return ConvertedDenoiser(rebuild(self.model), self.own, self.process, self.steps.cpu())


def load_teacher_denoiser(
    path: str, student: UNet | ViT, process: DDPMScheduler, *, source: str
) -> tuple[UNet | ViT | ConvertedDenoiser, Path]:
    """Load a denoiser that answers at the x_t and t of a student, converted if it is of another process.

    Args:
        path: see `load_denoiser`.
        student, process: the denoiser of this run and its diffusion process.
        source: what the loaded denoiser is called in messages.

    Returns:
        The denoiser in eval mode, and the folder it came from.

    Raises:
        InputError: see `load_denoiser`; it sees other images, or its process has no step for one of the run's.
    """
    model, own, folder = load_denoiser(path)
    check_same_images(student, other=model, source=source)
    if _predicts(own) not in KNOWN:
        raise InputError(f"{source} predicts '{_predicts(own)}'; {', '.join(KNOWN)} can be converted")
    here, there = (scheduler.alphas_cumprod.cpu().double() for scheduler in (process, own))
    distances, steps = (here[:, None] - there[None, :]).abs().min(1)
    if missing := (distances > TOLERANCE).nonzero().flatten().tolist():
        raise InputError(
            f"{source} was trained with other betas: for {len(missing)} of this run's {len(here)} steps it has none of "
            f"the same alpha_bar (first: step {missing[0]}); see --betas and --diffusion-steps"
        )
    if _predicts(own) == _predicts(process) and steps.tolist() == list(range(len(there))):
        return model, folder
    return ConvertedDenoiser(model, own, process, steps).eval(), folder


def _predicts(process: DDPMScheduler) -> str:
    return process.config.prediction_type
