"""Noising, loss and sampling against diffusers' schedulers; the distillation term; what samples depend on."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import compute_snr
from diffusion.fakes import fake_accelerator
from torch.testing import assert_close

from w2s.diffusion.denoisers import unet
from w2s.diffusion.process import SAMPLERS, as_epsilon, denoising_loss, draw_noise, generate, noise_schedule
from w2s.engine.errors import InputError
from w2s.engine.randomness import mix_seed
from w2s.losses import mse_epsilon


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return unet("nc16-rb1", 8, 1).eval()


# ---- the process ----


def test_linear_and_cosine_betas():
    assert torch.equal(noise_schedule().betas, torch.linspace(1e-4, 0.02, 1000))
    assert_close(noise_schedule(steps=4000).betas, torch.linspace(2.5e-5, 0.005, 4000))
    assert len(noise_schedule("cosine", 4000).betas) == 4000
    for steps in (1000, 4000):  # the closed form of Nichol and Dhariwal 2021, equation 17
        u = np.linspace(0, 1, steps + 1)[1:]
        f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
        assert np.allclose(noise_schedule("cosine", steps).alphas_cumprod[:-1], f[:-1], atol=2e-5)
    with pytest.raises(InputError, match="too few"):
        noise_schedule(steps=10)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("betas", ["linear", "cosine"])
def test_noising_and_loss_are_those_of_ddpm_scheduler(betas, prediction):
    theirs = DDPMScheduler(1000, beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[betas])
    ours = noise_schedule(betas, 1000, prediction)
    torch.manual_seed(0)
    images, noise, predicted = torch.randn(3, 6, 3, 8, 8).unbind()
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    abar = theirs.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = ours.add_noise(images, noise, t)
    assert torch.equal(x_t, theirs.add_noise(images, noise, t))
    assert_close(x_t, abar.sqrt() * images + (1 - abar).sqrt() * noise)
    target = noise if prediction == "epsilon" else theirs.get_velocity(images, noise, t)
    loss = denoising_loss(ours, predicted, images=images, noise=noise, t=t)
    assert torch.equal(loss, F.mse_loss(predicted, target))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_min_snr_weights(prediction):
    process = noise_schedule(prediction=prediction)
    images, noise, predicted = torch.randn(3, 4, 1, 8, 8).unbind()
    t = torch.tensor([5, 200, 600, 999])
    snr = compute_snr(process, t)
    weight = torch.minimum(snr, torch.tensor(5.0)) / (snr if prediction == "epsilon" else snr + 1)
    losses = [denoising_loss(process, predicted[[i]], images=images[[i]], noise=noise[[i]], t=t[[i]]) for i in range(4)]
    weighted = denoising_loss(process, predicted, images=images, noise=noise, t=t, min_snr=5.0)
    assert_close(weighted, (torch.stack(losses) * weight).mean())


def test_loss_is_taken_in_float32():
    images, noise, predicted = torch.randn(3, 4, 1, 8, 8).unbind()
    t = torch.tensor([5, 200, 600, 999])
    loss = denoising_loss(noise_schedule(), predicted.bfloat16(), images=images, noise=noise, t=t)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, F.mse_loss(predicted.bfloat16().float(), noise))


# ---- the distillation term ----


def test_term_is_zero_for_equal_predictions_and_teaches_the_student_only(model):
    teacher = unet("nc16-rb1", 8, 1).eval()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 700])
    student, reference = model(x, t), teacher(x, t)
    assert mse_epsilon(student, student).item() == 0
    loss = mse_epsilon(student, reference)
    (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert_close(gradient, 2 * (student - reference).detach() / student.numel())
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in model.parameters())
    model.zero_grad()


def test_term_is_the_gaussian_divergence_up_to_its_weight():
    step, t = DDPMScheduler(clip_sample=False), 300
    x, ours, theirs = torch.randn(3, 1, 1, 4, 4).unbind()
    variance = step._get_variance(t)

    def kernel(epsilon: torch.Tensor) -> torch.distributions.Normal:
        """The reverse kernel, but for the noise that is added: it is the same for both and drops out."""
        mean = step.step(epsilon, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
        return torch.distributions.Normal(mean, variance.sqrt())

    divergence = torch.distributions.kl_divergence(kernel(theirs), kernel(ours)).mean()
    alpha, abar = 1 - step.betas[t], step.alphas_cumprod[t]
    weight = step.betas[t] ** 2 / (2 * variance * alpha * (1 - abar))  # Ho et al. 2020, equation 14
    assert_close(divergence, weight * mse_epsilon(ours, theirs), rtol=1e-3, atol=0)


def test_term_is_on_epsilon_also_where_v_is_predicted():
    process, t = noise_schedule("cosine", 1000, "v"), torch.tensor([3, 500, 990])
    images, noise, ours, theirs = torch.randn(4, 3, 1, 4, 4).unbind()
    x_t = process.add_noise(images, noise, t)
    velocity = process.get_velocity(images, noise, t)
    assert_close(as_epsilon(process, velocity, x_t=x_t, t=t), noise, atol=1e-5, rtol=1e-5)
    abar = process.alphas_cumprod[t].view(-1, 1, 1, 1)
    term = mse_epsilon(as_epsilon(process, ours, x_t=x_t, t=t), as_epsilon(process, theirs, x_t=x_t, t=t))
    assert_close(term, (abar * (ours - theirs) ** 2).mean(), rtol=1e-4, atol=0)
    assert as_epsilon(noise_schedule(), ours, x_t=x_t, t=t) is ours


def test_term_refuses_other_shapes():
    with pytest.raises(ValueError, match="shape"):
        mse_epsilon(torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8))


# ---- noise ----


def test_noise_is_a_function_of_its_key_and_place():
    images = torch.zeros(4, 3, 8, 8)
    whole = draw_noise(images, fake_accelerator(), steps=1000, key=(0, 7, 0))
    halves = [draw_noise(images[:2], fake_accelerator(rank, 2), steps=1000, key=(0, 7, 0)) for rank in range(2)]
    for k in range(2):  # noise, time steps; each half is cut from the same draw, hence equal bits
        assert torch.equal(whole[k], torch.cat([halves[0][k], halves[1][k]]))
    micro = [
        draw_noise(images[:2], fake_accelerator(), steps=1000, key=(0, 7, 0), micro=micro, micro_batches=2)
        for micro in range(2)
    ]
    assert all(torch.equal(whole[k], torch.cat([micro[0][k], micro[1][k]])) for k in range(2))
    for key in ((1, 7, 0), (0, 8, 0), (0, 7, 1)):
        assert not torch.equal(draw_noise(images, fake_accelerator(), steps=1000, key=key)[0], whole[0])
    noise, t = draw_noise(torch.zeros(20_000, 1, 1, 1), fake_accelerator(), steps=10, key=(3,))
    assert t.bincount().min() > 1800 and t.max() == 9
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03


# ---- sampling ----


def assert_same_pixels(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for pixels whose last float32 bits decide how they are rounded to uint8.

    Predictions differ by some 1e-6 between kernels. A few steps may multiply that, but a uint8 level is 8e-3 wide, so
    well under 1 % of the pixels lie so near to the border between two levels that they are rounded the other way.
    """
    assert ours.shape == theirs.shape
    assert (ours.int() - theirs.int()).abs().max() <= 1
    assert (ours != theirs).float().mean() < 0.01


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samples_do_not_depend_on_batch_or_processes(model, sampler):
    def samples(batch_size=4, rank=0, world=1, count=11, seed=3):
        return generate(
            model,
            noise_schedule(),
            fake_accelerator(rank, world),
            shape=(1, 8, 8),
            count=count,
            seed=seed,
            sampler=sampler,
            steps=5,
            batch_size=batch_size,
        )

    whole = samples()
    assert whole.shape == (11, 1, 8, 8) and whole.dtype == torch.uint8
    assert_same_pixels(whole, sum(samples(rank=rank, world=3) for rank in range(3)))
    for batch_size in (1, 11):
        assert_same_pixels(whole, samples(batch_size))
    assert_same_pixels(whole[:4], samples(count=4))
    assert (whole != samples(seed=4)).float().mean() > 0.5


