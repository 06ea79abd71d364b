"""The denoisers: sizes, call signature, what is written and read back, teachers that do not fit."""

import json
import re

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel

from w2s.diffusion.denoisers import UNet, ViT, build_denoiser, check_same, export, load_denoiser, unet
from w2s.diffusion.process import noise_schedule
from w2s.engine.errors import InputError
from w2s.images.models import create_model
from w2s.images.models import export as export_classifier

TINY_VIT = {"patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}


def tiny_vit(size: int = 8, in_chans: int = 1, num_classes: int | None = None, **kwargs) -> ViT:
    return ViT("vit_tiny_patch16_224", size, in_chans, num_classes, **{**TINY_VIT, **kwargs})


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ---- the families ----


@pytest.mark.parametrize(
    ("name", "params"), [("nc64-rb2", 9_924_803), ("nc128-rb3", 52_542_467), ("nc160-rb3", 82_067_203)]
)
def test_parameter_counts_at_32_px(name, params):
    with torch.device("meta"):
        model = unet(name, 32)
    assert count(model) == params
    assert (model.name, model.facts) == (name, (32, 3, None))


def test_unet_has_attention_and_heads_where_asked():
    with torch.device("meta"):
        model = unet("nc128-rb2", 32, channel_mult=(1, 2, 4), attention=(8,), dropout=0.3)
    assert model.config.down_block_types == ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D")
    assert model.config.up_block_types == ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")
    assert model.down_blocks[2].attentions[0].heads == 8  # 512 channels, 64 each
    dropouts = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert dropouts == {0.0, 0.3}  # 0: of the attention's output
    assert model.config.resnet_time_scale_shift == "scale_shift"


def test_unet_call_equals_the_plain_class():
    torch.manual_seed(0)
    model = unet("nc16-rb1", 8, 1).eval()
    plain = UNet2DModel.from_config(model.config).eval()
    plain.load_state_dict(model.state_dict())
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999])
    assert torch.equal(model(x, t), plain(x, t).sample)


@pytest.mark.parametrize("make", [lambda n: unet("nc16-rb1", 8, 1, n), lambda n: tiny_vit(num_classes=n)])
@pytest.mark.parametrize("classes", [None, 10])
def test_denoisers_use_x_t_and_labels(make, classes):
    torch.manual_seed(0)
    model = make(classes).eval()
    for parameter in model.parameters():  # the head of a ViT starts at 0
        torch.nn.init.normal_(parameter, std=0.2)
    labels = torch.tensor([1, 1]) if classes else None
    x, t = torch.randn(1, 1, 8, 8).repeat(2, 1, 1, 1), torch.tensor([10, 10])
    out = model(x, t, labels)
    assert out.shape == x.shape and torch.allclose(out[0], out[1], atol=1e-6)
    assert not torch.allclose(model(x, torch.tensor([10, 900]), labels)[1], out[1], atol=1e-4)
    assert not torch.allclose(model(x + 1, t, labels), out, atol=1e-4)
    if classes:
        assert not torch.allclose(model(x, t, torch.tensor([1, 7]))[1], out[1], atol=1e-5)
    with pytest.raises(ValueError):
        model(x, t, None if classes else torch.tensor([1, 1]))


def test_vit_puts_every_patch_back_in_its_place():
    model = tiny_vit(size=8, in_chans=3, patch_size=4)
    model.vit.blocks = model.vit.norm = torch.nn.Identity()
    model.vit.pos_embed.data.zero_()
    torch.nn.init.eye_(model.head.weight)  # pixels out: the first embedding channels of their own patch
    with torch.no_grad():
        weight = model.vit.patch_embed.proj.weight.zero_()  # embedding channel 0 = the patch's first pixel of channel 2
        weight[0, 2, 0, 0] = 1
        model.vit.patch_embed.proj.bias.zero_()
    x = torch.randn(2, 3, 8, 8)
    out = model(x, torch.tensor([3, 4]))
    expected = torch.zeros_like(x)
    expected[:, 0, ::4, ::4] = x[:, 2, ::4, ::4]
    assert torch.allclose(out, expected, atol=1e-6)


