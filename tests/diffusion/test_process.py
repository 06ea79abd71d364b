"""Noising, loss and sampling against diffusers' schedulers; the distillation term; what samples depend on."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDPMScheduler
from diffusers.training_utils import compute_snr

from w2s.diffusion.denoisers import unet
from w2s.diffusion.process import SAMPLERS, as_epsilon, denoising_loss, draw_noise, generate, noise_schedule
from w2s.engine.errors import InputError
from w2s.engine.randomness import mix_seed
from w2s.losses import mse_epsilon


def process(rank: int = 0, world: int = 1) -> SimpleNamespace:
    """One of several processes, each of which sees only its own part of a sum."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        process_index=rank,
        num_processes=world,
        autocast=nullcontext,
        reduce=lambda tensor, how: tensor.clone(),
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return unet("nc16-rb1", 8, 1).eval()


# ---- the process ----


def test_linear_and_cosine_betas():
    assert torch.equal(noise_schedule().betas, torch.linspace(1e-4, 0.02, 1000))
    assert torch.allclose(noise_schedule(steps=4000).betas, torch.linspace(2.5e-5, 0.005, 4000))
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
    kwargs = {"beta_schedule": {"linear": "linear", "cosine": "squaredcos_cap_v2"}[betas]}
    theirs, ours = DDPMScheduler(1000, **kwargs), noise_schedule(betas, 1000, prediction)
    torch.manual_seed(0)
    images, noise, out = torch.randn(3, 6, 3, 8, 8).unbind()
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    a = theirs.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = ours.add_noise(images, noise, t)
    assert torch.equal(x_t, theirs.add_noise(images, noise, t))
    assert torch.allclose(x_t, a.sqrt() * images + (1 - a).sqrt() * noise, atol=1e-6)
    target = noise if prediction == "epsilon" else theirs.get_velocity(images, noise, t)
    assert torch.equal(denoising_loss(ours, out, images, noise, t), F.mse_loss(out, target))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_min_snr_weights(prediction):
    ours = noise_schedule(prediction=prediction)
    images, noise, out = torch.randn(3, 4, 1, 8, 8).unbind()
    t = torch.tensor([5, 200, 600, 999])
    snr = compute_snr(ours, t)
    weight = torch.minimum(snr, torch.tensor(5.0)) / (snr if prediction == "epsilon" else snr + 1)
    each = [denoising_loss(ours, *(p[i : i + 1] for p in (out, images, noise, t))) for i in range(4)]
    expected = (torch.stack(each) * weight).mean()
    assert torch.allclose(denoising_loss(ours, out, images, noise, t, min_snr=5.0), expected)


def test_loss_is_taken_in_float32():
    ours = noise_schedule()
    images, noise, out = torch.randn(3, 4, 1, 8, 8).unbind()
    loss = denoising_loss(ours, out.bfloat16(), images, noise, torch.tensor([5, 200, 600, 999]))
    assert loss.dtype == torch.float32 and torch.equal(loss, F.mse_loss(out.bfloat16().float(), noise))


# ---- the distillation term ----


def test_term_is_zero_for_equal_predictions_and_teaches_the_student_only(model):
    teacher = unet("nc16-rb1", 8, 1).eval()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 700])
    assert mse_epsilon(model(x, t), model(x, t)).item() == 0
    student, reference = model(x, t), teacher(x, t)
    loss = mse_epsilon(student, reference)
    (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert torch.allclose(gradient, 2 * (student - reference).detach() / student.numel(), atol=1e-8)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in model.parameters())
    model.zero_grad()


def test_term_is_the_gaussian_divergence_up_to_its_weight():
    step, t = DDPMScheduler(clip_sample=False), 300
    x, ours, theirs = torch.randn(3, 1, 1, 4, 4).unbind()

    def mean(epsilon):  # of the reverse kernel; the noise added is the same for both and drops out
        return step.step(epsilon, t, x, generator=torch.Generator().manual_seed(0)).prev_sample

    variance = step._get_variance(t)
    kl = torch.distributions.kl_divergence(
        *(torch.distributions.Normal(mean(e), variance.sqrt()) for e in (theirs, ours))
    ).mean()
    a, bar = 1 - step.betas[t], step.alphas_cumprod[t]
    weight = step.betas[t] ** 2 / (2 * variance * a * (1 - bar))  # Ho et al. 2020, equation 14
    assert torch.allclose(kl, weight * mse_epsilon(ours, theirs), rtol=1e-3)


def test_term_is_on_epsilon_also_where_v_is_predicted():
    scheduler, t = noise_schedule("cosine", 1000, "v"), torch.tensor([3, 500, 990])
    images, noise, ours, theirs = torch.randn(4, 3, 1, 4, 4).unbind()
    x_t = scheduler.add_noise(images, noise, t)
    velocity = scheduler.get_velocity(images, noise, t)
    assert torch.allclose(as_epsilon(scheduler, velocity, x_t, t), noise, atol=1e-5)
    bar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    term = mse_epsilon(*(as_epsilon(scheduler, v, x_t, t) for v in (ours, theirs)))
    assert torch.allclose(term, (bar * (ours - theirs) ** 2).mean(), rtol=1e-4)
    assert as_epsilon(noise_schedule(), ours, x_t, t) is ours


