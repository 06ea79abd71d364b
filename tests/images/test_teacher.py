"""Classifier teachers: every way to name one, and the student's pixels in the teacher's own normalisation and size."""

import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import refused
from images.pictures import TINY, model_of
from safetensors.torch import save_file
from torch import nn

from train_cls import build_parser, build_teacher, resolve
from w2s.images.classes import Classes
from w2s.images.models import create_model, export
from w2s.images.teacher import ImageTeacher, renormalisation
from w2s.images.teacher_models import load_teacher

TINY_VIT = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(batch: int = 4, channels: int = 3, size: int = 32) -> torch.Tensor:
    """Images in 0-1."""
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


def normalised(images: torch.Tensor, mean: tuple, std: tuple) -> torch.Tensor:
    return (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


@torch.no_grad()
def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.eval()(images)


def image_teacher(model: nn.Module, mean=(0.5,) * 3, std=(0.5,) * 3, **options: object) -> ImageTeacher:
    """A teacher of a student with these statistics."""
    return ImageTeacher(model, source="here", device="cpu", mean=mean, std=std, **options)


# --- finding one -----------------------------------------------------------------------------------------------------


def load(
    spec: object, name: str | None = None, kwargs: dict | None = None, classes=10, channels=3, size=32, map_file=None
):
    config = {"input_size": (channels, size, size), "mean": (0.5,) * channels, "std": (0.5,) * channels}
    options = {"model_name": name, "model_kwargs": kwargs or {}, "map_file": map_file}
    classes = classes if isinstance(classes, Classes) else Classes(classes)
    model, source, _ = load_teacher(str(spec), classes=classes, data_config=config, **options)
    return model, source


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """What a run leaves: a final and a best model, and the same final weights as files."""
    folder = tmp_path_factory.mktemp("runs") / "weak"
    final, best = model_of(seed=1), model_of(seed=2)
    export(final, folder / "model")
    export(best, folder / "best")
    save_file(final.state_dict(), folder / "weights.safetensors")
    torch.save({"state_dict": final.state_dict(), "arch": "resnet10t", "epoch": 9}, folder / "last.pth")
    torch.save(final.state_dict(), folder / "plain.pt")
    return folder


@pytest.mark.parametrize(
    ("spec", "named", "seed", "place"),
    [
        ("{}", False, 1, "model"),
        ("{}/model", False, 1, "model"),
        ("{}/best", False, 2, "best"),
        ("local-dir:{}", False, 1, "model"),
        ("local-dir:{}/best", False, 2, "best"),
        ("{}/weights.safetensors", True, 1, "weights.safetensors"),
        ("{}/last.pth", True, 1, "last.pth"),
        ("{}/plain.pt", True, 1, "plain.pt"),
    ],
)
def test_every_form_of_teacher_gives_its_model_and_where_it_comes_from(run_folder, spec, named, seed, place):
    model, source = load(spec.format(run_folder), *(("resnet10t", TINY) if named else ()))
    assert torch.equal(logits(model, pixels()), logits(model_of(seed=seed), pixels()))
    assert source == str(run_folder / place)


def test_a_folder_named_like_a_weights_file_is_a_folder(tmp_path):
    export(model_of(seed=1), tmp_path / "run.pth" / "model")
    assert load(tmp_path / "run.pth")[1] == str(tmp_path / "run.pth" / "model")


def test_a_weights_file_without_its_architecture_is_refused(run_folder):
    with refused("--teacher-model", "weights.safetensors"):
        load(run_folder / "weights.safetensors")


def test_an_architecture_beside_a_run_folder_is_refused(run_folder):
    with refused("--teacher-model", str(run_folder)):
        load(run_folder, "resnet10t")


@pytest.mark.parametrize("spec", ["nowhere", "nowhere/run", "local-dir:nowhere", "resnet10x", "/nowhere/model"])
def test_what_is_neither_a_folder_nor_a_model_is_refused(spec):
    with refused(spec):
        load(spec)


def test_a_missing_weights_file_is_refused():
    with refused("no weights file", "nowhere.pth"):
        load("nowhere.pth", "resnet10t")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with refused(str(tmp_path), "no exported model"):
        load(tmp_path)


def test_an_unknown_architecture_is_refused(run_folder):
    with refused("resnet10x"):
        load(run_folder / "weights.safetensors", "resnet10x")


@pytest.mark.parametrize("form", ["", "/weights.safetensors"])
def test_a_teacher_of_other_classes_is_refused(run_folder, form):
    with refused(str(run_folder)):
        load(f"{run_folder}{form}", *(("resnet10t", TINY) if form else ()), classes=7)


@pytest.mark.parametrize("form", ["", "/weights.safetensors", "/last.pth"])
def test_a_teacher_says_how_many_classes_it_and_the_data_have(run_folder, form):
    with refused("the teacher has 10 classes, the data 7", str(run_folder)):
        load(f"{run_folder}{form}", *(("resnet10t", TINY) if form else ()), classes=7)


@pytest.mark.parametrize("form", ["", "/weights.safetensors"])
def test_a_teacher_of_other_channels_is_refused(run_folder, form):
    with refused("3 channels", "student 1"):
        load(f"{run_folder}{form}", *(("resnet10t", TINY) if form else ()), channels=1)


@pytest.mark.parametrize(("classes", "channels", "words"), [(10, 3, "11 classes, the data 10"), (11, 1, "3 channels")])
def test_a_transformers_weights_file_says_its_classes_and_channels(tmp_path, classes, channels, words):
    save_file(
        create_model("vit_tiny_patch16_224", 11, model_kwargs=TINY_VIT).state_dict(), tmp_path / "vit.safetensors"
    )
    with refused(words):
        load(tmp_path / "vit.safetensors", "vit_tiny_patch16_224", TINY_VIT, classes, channels, size=224)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_grey_teacher_fits_grey_images(tmp_path, form):
    model = model_of(mean=(0.5,), std=(0.5,), in_chans=1)
    export(model, tmp_path / "model")
    if form == "folder":
        found, _ = load(tmp_path, channels=1)
    else:
        (tmp_path / "model" / "model.safetensors").rename(tmp_path / "old.safetensors")
        found, _ = load(tmp_path / "old.safetensors", "resnet10t", TINY, channels=1)
    assert torch.equal(logits(found, pixels(channels=1)), logits(model, pixels(channels=1)))


def test_the_weights_alone_of_an_exported_model_are_refused(tmp_path):
    """Another architecture of the same tensors, such as one with a small stem, would load them in silence."""
    export(model_of(), tmp_path / "model")
    with refused("model.safetensors is a part of an exported model: give its folder", str(tmp_path / "model")):
        load(tmp_path / "model" / "model.safetensors", "resnet10t", TINY)


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        ("vit_tiny_patch16_224", TINY_VIT, 32),
        ("vit_tiny_patch16_224", TINY_VIT | {"img_size": 48}, 48),  # resized for a model of one size
        ("resnet10t", TINY, 32),
    ],
)
def test_a_bare_weights_file_is_given_the_students_pixels_as_they_are(tmp_path, name, kwargs, size):
    model = create_model(name, 10, img_size=32, model_kwargs=kwargs)  # a size in the arguments comes first
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    words = f"--dataset digits --model resnet10t --teacher {tmp_path / 'weights.safetensors'} --teacher-model {name}"
    args = build_parser().parse_recipe(words.split())
    args.teacher_kwargs = kwargs
    config, images = resolve(args), normalised(pixels(), (0.5,) * 3, (0.5,) * 3)
    run, data = SimpleNamespace(placement={"device": "cpu"}), SimpleNamespace(classes=Classes(10))
    teacher = build_teacher(args, run, args.teacher, config, data)
    # the script's default memory format is another than the model's: the same sums in another order
    expected = logits(model, images if size == 32 else F.interpolate(images, size, mode="bicubic", antialias=True))
    torch.testing.assert_close(teacher(images), expected, atol=1e-5, rtol=1e-5)
    assert teacher.same_range and teacher.size == (size, size)