def test_vit_is_a_timm_backbone_with_its_own_options():
    model = build_denoiser("vit_small_patch16_224", 32, 3, None, {"img_size": 32, "patch_size": 2, "depth": 1})
    assert type(model.vit).__module__ == "timm.models.vision_transformer"
    assert (model.vit.embed_dim, len(model.vit.blocks), model.grid) == (384, 1, (16, 16))
    assert not model(torch.randn(1, 3, 32, 32), torch.tensor([5])).any()  # starts from epsilon = 0


@pytest.mark.parametrize(
    ("name", "size", "kwargs", "message"),
    [
        ("nc64", 32, {}, "ncN-rbM"),
        ("nc10-rb1", 32, {}, "multiple of 4"),
        ("nc16-rb1", 30, {}, "divisible by 4"),
        ("nc16-rb1", 8, {"channels": 3}, "channels"),
        ("nc16-rb1", 8, {"channel_mult": (0, 1)}, r"channel_mult=\(0, 1\) must be integers from 1 up"),
        ("nc16-rb1", 8, {"channel_mult": (1, 1.5)}, "must be integers from 1 up"),
        ("nc16-rb1", 8, {"channel_mult": ()}, r"channel_mult=\(\) must be integers from 1 up"),
        ("resnet18", 32, {}, "no timm VisionTransformer"),
        ("vit_tiny_patch16", 32, {}, "unknown model"),
        ("vit_tiny_patch16_224", 8, {"patch_size": 3}, "do not cover"),
        ("vit_tiny_patch16_224", 8, {"img_size": 16, "patch_size": 2}, "not the image size"),
        ("vit_tiny_patch16_224", 8, {"global_pool": "avg", "patch_size": 2}, "no global_pool"),
        ("vit_tiny_patch16_224", 8, {"fc_norm": True, "patch_size": 2}, "no global_pool, fc_norm"),
        ("vit_tiny_patch16_224", 8, {"patch_drop_rate": 0.5, "patch_size": 2}, "patch_drop_rate"),
    ],
)
def test_bad_names_and_options_are_named(name, size, kwargs, message):
    with pytest.raises(InputError, match=message):
        build_denoiser(name, size, 1, None, kwargs)


# ---- on disk ----


def test_unet_folder_is_a_diffusers_pipeline(tmp_path):
    torch.manual_seed(0)
    model, process = unet("nc16-rb1", 8, 1, dropout=0.1).eval(), noise_schedule("cosine", 100, "v")
    export(model.to(memory_format=torch.channels_last), process, tmp_path / "run" / "model")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 70])
    for kind in (DDPMPipeline, DDIMPipeline):
        pipeline = kind.from_pretrained(tmp_path / "run" / "model")
        assert type(pipeline.unet) is UNet2DModel
        assert torch.allclose(pipeline.unet(x, t).sample, model(x, t), atol=1e-6)
        assert pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"
        assert pipeline.scheduler.config.prediction_type == "v_prediction"
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
    loaded, scheduler, folder = load_denoiser(str(tmp_path / "run"))
    assert isinstance(loaded, UNet) and not loaded.training and folder == tmp_path / "run" / "model"
    assert torch.allclose(loaded(x, t), model(x, t), atol=1e-6)
    assert torch.equal(scheduler.alphas_cumprod, process.alphas_cumprod)


