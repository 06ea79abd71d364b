"""The denoisers of both families: sizes, how they are called, and names and options that do not exist."""

import pytest
import torch
from diffusers import UNet2DModel
from diffusion.fakes import tiny_vit

from w2s.diffusion import unet  # the interface that others import
from w2s.diffusion.denoisers import build_denoiser, denoiser_flops, rebuild
from w2s.engine.errors import InputError


@pytest.mark.parametrize(
    ("name", "params"), [("nc64-rb2", 9_924_803), ("nc128-rb3", 52_542_467), ("nc160-rb3", 82_067_203)]
)
def test_parameter_counts_at_32_px(name, params):
    with torch.device("meta"):
        model = unet(name, 32)
    assert sum(p.numel() for p in model.parameters()) == params
    assert (model.name, model.signature) == (name, (32, 3, None))


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


@pytest.mark.parametrize("make", [lambda n: unet("nc16-rb1", 8, 1, num_classes=n), lambda n: tiny_vit(num_classes=n)])
@pytest.mark.parametrize("classes", [None, 10])
def test_denoisers_use_x_t_and_labels(make, classes):
    torch.manual_seed(0)
    model = make(classes).eval()
    for parameter in model.parameters():  # otherwise the head of a ViT would be 0
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
    model = build_denoiser("vit_small_patch16_224", 32, 3, model_kwargs={"img_size": 32, "patch_size": 2, "depth": 1})
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
        ("nc16-rb1", 8, {"channel_mult": 4}, r"channel_mult=4 must be a list, as in 'channel_mult=\[4\]'"),
        ("nc16-rb1", 8, {"attention": 8}, r"attention=8 must be a list, as in 'attention=\[8\]'"),
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
        build_denoiser(name, size, 1, model_kwargs=kwargs)


@pytest.mark.parametrize("make", [lambda: unet("nc16-rb1", 8, 1, dropout=0.3), lambda: tiny_vit(num_classes=10)])
def test_rebuilt_denoiser_is_of_the_same_architecture_with_other_weights(make):
    model = make()
    other = rebuild(model)
    assert type(other) is type(model) and other.signature == model.signature and str(other) == str(model)
    weights, others = model.state_dict(), other.state_dict()
    assert {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in others.items()}
    assert any(not torch.equal(weights[name], others[name]) for name in weights)


def test_flops_are_counted_without_touching_the_model():
    model = tiny_vit(num_classes=10)
    forward, update = denoiser_flops(model, 6, backward=False), denoiser_flops(model, 6, backward=True)
    assert denoiser_flops(model, 12, backward=False) == 2 * forward
    assert update == pytest.approx(3 * forward, rel=0.05)  # but for the first layer, whose inputs need no gradient
    assert all(p.device.type == "cpu" and p.grad is None for p in model.parameters())
