"""Opening datasets and reading their labels and images."""

import numpy as np
from helpers import refused
from images.pictures import hf_folder, picture, picture_folder

from w2s.images.datasets import image_mode, open_dataset, read_image, targets_of


def test_targets_come_as_integers_from_every_kind_of_dataset(tmp_path):
    root = picture_folder(tmp_path / "f", train={"ant": 2, "bee": 2})
    folder = open_dataset("", "train", data_dir=str(root), mode="RGB")
    hf_name = f"hfds/{hf_folder(tmp_path / 'hf', [1, 0] * 3)}"
    hugging = open_dataset(hf_name, "train", data_dir=str(tmp_path / "cache"), mode="RGB")
    plain = [("picture", 1), ("picture", 0)]
    for dataset, expected in ((folder, [0, 0, 1, 1]), (hugging, [1, 0] * 3), (plain, [1, 0])):
        targets = targets_of(dataset, "train", None)
        assert targets.dtype == np.int64 and targets.tolist() == expected


def test_an_image_is_read_as_it_is_in_the_mode_that_is_asked_for(tmp_path):
    root = picture_folder(tmp_path, train={"ant": 1, "bee": 2})
    dataset = open_dataset("", "train", data_dir=str(root), mode="RGB")
    for mode in ("RGB", "L"):
        image, target = read_image(dataset, 2, mode)
        assert np.array_equal(np.asarray(image), np.asarray(picture(1).convert(mode))) and target == 1


def test_other_than_grey_and_colour_images_are_refused():
    assert (image_mode(1), image_mode(3)) == ("L", "RGB")
    with refused("--in-chans 2", "1 or 3 channels"):
        image_mode(2)