def test_export_replaces_what_was_there(tmp_path):
    for _ in range(2):
        model = unet("nc16-rb1", 8, 1)
        export(model, noise_schedule(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = load_denoiser(str(tmp_path))[0]
    assert torch.equal(loaded.conv_in.weight, model.conv_in.weight)


def test_sizes_and_channels_of_other_pipelines(tmp_path):
    def plain(size, out: int) -> UNet2DModel:
        blocks = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4)
        return UNet2DModel(size, 1, out, block_out_channels=(8,), layers_per_block=1, **blocks)

    DDPMPipeline(plain((8, 8), 1), noise_schedule()).save_pretrained(tmp_path / "pair")
    assert load_denoiser(str(tmp_path / "pair"))[0].facts == (8, 1, None)
    DDPMPipeline(plain(8, 2), noise_schedule()).save_pretrained(tmp_path / "variance")
    with pytest.raises(InputError, match="2 channels out for 1 in"):
        load_denoiser(str(tmp_path / "variance"))


@pytest.mark.parametrize("flat", [False, True])
def test_pipeline_of_diffusers_own_is_read(flat, tmp_path):
    plain = UNet2DModel(8, 1, 1, block_out_channels=(16, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8).eval()  # fmt: skip
    DDPMPipeline(plain, DDPMScheduler(clip_sample=False)).save_pretrained(tmp_path)
    if flat:  # as google/ddpm-cifar10-32 lies on the hub
        for name in ("unet", "scheduler"):
            for file in (tmp_path / name).iterdir():
                file.rename(tmp_path / file.name)
            (tmp_path / name).rmdir()
    model, _, folder = load_denoiser(str(tmp_path))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 70])
    assert torch.equal(model(x, t), plain(x, t).sample) and folder == tmp_path


def test_vit_reads_back(tmp_path):
    model = tiny_vit(num_classes=10)
    torch.nn.init.normal_(model.head.weight)
    export(model.eval(), noise_schedule(steps=400), tmp_path / "model")
    loaded, scheduler, _ = load_denoiser(str(tmp_path))
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 70]), torch.tensor([0, 9])
    assert torch.equal(loaded(x, t, labels), model(x, t, labels))
    assert scheduler.config.num_train_timesteps == 400 and loaded.facts == (8, 1, 10)


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="holds no denoiser"):
        load_denoiser(str(tmp_path))
    classifier = create_model("resnet10t", 10, 1, model_kwargs={"channels": (8, 8, 8, 8), "stem_width": 8})
    export_classifier(classifier, tmp_path / "classifier" / "model")
    with pytest.raises(InputError, match="classifier holds no denoiser"):
        load_denoiser(str(tmp_path / "classifier"))
    model = unet("nc16-rb1", 8, 1)
    export(model, noise_schedule(), tmp_path / "model")
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


# ---- teachers ----


def test_teacher_may_differ_in_everything_but_the_process():
    process = noise_schedule()
    check_same(unet("nc16-rb1", 8, 1), process, unet("nc32-rb2", 8, 1, attention=()), noise_schedule(), "it")
    check_same(unet("nc16-rb1", 8, 1), process, tiny_vit(), DDPMScheduler(clip_sample=False), "it")


@pytest.mark.parametrize(
    ("teacher", "process", "message"),
    [
        (lambda: unet("nc16-rb1", 16, 1), noise_schedule, "image size 16"),
        (lambda: unet("nc16-rb1", 8, 3), noise_schedule, "channels 3"),
        (lambda: unet("nc16-rb1", 8, 1, 10), noise_schedule, "classes 10"),
        (lambda: unet("nc16-rb1", 8, 1), lambda: noise_schedule("cosine"), "other betas"),
        (lambda: unet("nc16-rb1", 8, 1), lambda: noise_schedule(prediction="v"), "v_prediction"),
        (lambda: unet("nc16-rb1", 8, 1), lambda: noise_schedule(steps=4000), "4000"),
    ],
)
def test_teacher_of_another_process_is_refused(teacher, process, message):
    with pytest.raises(InputError, match=message):
        check_same(unet("nc16-rb1", 8, 1), noise_schedule(), teacher(), process(), "the teacher")
