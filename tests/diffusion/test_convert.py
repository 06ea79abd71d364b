"""Denoisers of another process as teachers: exact where a step has the same alpha_bar, refused where not."""

import json

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from helpers import refused
from torch.testing import assert_close

from w2s.diffusion.convert import ConvertedDenoiser, load_teacher_denoiser
from w2s.diffusion.denoisers import denoiser_flops, unet
from w2s.diffusion.exports import load_denoiser
from w2s.diffusion.process import as_epsilon, as_velocity, generate, noise_schedule
from w2s.diffusion.teacher import DenoiserTeacher


def pipeline(folder, **scheduler: object) -> tuple[UNet2DModel, DDPMScheduler]:
    """A pipeline of diffusers with random weights, saved."""
    torch.manual_seed(0)
    plain = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()
    process = DDPMScheduler(**scheduler)
    DDPMPipeline(plain, process).save_pretrained(folder)
    return plain, process


def load(folder, process: DDPMScheduler):
    return load_teacher_denoiser(str(folder), unet("nc16-rb1", 8, 1), process, source="--teacher it")[0]


def noisy(process: DDPMScheduler, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Images, noise and x_t."""
    generator = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(len(t), 1, 8, 8, generator=generator) for _ in range(2))
    return images, noise, process.add_noise(images, noise, t)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_perfect_predictions_of_every_kind_give_the_noise(prediction):
    process, t = DDPMScheduler(prediction_type=prediction), torch.tensor([0, 10, 500, 999])
    images, noise, x_t = noisy(process, t)
    velocity = process.get_velocity(images, noise, t)
    perfect = {"epsilon": noise, "v_prediction": velocity, "sample": images}[prediction]
    assert_close(as_epsilon(process, perfect, x_t=x_t, t=t), noise, atol=1e-3, rtol=1e-4)
    assert_close(as_velocity(process, noise, x_t=x_t, t=t), velocity, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("theirs", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("ours", ["epsilon", "v"])
@torch.no_grad()
def test_a_teacher_of_another_prediction_is_converted(theirs, ours, tmp_path):
    plain, own = pipeline(tmp_path, prediction_type=theirs, clip_sample=False)
    process, t = noise_schedule(prediction=ours), torch.tensor([1, 300, 900])
    _, _, x_t = noisy(process, t)
    teacher = DenoiserTeacher(load(tmp_path, process), process=process, source=tmp_path, device="cpu")
    assert_close(teacher(x_t, t), as_epsilon(own, plain(x_t, t).sample, x_t=x_t, t=t), atol=1e-3, rtol=1e-3)
    is_same = theirs == process.config.prediction_type
    assert isinstance(teacher.model, ConvertedDenoiser) != is_same
    assert (teacher.note is None) == is_same
    assert teacher.rebuild().state_dict().keys() == teacher.model.state_dict().keys()
    assert denoiser_flops(teacher.model, batch=2, backward=False) > 0


@torch.no_grad()
def test_a_longer_process_answers_at_the_steps_of_the_same_noise(tmp_path):
    """Cosine betas over twice as many steps pass through every alpha_bar of the shorter process."""
    plain, own = pipeline(tmp_path, num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    process = noise_schedule("cosine", 500)
    model = load(tmp_path, process)
    assert model.steps.tolist() == list(range(1, 1000, 2))
    t = torch.tensor([0, 100, 400])
    _, _, x_t = noisy(process, t)
    assert_close(own.alphas_cumprod[2 * t + 1], process.alphas_cumprod[t], atol=1e-6, rtol=0)
    assert_close(model(x_t, t), plain(x_t, 2 * t + 1).sample)


@torch.no_grad()
def test_a_converted_teacher_is_sampled_as_it_would_be_in_a_run_of_its_own(tmp_path):
    """At the last step of cosine betas the image that follows from epsilon is all error: it must not be asked there."""
    pipeline(tmp_path, beta_schedule="squaredcos_cap_v2")
    samples = []
    for prediction in ("epsilon", "v"):
        process = noise_schedule("cosine", 1000, prediction)
        options = {"shape": (1, 8, 8), "count": 4, "seed": 0, "steps": 20}
        samples.append(generate(load(tmp_path, process), process, Accelerator(), **options).int())
    assert (samples[0] - samples[1]).abs().max() <= 1
    assert samples[0].float().std() > 1


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "other betas"),
        ({"num_train_timesteps": 500}, "none of the same alpha_bar"),
        ({"beta_end": 0.03}, "first: step"),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, "other betas"),
    ],
)
def test_a_process_without_the_same_steps_is_refused(scheduler, words, tmp_path):
    pipeline(tmp_path, **scheduler)
    with refused("--teacher it", words):
        load(tmp_path, noise_schedule())


def test_a_scheduler_without_betas_is_refused(tmp_path):
    pipeline(tmp_path)
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}))
    with refused("FlowMatchEulerDiscreteScheduler", "no discrete diffusion process"):
        load_denoiser(str(tmp_path))


def test_other_images_are_refused(tmp_path):
    pipeline(tmp_path)
    with refused("--teacher it", "image size 8, this run has 16"):
        load_teacher_denoiser(str(tmp_path), unet("nc16-rb1", 16, 1), noise_schedule(), source="--teacher it")
