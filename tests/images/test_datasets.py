"""Opening datasets and reading their labels and images."""

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import refused
from images.pictures import hf_folder, picture, picture_folder
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import DataLoader

from w2s.engine.decoding import in_threads
from w2s.images.datasets import PackedSamples, image_mode, open_dataset, read_image, targets_of


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


def test_the_files_of_a_folder_are_those_that_timm_finds(tmp_path):
    root = picture_folder(tmp_path, train={"ant": 2, "bée": 3})
    found = create_dataset("", root=str(root), split="train").reader.samples
    packed = open_dataset("", "train", data_dir=str(root), mode="RGB").reader.samples
    assert list(packed) == list(found) and packed[-1] == found[-1] and len(packed) == 5
    with pytest.raises(IndexError):
        packed[5]


def private_bytes_of_a_fork(samples: Sequence[tuple[str, int]]) -> int:
    """Memory that a forked process comes to own by going through all samples."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:

        def private() -> int:
            lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
            return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))

        before = private()
        for _ in samples:
            pass
        os.write(writer, str(1024 * (private() - before)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(reader, 32))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_workers_do_not_copy_the_names_of_the_files():
    samples = [(f"/data/train/class{k % 1000}/image{k:08}.jpg", k % 1000) for k in range(100_000)]
    packed = PackedSamples(samples)
    assert private_bytes_of_a_fork(packed) < 2**21 < 2**22 < private_bytes_of_a_fork(samples)


def test_other_than_grey_and_colour_images_are_refused():
    assert (image_mode(1), image_mode(3)) == ("L", "RGB")
    with refused("--in-chans 2", "1 or 3 channels"):
        image_mode(2)


def test_the_images_of_a_tar_are_read_by_several_threads_and_workers_at_once(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for number in range(200):
            file = io.BytesIO()
            Image.fromarray(np.full((64, 64, 3), number, np.uint8)).save(file, "png")
            info = tarfile.TarInfo(f"{number % 2}/{number:03}.png")
            info.size = file.tell()
            file.seek(0)
            tar.addfile(info, file)
    opened = open_dataset("", "train", data_dir=str(tmp_path / "set.tar"), mode="RGB")
    seen = [
        image.getpixel((0, 0))[0] for image, _ in in_threads(lambda row: read_image(opened, row, "RGB"), range(200))
    ]
    assert sorted(seen) == list(range(200))
    opened.transform = lambda image: image.getpixel((0, 0))[0]
    loader = DataLoader(opened, batch_size=10, num_workers=2, multiprocessing_context="fork")
    assert sorted(value for values, _ in loader for value in values.tolist()) == list(range(200))