def test_samples_are_those_of_diffusers_pipeline(model):
    process = noise_schedule()
    ours = generate(model, process, fake_accelerator(), shape=(1, 8, 8), count=3, seed=5, sampler="ddim", steps=6)
    plain = UNet2DModel.from_config(model.config).eval()
    plain.load_state_dict(model.state_dict())
    pipeline = DDIMPipeline(plain, process)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(mix_seed(5, i)) for i in range(3)]
    theirs = pipeline(batch_size=3, generator=generators, num_inference_steps=6, output_type="np").images
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() - np.round(theirs * 255)).max() <= 1


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize(("betas", "steps"), [("linear", 1000), ("cosine", 1000), ("cosine", 4000)])
def test_small_error_of_a_denoiser_moves_the_samples_little(betas, steps, prediction):
    """The exact denoiser of images whose brightness is N(0.1, 0.3^2) and whose pixels are N(brightness, 0.2^2), with an
    error of 1e-3 everywhere in what it predicts. The noise of 256 pixels says little of the brightness, so a small
    shift of x in the first steps could become a large one of the image."""
    process = noise_schedule(betas, steps, prediction)

    def brightness(error: float) -> float:
        def denoiser(x, t, labels):
            abar = process.alphas_cumprod[t].view(-1, 1, 1, 1)
            middle = x.mean((1, 2, 3), keepdim=True)
            common = (middle - abar.sqrt() * 0.1) / (abar * (256 * 0.3**2 + 0.2**2) + 1 - abar)
            epsilon = (1 - abar).sqrt() * (common + (x - middle) / (abar * 0.2**2 + 1 - abar))
            if prediction == "epsilon":
                return error + epsilon
            return error + (epsilon - (1 - abar).sqrt() * x) / abar.sqrt()

        images = generate(denoiser, process, fake_accelerator(), shape=(1, 16, 16), count=32, seed=0)
        return images.float().mean().item() / 127.5 - 1

    assert SAMPLERS["ddim"].from_config(process.config).config.num_train_timesteps == steps

    exact = brightness(0.0)
    assert exact == pytest.approx(0.1, abs=0.2)  # four standard errors
    assert brightness(1e-3) == pytest.approx(exact, abs=0.05)


def test_class_of_a_sample_is_its_index_modulo_the_classes():
    labels_seen = []

    def denoiser(x, t, labels):
        labels_seen.append(labels.tolist())
        return torch.zeros_like(x)

    accelerator = fake_accelerator()
    generate(
        denoiser, noise_schedule(), accelerator, shape=(1, 4, 4), count=7, seed=0, steps=2, batch_size=5, num_classes=3
    )
    assert labels_seen == [[0, 1, 2, 0, 1]] * 2 + [[2, 0]] * 2


def test_samples_that_are_not_finite_are_reported():
    def broken(x, t, labels):
        return x * float("nan")

    samples = generate(broken, noise_schedule(), fake_accelerator(), shape=(1, 4, 4), count=3, seed=0, steps=2)
    assert samples is None
