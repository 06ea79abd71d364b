"""Denoisers on disk: what is written and read back, and denoisers that do not fit a run."""

import json
import re

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusion.fakes import tiny_vit
from torch.testing import assert_close

from w2s.diffusion.denoisers import UNet, unet
from w2s.diffusion.exports import check_compatible, export_denoiser, load_compatible, load_denoiser
from w2s.diffusion.process import noise_schedule
from w2s.engine.errors import InputError
from w2s.images.models import create_model
from w2s.images.models import export as export_classifier


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Equal bits, tensor by tensor."""
    weights, others = one.state_dict(), other.state_dict()
    assert list(weights) == list(others)
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_unet_folder_is_a_diffusers_pipeline(tmp_path):
    torch.manual_seed(0)
    model, process = unet("nc16-rb1", 8, 1, dropout=0.1).eval(), noise_schedule("cosine", 100, "v")
    export_denoiser(model.to(memory_format=torch.channels_last), process, tmp_path / "run" / "model")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 70])
    for kind in (DDPMPipeline, DDIMPipeline):
        pipeline = kind.from_pretrained(tmp_path / "run" / "model")
        assert type(pipeline.unet) is UNet2DModel
        assert_same_weights(pipeline.unet, model)
        assert_close(pipeline.unet(x, t).sample, model(x, t))  # of another memory format
        assert pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"
        assert pipeline.scheduler.config.prediction_type == "v_prediction"
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
    loaded, loaded_process, folder = load_denoiser(str(tmp_path / "run"))
    assert isinstance(loaded, UNet) and not loaded.training and folder == tmp_path / "run" / "model"
    assert_same_weights(loaded, model)
    assert_close(loaded(x, t), model(x, t))
    assert torch.equal(loaded_process.alphas_cumprod, process.alphas_cumprod)


def test_export_replaces_what_was_there(tmp_path):
    for _ in range(2):
        model = unet("nc16-rb1", 8, 1)
        export_denoiser(model, noise_schedule(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_same_weights(load_denoiser(str(tmp_path))[0], model)


def test_sizes_and_channels_of_other_pipelines(tmp_path):
    def plain(size, out: int) -> UNet2DModel:
        blocks = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4)
        return UNet2DModel(size, 1, out, block_out_channels=(8,), layers_per_block=1, **blocks)

    DDPMPipeline(plain((8, 8), 1), noise_schedule()).save_pretrained(tmp_path / "pair")
    assert load_denoiser(str(tmp_path / "pair"))[0].signature == (8, 1, None)
    DDPMPipeline(plain(8, 2), noise_schedule()).save_pretrained(tmp_path / "variance")
    with pytest.raises(InputError, match="2 channels out for 1 in"):
        load_denoiser(str(tmp_path / "variance"))


@pytest.mark.parametrize("flat", [False, True])
def test_pipeline_of_diffusers_own_is_read(flat, tmp_path):
    plain = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    ).eval()
    DDPMPipeline(plain, DDPMScheduler(clip_sample=False)).save_pretrained(tmp_path)
    if flat:  # as google/ddpm-cifar10-32 lies on the hub
        for name in ("unet", "scheduler"):
            for file in (tmp_path / name).iterdir():
                file.rename(tmp_path / file.name)
            (tmp_path / name).rmdir()
    model, _, folder = load_denoiser(str(tmp_path))
    assert folder == tmp_path
    assert_same_weights(model, plain)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 70])
    assert torch.equal(model(x, t), plain(x, t).sample)


def test_vit_reads_back(tmp_path):
    model = tiny_vit(num_classes=10)
    torch.nn.init.normal_(model.head.weight)
    export_denoiser(model.eval(), noise_schedule(steps=400), tmp_path / "model")
    loaded, process, _ = load_denoiser(str(tmp_path))
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 70]), torch.tensor([0, 9])
    assert_same_weights(loaded, model)
    assert torch.equal(loaded(x, t, labels), model(x, t, labels))
    assert process.config.num_train_timesteps == 400 and loaded.signature == (8, 1, 10)


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="holds no denoiser"):
        load_denoiser(str(tmp_path))
    classifier = create_model("resnet10t", 10, 1, model_kwargs={"channels": (8, 8, 8, 8), "stem_width": 8})
    export_classifier(classifier, tmp_path / "classifier" / "model")
    with pytest.raises(InputError, match="classifier holds no denoiser"):
        load_denoiser(str(tmp_path / "classifier"))
    model = unet("nc16-rb1", 8, 1)
    export_denoiser(model, noise_schedule(), tmp_path / "model")
    config = tmp_path / "model" / "unet" / "config.json"
    good = config.read_text()
    config.write_text(json.dumps({**json.loads(good), "layers_per_block": 2}))
    with pytest.raises(InputError, match="cannot load the denoiser"):
        load_denoiser(str(tmp_path))
    config.write_text(good)
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=re.escape(f"cannot load the denoiser of {tmp_path / 'model'}")):
        load_denoiser(str(tmp_path))


# ---- denoisers that fit a run, and others ----


def test_teacher_may_differ_in_everything_but_the_process():
    student, process = unet("nc16-rb1", 8, 1), noise_schedule()
    fitting = (unet("nc32-rb2", 8, 1, attention=()), noise_schedule()), (tiny_vit(), DDPMScheduler(clip_sample=False))
    for other, other_process in fitting:
        check_compatible(student, process, other=other, other_process=other_process, source="it")


@pytest.mark.parametrize(
    ("make", "make_process", "message"),
    [
        (lambda: unet("nc16-rb1", 16, 1), noise_schedule, "image size 16"),
        (lambda: unet("nc16-rb1", 8, 3), noise_schedule, "channels 3"),
        (lambda: unet("nc16-rb1", 8, 1, num_classes=10), noise_schedule, "classes 10"),
        (lambda: unet("nc16-rb1", 8, 1), lambda: noise_schedule("cosine"), "other betas"),
        (lambda: unet("nc16-rb1", 8, 1), lambda: noise_schedule(prediction="v"), "v_prediction"),
        (lambda: unet("nc16-rb1", 8, 1), lambda: noise_schedule(steps=4000), "4000"),
    ],
)
def test_teacher_of_another_process_is_refused(make, make_process, message, tmp_path):
    student, process = unet("nc16-rb1", 8, 1), noise_schedule()
    other, other_process = make(), make_process()
    with pytest.raises(InputError, match=f"the teacher .*{message}"):
        check_compatible(student, process, other=other, other_process=other_process, source="the teacher")
    export_denoiser(other, other_process, tmp_path / "model")
    with pytest.raises(InputError, match=re.escape("--teacher RUN ")):
        load_compatible(str(tmp_path), student, process, source="--teacher RUN")


def test_fitting_teacher_is_loaded(tmp_path):
    model = tiny_vit()
    export_denoiser(model, noise_schedule(), tmp_path / "model")
    loaded, folder = load_compatible(str(tmp_path), unet("nc16-rb1", 8, 1), noise_schedule(), source="--teacher RUN")
    assert folder == tmp_path / "model"
    assert_same_weights(loaded, model)
