"""The images that diffusion trains on and is compared with."""

import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from helpers import refused, words
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import Dataset, get_worker_info

import train_diffusion
from w2s.diffusion.data import Reference, load_diffusion_data, save_grid
from w2s.engine.errors import InputError
from w2s.engine.randomness import epoch_order
from w2s.images.digits import Digits
from w2s.images.loading import ImageSplit, train_batches
from w2s.images.pixels import to_pixels

ALONE = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1)


def load(*parts: object):
    args = train_diffusion.build_parser().parse_recipe(words("--workers 0 --batch-size 8", *parts))
    train_diffusion.resolve(args)
    return load_diffusion_data(args, ALONE, cache=args.cache), args


def first_batches(train: Dataset, args, batches_per_epoch: int) -> Iterator:
    """The batches of a run from its beginning, as train_diffusion.py makes them."""
    return train_batches(
        train,
        ALONE,
        batch_size=args.batch_size,
        batches_per_epoch=batches_per_epoch,
        start=0,
        seed=args.seed,
        workers=args.workers,
    )


def every(reference: Reference) -> torch.Tensor:
    """All images of a reference, uint8 (N, C, H, W), served in batches of seven."""
    count = len(reference)
    return torch.cat(list(reference([range(k, min(k + 7, count)) for k in range(0, count, 7)])))


@pytest.mark.parametrize("cache", ["device", "none"])
def test_digits_as_they_are(cache):
    data, args = load("--dataset digits --train-samples 100 --switch-split 0.1 --cache", cache)
    train, switch = data.train, data.switch
    assert (len(train), len(switch), len(data.report), data.samples) == (100, 120, 100, 100)
    rows = data.train.rows if cache == "none" else None
    batch, labels = next(first_batches(train, args, batches_per_epoch=12))
    assert batch.shape == (8, 1, 8, 8) and batch.min() >= -1 and batch.max() == 1
    pixels = every(data.report)
    assert pixels.dtype == torch.uint8
    places = epoch_order(100, 0, 0)[:8]
    assert_close(batch, pixels[places].float() / 127.5 - 1, atol=1e-6, rtol=0)
    digits = Digits("train")
    if rows is not None:
        assert np.array_equal(pixels[:, 0].numpy(), digits.images[rows])
        assert labels.tolist() == digits.targets[rows[places]].tolist()
        assert not set(rows) & set(data.switch.images.rows)
    held_out = {image.tobytes() for image in every(switch).numpy()}
    assert not held_out & {image.tobytes() for image in pixels.numpy()}


