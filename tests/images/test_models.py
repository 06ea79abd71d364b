"""Building, small stems, exports that timm reads back, and weights files that are refused for what they are."""

import math
import pickle
from pathlib import Path

import pytest
import timm
import torch
from helpers import refused
from images.pictures import TINY, model_of
from safetensors.torch import load_file, save_file
from torch import nn

from train_cls import build_parser
from w2s.engine.errors import InputError
from w2s.images.models import (
    classifier_flops,
    create_model,
    export,
    find_model,
    load_folder,
    load_weights,
    student_flops,
)

TINY_VIT = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
SIZE = 32


@torch.no_grad()
def logits(model: nn.Module, channels: int = 3, size: int = SIZE) -> torch.Tensor:
    return model.eval()(torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0)))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "meant"), [("resnt50", "resnet50"), ("vit_tiny_patch16_244", "vit_tiny_patch16_224")])
def test_a_misspelt_model_is_refused_with_a_suggestion(name, meant):
    with refused(f"'{name}'", "did you mean", meant):
        create_model(name, 10)


def test_a_model_like_no_other_is_refused_without_a_suggestion():
    with pytest.raises(InputError, match=r"^unknown model 'zzzzzzzzzzzz'$"):
        create_model("zzzzzzzzzzzz", 10)


@pytest.mark.parametrize("kwargs", [{"nonsense": 1}, {"channels": "wide"}])
def test_arguments_that_an_architecture_does_not_take_are_refused(kwargs):
    (name,) = kwargs
    with refused("resnet10t", f"{name}={kwargs[name]!r}"):
        create_model("resnet10t", 10, model_kwargs=kwargs)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--batch-size 1", "32 px, one at a time"),  # BatchNorm of what is a single pixel by then
        ("--model-kwargs channels=[8,8,16]", "layer4"),  # three widths for four stages
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_image_is_read(words, parts):
    args = build_parser().parse_recipe(["--model", "resnet10t", *words.split()])
    model = create_model("resnet10t", 10, model_kwargs=args.model_kwargs)
    with refused("--model resnet10t cannot be trained on images of 32 px", parts):
        student_flops(args, model, (3, 32, 32), batch=4)


def test_the_flops_of_an_update_do_not_depend_on_the_images_they_are_counted_on():
    args = build_parser().parse_recipe(["--model", "resnet10t", "--batch-size", "1"])
    model = create_model("resnet10t", 10)
    assert student_flops(args, model, (3, 64, 64), batch=6) == classifier_flops(model, (3, 64, 64), batch=6, train=True)


def test_the_image_size_reaches_only_architectures_whose_weights_depend_on_it():
    vit = create_model("vit_tiny_patch16_224", 10, img_size=32, model_kwargs=TINY_VIT)
    assert vit.patch_embed.img_size == (32, 32) and vit.pos_embed.shape[1] == 64 + 1
    assert logits(create_model("resnet10t", 10, img_size=32, model_kwargs=TINY)).shape == (2, 10)


def test_an_image_size_in_the_models_own_arguments_wins():
    vit = create_model("vit_tiny_patch16_224", 10, img_size=32, model_kwargs=TINY_VIT | {"img_size": 16})
    assert vit.patch_embed.img_size == (16, 16)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_model_takes_the_channels_and_gives_the_classes_that_are_asked_for(in_chans):
    assert logits(create_model("resnet10t", 7, in_chans, model_kwargs=TINY), in_chans).shape == (2, 7)


# --- the small stem --------------------------------------------------------------------------------------------------


STEMS = [
    ("resnet18", "layer1", {"channels": (8, 8, 16, 16)}),  # 7x7 and max pooling
    ("resnet10t", "layer1", TINY),  # 3x3 tiered and max pooling
    ("densenet121", "features.denseblock1", {"growth_rate": 4, "block_config": (1, 1, 1, 1)}),
    ("efficientnet_b0", "blocks", None),
    ("mobilenetv3_small_050", "blocks", None),
]


