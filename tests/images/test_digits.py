"""The built-in images: scikit-learn's digits, each once, stratified, and the same every time."""

import numpy as np
import pytest
from helpers import refused
from sklearn.datasets import load_digits

from w2s.images.digits import Digits


def test_digits_are_1200_images_to_train_on_and_597_to_test():
    assert (len(Digits("train")), len(Digits("test"))) == (1200, 597)


def test_both_parts_of_digits_are_scikit_learns_images_with_their_labels_each_once():
    real = load_digits()
    pixels = np.round(real.images * 255 / 16).astype(np.uint8)
    expected = sorted((image.tobytes(), int(label)) for image, label in zip(pixels, real.target, strict=True))
    parts = [Digits(split) for split in ("train", "test")]
    found = sorted((np.asarray(part[i][0]).tobytes(), part[i][1]) for part in parts for i in range(len(part)))
    assert found == expected


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_are_stratified(split):
    shares = np.bincount(Digits(split).targets) / len(Digits(split))
    np.testing.assert_allclose(shares, np.bincount(load_digits().target) / 1797, atol=0.002)


def test_digits_are_the_same_every_time():
    np.random.seed(1)
    first = Digits("test")
    np.random.seed(2)
    second = Digits("test")
    assert np.array_equal(first.images, second.images) and np.array_equal(first.targets, second.targets)


def test_digits_are_8_by_8_grey_images_over_the_whole_range():
    image, label = Digits("train")[0]
    assert (image.mode, image.size) == ("L", (8, 8)) and isinstance(label, int)
    assert (Digits("train").images.min(), Digits("train").images.max()) == (0, 255)


def test_another_split_of_digits_is_refused():
    with refused("train and test", "'validation'"):
        Digits("validation")
