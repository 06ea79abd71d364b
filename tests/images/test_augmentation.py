"""The transforms that the augmentation options make: pixels, crops, flips, sizes; and options that make none."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import refused
from images.pictures import Pictures, options
from PIL import Image

from train_cls import build_parser, resolve
from w2s.images.augmentation import cache_obstacle, classification_transform, device_transform, eval_transform

CPU = torch.device("cpu")
STILL = {"hflip": 0.0, "color_jitter": 0.0, "pad_crop": 0}


def transform_of(**changes: object) -> Callable[[Image.Image], torch.Tensor]:
    """From an image to what a run with these options trains on, (C, H, W)."""
    args, config = options(**changes)
    transform, on_device = classification_transform(args, config), device_transform(args, config, CPU, training=True)
    return lambda image: on_device(transform(image)[None], keys=[(0, 0)])[0]


def reported_transform_of(**changes: object) -> Callable[[Image.Image], torch.Tensor]:
    """From an image to what a run with these options evaluates on, (C, H, W)."""
    args, config = options(**changes)
    transform, on_device = eval_transform(config), device_transform(args, config, CPU)
    return lambda image: on_device(transform(image)[None])[0]


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize(
    "changes",
    [{"no_aug": True}, {"no_aug": True, "pad_crop": 4, "hflip": 1.0, "aa": "rand-m9", "reprob": 1.0}, STILL],
    ids=["no-aug", "no-aug beside others", "a crop without padding"],
)
def test_without_randomness_the_pixels_are_those_of_the_image(changes):
    image = Pictures(1)[0][0]
    assert torch.equal(transform_of(**changes)(image), pixels_of(image))


def test_no_aug_on_the_command_line_takes_the_augmentation_away():
    args = build_parser().parse_recipe(["--model", "resnet10t", "--no-aug", "--img-size", "32"])
    image = Pictures(1)[0][0]
    transform = classification_transform(args, resolve(args))
    assert np.array_equal(transform(image), image)


def test_pixels_are_normalised_by_the_mean_and_std_of_the_run():
    mean, std = [0.5, 0.4, 0.3], [0.1, 0.2, 0.5]
    image = Pictures(1)[0][0]
    expected = (pixels_of(image) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(transform_of(**STILL, mean=mean, std=std)(image), expected)
    torch.testing.assert_close(reported_transform_of(mean=mean, std=std)(image), expected)


def test_pad_crop_cuts_a_window_of_the_image_padded_with_black():
    image, transform = Pictures(1)[0][0], transform_of(**STILL | {"pad_crop": 3})
    padded = torch.nn.functional.pad(pixels_of(image), [3] * 4)
    windows = {(y, x): padded[:, y : y + 32, x : x + 32] for y in range(7) for x in range(7)}
    places = set()
    for _ in range(30):
        drawn = transform(image)
        place = [place for place, window in windows.items() if torch.equal(drawn, window)]
        assert place
        places.add(place[0])
    assert len(places) > 5


@pytest.mark.parametrize(
    "crop", [{"pad_crop": 0}, {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}], ids=["pad-crop", "timm's crop"]
)
@pytest.mark.parametrize(("hflip", "expected"), [(0.0, {False}), (1.0, {True}), (0.5, {False, True})])
def test_images_are_flipped_as_often_as_asked(crop, hflip, expected):
    transform, image = transform_of(hflip=hflip, color_jitter=0.0, **crop), Pictures(1)[0][0]
    straight, mirrored = pixels_of(image), pixels_of(image).flip(-1)
    seen = set()
    for _ in range(40):
        drawn = transform(image)
        assert torch.equal(drawn, straight) or torch.equal(drawn, mirrored)
        seen.add(torch.equal(drawn, mirrored))
    assert seen == expected


def test_vflip_turns_the_image_upside_down():
    image = Pictures(1)[0][0]
    assert torch.equal(transform_of(**STILL, vflip=1.0)(image), pixels_of(image).flip(-2))


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (50, 40), (40, 90)])
@pytest.mark.parametrize("changes", [{"no_aug": True}, {"pad_crop": 4}, {}], ids=["no-aug", "pad-crop", "timm's crop"])
def test_images_of_any_size_come_out_at_the_size_of_the_run(size, changes):
    image = Pictures(1, size)[0][0]
    assert transform_of(**changes)(image).shape == (3, 32, 32)
    assert reported_transform_of()(image).shape == (3, 32, 32)


def test_grey_images_stay_one_channel():
    image = Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32))
    transform = transform_of(in_chans=1, mean=[0.0], std=[1.0], **STILL)
    assert torch.equal(transform(image)[0] * 255, torch.arange(1024).remainder(256).view(32, 32).float())


def test_the_evaluation_transform_has_no_randomness():
    image, transform = Pictures(1, (50, 40))[0][0], reported_transform_of(hflip=1.0, aa="rand-m9", reprob=1.0)
    assert torch.equal(transform(image), transform(image))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aa": "nonsense"}, "--aa nonsense"),
        ({"aa": "randm9"}, "--aa randm9"),
        ({"train_interpolation": "nonsense"}, "--train-interpolation nonsense"),
    ],
)
def test_augmentation_that_timm_does_not_know_is_refused(changes, words):
    with refused("transforms", words):
        transform_of(reprob=0.5, **changes)


@pytest.mark.parametrize("changes", [{"scale": [1.0, 0.08]}, {"ratio": [2.0, 1.0]}])
def test_a_range_that_is_turned_round_is_refused(changes):
    with refused(f"--{next(iter(changes))}", "lower one"):
        transform_of(**changes)


def test_pad_crop_resizes_as_train_interpolation_says():
    image = Pictures(1, (50, 40))[0][0]
    nearest, bicubic = (transform_of(train_interpolation=kind, **STILL)(image) for kind in ("nearest", "bicubic"))
    assert not torch.equal(nearest, bicubic)
    with refused("transforms", "random"):
        transform_of(train_interpolation="random", **STILL)


def test_statistics_of_another_number_of_channels_are_refused():
    with refused("--mean"):
        options(mean=[0.5, 0.5])


@pytest.mark.parametrize("changes", [{"mean": [124.0, 116.0, 104.0]}, {"mean": [-0.5]}, {"std": [58.0, 57.0, 57.0]}])
def test_statistics_of_pixels_up_to_255_are_refused(changes):
    ((name, values),) = changes.items()
    with refused(f"--{name}", "divide by 255" if values[0] > 1 else "pixels lie in 0 to 1"):
        options(**changes)


# --- the data config -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 64])
def test_the_input_size_has_the_channels_of_the_run(size):
    _, config = options(img_size=size, in_chans=1, mean=None, std=None)
    assert config["input_size"] == (1, size or 176, size or 176)  # 176 is resnet10t's own
    assert config["mean"] == pytest.approx([(0.485 + 0.456 + 0.406) / 3])


# --- what the cache can do -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "random resized crops"),
        ({"pad_crop": 2, "aa": "rand-m9"}, "--aa rand-m9"),
        ({"pad_crop": 2, "color_jitter": 0.4}, "--color-jitter 0.4"),
    ],
    ids=["rrc", "aa", "jitter"],
)
def test_augmentation_that_the_cache_cannot_do_is_named(changes, words):
    args, _ = options(**changes)
    assert words in cache_obstacle(args)


@pytest.mark.parametrize(
    "changes",
    [{"no_aug": True, "aa": "rand-m9", "reprob": 0.5}, {"pad_crop": 2, "color_jitter": 0.0, "reprob": 0.25}],
    ids=str,
)
def test_crops_flips_and_erasing_of_small_images_and_no_augmentation_are_left_to_the_cache(changes):
    args, _ = options(**changes)
    assert cache_obstacle(args) is None