def test_term_refuses_other_shapes():
    with pytest.raises(ValueError, match="shape"):
        mse_epsilon(torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8))


# ---- noise ----


def test_noise_is_a_function_of_its_key_and_place():
    images = torch.zeros(4, 3, 8, 8)
    whole = draw_noise(images, 1000, (0, 7, 0))
    halves = [draw_noise(images[:2], 1000, (0, 7, 0), rank, 2) for rank in range(2)]
    for one, parts in zip(whole, zip(*halves, strict=True), strict=True):
        assert torch.equal(one, torch.cat(parts))
    for key in ((1, 7, 0), (0, 8, 0), (0, 7, 1)):
        assert not torch.equal(draw_noise(images, 1000, key)[0], whole[0])
    many = draw_noise(torch.zeros(20_000, 1, 1, 1), 10, (3,))
    assert many[1].bincount().min() > 1800 and many[1].max() == 9
    assert abs(many[0].mean()) < 0.03 and abs(many[0].std() - 1) < 0.03


# ---- sampling ----


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samples_do_not_depend_on_batch_or_processes(model, sampler):
    def samples(batch_size=4, rank=0, world=1, count=11, seed=3):
        args = (noise_schedule(), count, seed, process(rank, world), (1, 8, 8), sampler, 5, batch_size)
        return generate(model, *args)

    whole = samples()
    assert whole.shape == (11, 1, 8, 8) and whole.dtype == torch.uint8
    assert torch.equal(whole, sum(samples(rank=rank, world=3) for rank in range(3)))  # bit for bit
    for batch_size in (1, 11):  # another shape may be rounded otherwise in its last bits before the uint8
        assert (whole.int() - samples(batch_size).int()).abs().max() <= 1
        assert (whole != samples(batch_size)).float().mean() < 0.01
    assert torch.equal(whole[:4], samples(count=4))
    assert not torch.equal(whole, samples(seed=4))


def test_samples_are_those_of_diffusers_pipeline(model):
    scheduler = noise_schedule()
    ours = generate(model, scheduler, 3, 5, process(), (1, 8, 8), "ddim", 6)
    pipeline = DDIMPipeline(model_as_diffusers(model), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(mix_seed(5, i)) for i in range(3)]
    theirs = pipeline(batch_size=3, generator=generators, num_inference_steps=6, output_type="np").images
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() - np.round(theirs * 255)).max() <= 1


def model_as_diffusers(model):
    from diffusers import UNet2DModel

    plain = UNet2DModel.from_config(model.config).eval()
    plain.load_state_dict(model.state_dict())
    return plain


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize(("betas", "steps"), [("linear", 1000), ("cosine", 1000), ("cosine", 4000)])
def test_small_error_of_a_denoiser_moves_the_samples_little(betas, steps, prediction):
    """The exact denoiser of images whose brightness is N(0.1, 0.3^2) and whose pixels are N(brightness, 0.2^2), off by
    1e-3 everywhere in what it predicts: the noise of 256 pixels says little of the brightness, so a small shift of x
    at the first steps would be a great one of the image."""
    scheduler = noise_schedule(betas, steps, prediction)

    def mean(error: float) -> float:
        def denoiser(x, t, labels):
            a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
            middle = x.mean((1, 2, 3), keepdim=True)
            common = (middle - a.sqrt() * 0.1) / (a * (256 * 0.3**2 + 0.2**2) + 1 - a)
            epsilon = (1 - a).sqrt() * (common + (x - middle) / (a * 0.2**2 + 1 - a))
            return error + (epsilon if prediction == "epsilon" else (epsilon - (1 - a).sqrt() * x) / a.sqrt())

        return generate(denoiser, scheduler, 32, 0, process(), (1, 16, 16)).float().mean().item() / 127.5 - 1

    assert SAMPLERS["ddim"].from_config(scheduler.config).config.num_train_timesteps == steps

    exact = mean(0.0)
    assert exact == pytest.approx(0.1, abs=0.2)  # four standard errors
    assert mean(1e-3) == pytest.approx(exact, abs=0.05)


def test_class_of_a_sample_is_its_index_modulo_the_classes():
    seen = []

    def denoiser(x, t, labels):
        seen.append(labels)
        return torch.zeros_like(x)

    generate(denoiser, noise_schedule(), 7, 0, process(), (1, 4, 4), steps=2, batch_size=5, num_classes=3)
    assert [labels.tolist() for labels in seen] == [[0, 1, 2, 0, 1]] * 2 + [[2, 0]] * 2


def test_samples_that_are_not_finite_are_reported():
    broken = generate(lambda x, t, labels: x * float("nan"), noise_schedule(), 3, 0, process(), (1, 4, 4), steps=2)
    assert broken is None