def size_at(model: nn.Module, name: str) -> tuple[int, int]:
    """Height and width of what a module gets for an image of 32 px."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    logits(model)
    handle.remove()
    return tuple(seen[0][-2:])


@pytest.mark.parametrize(("name", "body", "kwargs"), STEMS)
def test_a_small_stem_keeps_the_full_resolution(name, body, kwargs):
    model = create_model(name, 10, small_stem=True, model_kwargs=kwargs)
    assert size_at(model, body) == (32, 32)
    assert size_at(create_model(name, 10, model_kwargs=kwargs), body) < (32, 32)


@pytest.mark.parametrize(("name", "_", "kwargs"), STEMS[:3])
def test_the_convolution_of_a_small_stem_is_3_by_3_trained_and_of_the_same_width(name, _, kwargs):
    model, usual = (create_model(name, 10, 1, small_stem=small, model_kwargs=kwargs) for small in (True, False))
    conv, before = (m.get_submodule(m.pretrained_cfg["first_conv"]) for m in (model, usual))
    assert conv.weight.shape == (before.out_channels, 1, 3, 3)
    assert conv.weight.requires_grad and conv.weight.std() > 0


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("vit_tiny_patch16_224", TINY_VIT, ("patches", "--model-kwargs")),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}, ("patches", "--model-kwargs")),
        ("vgg11", {"device": "meta"}, ("no strided first convolution",)),
    ],
)
def test_a_model_without_a_strided_stem_is_refused_a_small_one(name, kwargs, words):
    with refused("--small-stem", name, *words):
        create_model(name, 10, small_stem=True, model_kwargs=kwargs)


# --- exports ---------------------------------------------------------------------------------------------------------


EXPORTS = {
    "plain": {},
    "small stem": {"small_stem": True},
    "grey": {"in_chans": 1},
    "grey small stem": {"in_chans": 1, "small_stem": True},
    "other classes": {"num_classes": 3},
    "dropout": {"model_kwargs": {"drop_rate": 0.2, "drop_path_rate": 0.1}},
    "vit of another size and patch": {"name": "vit_tiny_patch16_224", "model_kwargs": TINY_VIT},
}


@pytest.mark.parametrize("options", EXPORTS.values(), ids=EXPORTS)
def test_an_export_gives_the_same_logits_through_timm(tmp_path, options):
    model, channels = model_of(**options), options.get("in_chans", 3)
    export(model, tmp_path / "model")
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert torch.equal(logits(again, channels), logits(model, channels))
    assert not torch.equal(logits(model_of(**options, seed=1), channels), logits(model, channels))


@pytest.mark.parametrize("options", EXPORTS.values(), ids=EXPORTS)
def test_an_export_read_back_can_be_exported_again(tmp_path, options):
    model, channels = model_of(**options), options.get("in_chans", 3)
    export(model, tmp_path / "one")
    export(load_folder(tmp_path / "one"), tmp_path / "two")
    assert torch.equal(logits(load_folder(tmp_path / "two"), channels), logits(model, channels))


def test_an_export_carries_the_size_and_normalisation_of_its_run(tmp_path):
    export(model_of(std=(0.25,) * 3), tmp_path / "model")
    config = timm.data.resolve_model_data_config(load_folder(tmp_path / "model"))
    assert config["input_size"] == (3, 32, 32)
    assert (list(config["mean"]), list(config["std"])) == ([0.5] * 3, [0.25] * 3)


def test_a_model_in_channels_last_format_is_exported_like_any_other_and_keeps_its_format(tmp_path):
    model = model_of().to(memory_format=torch.channels_last)
    export(model, tmp_path / "model")
    assert torch.equal(logits(load_folder(tmp_path / "model")), logits(model.to(memory_format=torch.contiguous_format)))
    model = model_of().to(memory_format=torch.channels_last)
    export(model, tmp_path / "model")
    assert model.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_compiled_model_is_exported_under_its_own_names(tmp_path):
    model = model_of()
    names = set(model.state_dict())
    model.compile(backend="eager")
    export(model, tmp_path / "model")
    assert set(load_file(tmp_path / "model" / "model.safetensors")) == names


def test_an_exported_model_may_be_built_again_for_other_classes(tmp_path):
    export(model_of(small_stem=True), tmp_path / "model")
    again = create_model(f"local-dir:{tmp_path / 'model'}", 4, pretrained=True)
    assert logits(again).shape == (2, 4)
    assert torch.equal(again.layer1[0].conv1.weight, model_of(small_stem=True).layer1[0].conv1.weight)


def test_an_export_takes_the_place_of_the_one_before(tmp_path):
    export(model_of(seed=1), tmp_path / "model")
    export(model_of(seed=2), tmp_path / "model")
    assert torch.equal(logits(load_folder(tmp_path / "model")), logits(model_of(seed=2)))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def failing(seed: int = 5) -> nn.Module:
    """A model whose weights can be written and whose config cannot."""
    model = model_of(seed=seed)
    model.timm_kwargs = {"act_layer": object()}
    return model


def test_an_export_that_fails_leaves_the_one_before(tmp_path):
    export(model_of(), tmp_path / "model")
    before = files(tmp_path / "model")
    with pytest.raises(ValueError, match="act_layer"):
        export(failing(), tmp_path / "model")
    assert files(tmp_path / "model") == before


def test_a_first_export_that_fails_leaves_no_folder_that_looks_complete(tmp_path):
    with pytest.raises(ValueError, match="act_layer"):
        export(failing(), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with refused("no exported model"):
        find_model(str(tmp_path))


def test_an_export_works_after_one_that_failed(tmp_path):
    with pytest.raises(ValueError, match="act_layer"):
        export(failing(), tmp_path / "model")
    export(model_of(), tmp_path / "model")
    assert torch.equal(logits(load_folder(tmp_path / "model")), logits(model_of()))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- finding and loading an export -----------------------------------------------------------------------------------


def test_a_run_folder_means_its_final_model_and_an_exported_folder_itself(tmp_path):
    export(model_of(), tmp_path / "model")
    export(model_of(), tmp_path / "best")
    assert find_model(str(tmp_path)) == tmp_path / "model"
    assert find_model(str(tmp_path / "model")) == tmp_path / "model"
    assert find_model(str(tmp_path / "best")) == tmp_path / "best"


def test_a_run_folder_that_only_has_a_best_model_is_refused_with_its_path(tmp_path):
    export(model_of(), tmp_path / "best")
    with refused(str(tmp_path / "best")):
        find_model(str(tmp_path))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_half_an_export_is_none(tmp_path, missing):
    export(model_of(), tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    with refused(str(tmp_path), "no exported model"):
        find_model(str(tmp_path))


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"architecture": "nothing", "pretrained_cfg": {}}'])
def test_an_export_with_a_broken_config_is_refused(tmp_path, config):
    export(model_of(), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(config)
    with refused(str(tmp_path / "model")):
        load_folder(tmp_path / "model")


def test_an_export_with_truncated_weights_is_refused(tmp_path):
    export(model_of(), tmp_path / "model")
    truncate(tmp_path / "model" / "model.safetensors")
    with refused("cannot read weights", str(tmp_path / "model" / "model.safetensors")):
        load_folder(tmp_path / "model")


# --- weights files ---------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_are_loaded_exactly(tmp_path, suffix):
    path, state = tmp_path / f"weights{suffix}", model_of().state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = model_of(seed=1)
    load_weights(model, path)
    assert torch.equal(logits(model), logits(model_of()))


def test_of_a_timm_checkpoint_with_both_the_moving_average_is_taken(tmp_path):
    checkpoint = {"state_dict": model_of(seed=1).state_dict(), "state_dict_ema": model_of(seed=2).state_dict()}
    torch.save({**checkpoint, "epoch": 3, "arch": "resnet10t"}, tmp_path / "last.pth.tar")
    model = model_of(seed=3)
    load_weights(model, tmp_path / "last.pth.tar")
    assert torch.equal(logits(model), logits(model_of(seed=2)))


def test_prefixes_of_wrappers_are_taken_off(tmp_path):
    torch.save({f"module._orig_mod.{k}": v for k, v in model_of().state_dict().items()}, tmp_path / "w.pth")
    model = model_of(seed=1)
    load_weights(model, tmp_path / "w.pth")
    assert torch.equal(logits(model), logits(model_of()))


def test_a_missing_weights_file_is_refused_by_name(tmp_path):
    with refused("no weights file", "nothing.pth"):
        load_weights(model_of(), tmp_path / "nothing.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_bytes(b""), lambda path: path.write_text("no")])
def test_a_damaged_weights_file_is_refused_by_name(tmp_path, suffix, damage):
    path, state = tmp_path / f"weights{suffix}", model_of().state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    damage(path)
    with refused("cannot read weights", path.name):
        load_weights(model_of(), path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, suffix):
    path, state = tmp_path / f"weights{suffix}", model_of().state_dict()
    state["fc.weight"][0, 0] = math.nan
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with refused("holds NaN in 1 of", "fc.weight", path.name):
        load_weights(model_of(), path)


def test_what_is_not_of_the_model_or_no_ordinary_float_may_be_no_number(tmp_path):
    state = {f"model.{name}": tensor for name, tensor in model_of().state_dict().items()}
    state |= {"best": torch.tensor(math.nan)}  # of a metric
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.5"}, tmp_path / "w.pth")
    load_weights(model_of(seed=1), tmp_path / "w.pth")
    torch.save({"a": torch.empty(2, device="meta"), "b": torch.eye(2).to_sparse_csr()}, tmp_path / "odd.pth")
    with refused("of another architecture"):
        load_weights(model_of(), tmp_path / "odd.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_pointer_of_git_lfs_is_no_weights_file(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 44\n")
    with refused("git lfs pull", path.name):
        load_weights(model_of(), path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_an_empty_weights_file_is_called_empty(tmp_path, suffix):
    (tmp_path / f"w{suffix}").touch()
    with refused("the file is empty"):
        load_weights(model_of(), tmp_path / f"w{suffix}")


@pytest.mark.parametrize(
    "state",
    [
        lambda: create_model("vit_tiny_patch16_224", 10, img_size=32, model_kwargs=TINY_VIT).state_dict(),
        lambda: create_model("resnet10t", 10, model_kwargs=TINY | {"stem_width": 16}).state_dict(),
        lambda: create_model("resnet10t", 11, model_kwargs=TINY).state_dict(),
        lambda: {k: v for k, v in model_of().state_dict().items() if k != "fc.bias"},
        lambda: model_of().state_dict() | {"head.bias": torch.zeros(3)},
        lambda: {k: 1.0 for k in model_of().state_dict()},
        lambda: {},
        lambda: [torch.zeros(3)],
    ],
    ids=["family", "width", "classes", "one missing", "one more", "numbers", "nothing", "a list"],
)
def test_weights_that_are_not_this_models_are_refused(tmp_path, state):
    torch.save(state(), tmp_path / "w.pth")
    with refused("w.pth"):
        load_weights(model_of(), tmp_path / "w.pth")


class Touches:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("wrap", [lambda code: code, lambda code: {"state_dict": {"fc.weight": code}}])
@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_code_in_a_weights_file_is_refused_and_not_run(tmp_path, wrap, write):
    write(wrap(Touches(tmp_path / "touched")), tmp_path / "evil.pth")
    with refused("evil.pth") as caught:
        load_weights(model_of(), tmp_path / "evil.pth")
    assert "weights_only" not in str(caught.value)  # no advice to run the code
    assert not (tmp_path / "touched").exists()


def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with refused("model.pth"):
        load_weights(model_of(), tmp_path / "model.pth")