# --- the same pixels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "own"),
    [
        (((0.5,) * 3, (0.5,) * 3), IMAGENET),
        (IMAGENET, ((0.0,) * 3, (1.0,) * 3)),
        (((0.1, 0.9, 0.4), (0.3, 0.1, 1.0)), IMAGENET),
        (IMAGENET, IMAGENET),
    ],
)
def test_logits_are_those_of_the_teacher_on_its_own_normalisation(student, own):
    model = model_of(mean=own[0], std=own[1])
    teacher = image_teacher(model, mean=student[0], std=student[1])
    expected = logits(model, normalised(pixels(), *own))
    torch.testing.assert_close(teacher(normalised(pixels(), *student)), expected, atol=1e-5, rtol=1e-5)
    if student != own:
        assert not torch.allclose(logits(model, normalised(pixels(), *student)), expected, atol=1e-2)


def test_a_teacher_of_the_students_normalisation_and_size_gets_the_very_batch():
    model, images = model_of(), normalised(pixels(), (0.5,) * 3, (0.5,) * 3)
    assert torch.equal(image_teacher(model)(images), logits(model, images))


def test_a_grey_student_uses_the_mean_of_a_teachers_colour_statistics():
    model = model_of(mean=IMAGENET[0], std=IMAGENET[1], in_chans=1)
    own = (sum(IMAGENET[0]) / 3,), (sum(IMAGENET[1]) / 3,)
    teacher = image_teacher(model, mean=(0.5,), std=(0.5,))
    images = pixels(channels=1)
    expected = logits(model, normalised(images, *own))
    torch.testing.assert_close(teacher(normalised(images, (0.5,), (0.5,))), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [24, 48])