class Where(Dataset):
    """White images where a worker reads them, black ones elsewhere."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        return Image.new("L", (8, 8), 0 if get_worker_info() is None else 255), 0


@pytest.mark.parametrize("workers", [0, 1])
def test_references_that_are_not_in_memory_are_read_by_the_workers_there_are(workers):
    images = ImageSplit(Where(), np.arange(4), mode="L", transform=to_pixels, on_device=None)
    assert every(Reference(images, key={}, workers=workers)).unique().tolist() == [255 * workers]


def test_another_split_size_and_flips():
    data, args = load("--dataset digits --train-samples 50 --batch-size 50 --img-size 16 --fd-split test --hflip 0.5")
    assert len(data.report) == 597 and next(data.report([range(3)])).shape == (3, 1, 16, 16)
    assert data.switch is not data.report and len(data.switch) == 50  # nothing held out: the training images
    flipped = 0
    images, originals = next(first_batches(data.train, args, batches_per_epoch=1))[0], every(data.switch)
    for image, place in zip(images, epoch_order(50, 0, 0), strict=True):
        original = originals[place].float() / 127.5 - 1
        same, mirrored = (torch.allclose(image, o, atol=1e-6) for o in (original, original.flip(-1)))
        assert same or mirrored
        flipped += mirrored and not same
    assert 10 < flipped < 40


def test_every_image_may_be_flipped():
    data, args = load("--dataset digits --train-samples 20 --batch-size 20 --hflip 1")
    images = next(first_batches(data.train, args, batches_per_epoch=1))[0]
    originals = every(data.switch)[epoch_order(20, 0, 0)].float() / 127.5 - 1
    assert_close(images, originals.flip(-1), atol=1e-6, rtol=0)


def test_keys_tell_references_apart():
    keys = [
        load("--dataset digits", extra)[0].report.key
        for extra in ("", "--fd-split test", "--img-size 16", "--train-samples 50", "--switch-split 0.1")
    ]
    assert len({str(key) for key in keys}) == 5
    assert load("--dataset digits --seed 5 --batch-size 4")[0].report.key == keys[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dataset wds/x", "is a stream"),
        ("--dataset digits --fd-split val", "train and test"),
        ("--dataset digits --switch-split many", "a share of the training data"),
        ("--dataset digits --in-chans 2", "1 or 3 channels"),
        ("--dataset nothing", "give --data-dir"),
    ],
)
def test_bad_data_is_named(options, message):
    with pytest.raises(InputError, match=message):
        load(options)


def test_keys_tell_folders_of_one_name_apart(tmp_path, monkeypatch):
    options = "--dataset hfds/set/train --img-size 8 --in-chans 1 --data-dir"
    keys = []
    for place in ("one", "other", "one"):
        if not (tmp_path / place).exists():
            unlabelled(tmp_path / place / "set", "no column")
        monkeypatch.chdir(tmp_path / place)
        keys.append(load(options, tmp_path / "cache")[0].report.key)
    assert keys[0] == keys[2] != keys[1]
    assert len({key["dataset"][1] for key in keys}) == len({key["dataset"][2] for key in keys}) == 2


@pytest.mark.parametrize(("extra", "replaced"), [("", "train"), ("--fd-split val", "val")])
def test_the_key_of_a_folder_tells_its_files_apart(extra, replaced, tmp_path):
    options = unlabelled(tmp_path, "folder") + " --img-size 8 --in-chans 1"
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    keys = [load(options, extra)[0].report.key for _ in range(2)]
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(tmp_path / replaced / "03.png")
    keys.append(load(options, extra)[0].report.key)
    assert keys[0] == keys[1] != keys[2]


def test_the_key_of_a_tar_tells_it_apart(tmp_path):
    unlabelled(tmp_path, "folder")
    options, keys = f"--data-dir {tmp_path}/set.tar --img-size 8 --in-chans 1", []
    for last in ("11.png", "10.png"):  # the pixels of one image are others; its name, place and size are not
        with tarfile.open(tmp_path / "set.tar", "w") as tar:
            for image in sorted((tmp_path / "train").iterdir())[:11]:
                tar.add(image, arcname=f"things/{image.name}")
            tar.add(tmp_path / "train" / last, arcname="things/last.png")
        keys += [load(options)[0].report.key for _ in range(2)]
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_a_file_that_is_gone_is_named(tmp_path):
    """Also where the images that are read before the run are others."""
    options = unlabelled(tmp_path, "folder") + " --img-size 8 --in-chans 1 --cache none --check-images 1"
    (tmp_path / "train" / "99.png").symlink_to("nowhere.png")
    with refused("cannot read", "99.png: No such file or directory"):
        load(options)


LABELS = {  # what may stand in the column, and what --class-cond says of it
    "nothing": ([None] * 12, datasets.Value("int64"), "has nothing in column 'label'; see --target-key"),
    "strings": (["cat", "dog"] * 6, datasets.Value("string"), "are no integers.*see --target-key"),
    "minus one": ([-1] * 12, datasets.Value("int64"), "label -1 of row 0 in split 'train' is out of range"),
    "an empty class": ([0, 2] * 6, datasets.ClassLabel(names=["a", "b", "c"]), "class 1 has no image"),
    "lists": ([[0, 1]] * 12, datasets.Sequence(datasets.Value("int64")), "have 2 labels each, not one"),
}


def unlabelled(root: Path, kind: str) -> str:
    """Twelve grey images without usable labels, a folder of PNGs or a set of parquet files; the options for them."""
    pictures = [Image.fromarray(np.full((8, 8), 20 * k, np.uint8)) for k in range(12)]
    (root / "train").mkdir(parents=True)
    if kind == "folder":
        for k, picture in enumerate(pictures):
            picture.save(root / "train" / f"{k:02}.png")
        return f"--data-dir {root}"
    columns, features = {"image": pictures}, {"image": datasets.Image()}
    if kind in LABELS:
        columns["label"], features["label"], _ = LABELS[kind]
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(str(root / "train" / "train.parquet"))
    return f"--dataset hfds/{root / 'train'} --data-dir {root / 'cache'}"


@pytest.mark.parametrize("kind", ["folder", "no column", *LABELS])
def test_images_without_labels_train_without_classes_only(kind, tmp_path):
    options = unlabelled(tmp_path / "set", kind) + " --img-size 8 --in-chans 1 --hflip 0 --switch-split 0.25"
    for cache in ("device", "none"):
        data, args = load(options, "--cache", cache)
        assert data.sizes == {"train": 9, "switch": 3, "report": 9}
        seen = next(first_batches(data.train, args, batches_per_epoch=1))[0]
        values = {round((float(image.mean()) + 1) * 127.5) for image in seen}
        assert len(values) == 8 and values < set(range(0, 240, 20))
    missing = r"'label'; see --target-key|--class-cond: .* have no labels, or one class"
    with pytest.raises(InputError, match=LABELS[kind][2] if kind in LABELS else missing) as error:
        load(options, "--class-cond")
    assert "\n" not in str(error.value)


def test_labels_that_are_asked_for_must_be_there(tmp_path):
    options = unlabelled(tmp_path / "set", "no column") + " --img-size 8 --in-chans 1"
    with pytest.raises(InputError, match="has nothing in column 'kind'; see --target-key"):
        load(options, "--target-key kind")


def test_a_subset_smaller_than_the_classes_needs_none_of_them():
    assert load("--dataset digits --train-samples 5")[0].sizes["train"] == 5
    with pytest.raises(InputError, match="between 10 and 1200"):
        load("--dataset digits --train-samples 5 --class-cond")


def test_grid(tmp_path):
    images = torch.randint(0, 256, (70, 1, 8, 8), dtype=torch.uint8)
    save_grid(images, tmp_path / "samples.png")
    grid = np.asarray(Image.open(tmp_path / "samples.png"))
    assert grid.shape == (6 * 82, 6 * 82, 3)  # 8 x 8 of them, 2 px apart, six times as large
    assert np.array_equal(grid[12 : 12 + 48 : 6, 12 : 12 + 48 : 6, 0], images[0, 0].numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]