def test_images_are_resized_to_the_size_of_the_teacher(size):
    model, images = model_of(size=size, mean=IMAGENET[0], std=IMAGENET[1]), pixels()
    own = normalised(images, *IMAGENET)
    expected = logits(model, F.interpolate(own, (size, size), mode="bicubic", antialias=True))
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    given = image_teacher(model)(normalised(images, (0.5,) * 3, (0.5,) * 3))
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
    assert seen == [(4, 3, size, size)]


def test_the_batch_of_the_student_is_left_as_it_was():
    teacher = image_teacher(model_of(size=48, mean=IMAGENET[0], std=IMAGENET[1]))
    images = pixels()
    teacher(images)
    assert torch.equal(images, pixels())


def test_a_teacher_in_channels_last_format_gives_the_same_logits():
    images = pixels()
    expected = logits(model_of(), images)
    teacher = image_teacher(model_of(), channels_last=True)
    given = teacher(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


def test_the_map_between_two_normalisations_takes_one_to_the_other():
    student, teacher = ((0.1, 0.9, 0.4), (0.3, 0.1, 1.0)), IMAGENET
    scale, shift = renormalisation(*student, *teacher)
    assert scale.shape == shift.shape == (3,) and scale.dtype == shift.dtype == torch.float32
    images = pixels()
    mapped = normalised(images, *student) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    torch.testing.assert_close(mapped, normalised(images, *teacher), atol=1e-5, rtol=1e-5)


def test_the_map_between_equal_normalisations_changes_nothing():
    scale, shift = renormalisation(*IMAGENET, *IMAGENET)
    assert scale.tolist() == [1, 1, 1] and shift.tolist() == [0, 0, 0]


def test_the_statistics_of_a_colour_teacher_are_averaged_for_grey_images():
    grey = (0.5,), (0.25,)
    averages = [(sum(values) / 3,) for values in IMAGENET]
    for given, expected in zip(renormalisation(*grey, *IMAGENET), renormalisation(*grey, *averages), strict=True):
        torch.testing.assert_close(given, expected)


# --- released --------------------------------------------------------------------------------------------------------


def test_the_memory_of_a_released_teacher_is_freed_its_statistics_too():
    def held() -> int:
        gc.collect()
        return sum(t.numel() for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter))

    before = held()
    teacher = image_teacher(model_of(mean=IMAGENET[0], std=IMAGENET[1]))
    teacher(pixels())
    assert held() >= before + teacher.params
    teacher.release()
    assert held() == before
