"""Images kept on a device: the pixels of the loader's path, its order, and augmentation of the same distribution."""

import math
import os
import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
import torchvision.transforms.functional as TF
from accelerate import PartialState
from helpers import on_processes
from images import pictures
from images.pictures import Pictures, evaluate, process, serve
from PIL import Image
from torch.utils.data import Dataset

from w2s.engine.errors import InputError
from w2s.engine.loading import EpochBatches
from w2s.images.augmentation import (
    cache_obstacle,
    cached_crop_and_flip,
    cached_transform,
    classification_transform,
    device_transform,
    eval_transform,
)
from w2s.images.cache import CachedSplit, _shared_arrays, cache_device, cache_split, resolve_cache
from w2s.images.data import load_data
from w2s.images.datasets import image_mode
from w2s.images.loading import ImageSplit


def options(**changes: object):
    """(args, data config) of the script at 16 px."""
    still = {"img_size": 16, "color_jitter": 0.0, "hflip": 0.5, "mean": [0.4, 0.5, 0.6], "std": [0.2] * 3}
    return pictures.options(**still | changes)


def both(length: int = 24, size: tuple[int, int] = (16, 16), training: bool = True, **changes: object):
    """The same images behind the loader's path and in the cache; (args, split, cached)."""
    args, config = options(**changes)
    images, rows, mode = Pictures(length, size, args.in_chans), np.arange(length), image_mode(args.in_chans)
    if training:
        transform, seed = classification_transform(args, config), args.seed
    else:
        transform, seed = eval_transform(config), None
    on_device = device_transform(args, config, torch.device("cpu"), training=training)
    split = ImageSplit(images, rows, mode=mode, transform=transform, on_device=on_device, seed=seed)
    return args, split, cached(images, args, config, training=training)


def cached(images: Dataset, args, config: dict, training: bool = True, device: str = "cpu") -> CachedSplit:
    """All images as a run with these options keeps them."""
    device = torch.device(device)
    return cache_split(
        images,
        np.arange(len(images)),
        mode=image_mode(args.in_chans),
        transform=cached_transform(args, config) if training else eval_transform(config),
        on_device=device_transform(args, config, device, training=training),
        input_size=config["input_size"],
        device=device,
        **(cached_crop_and_flip(args) if training else {}),
    )


def resolved(images: int, **changes: object) -> str:
    """What --cache means for so many training images."""
    args, config = options(**changes)
    return resolve_cache(
        args.cache,
        obstacle=cache_obstacle(args),
        images=images,
        input_size=config["input_size"],
        pad=args.pad_crop or 0,
        accelerator=PartialState(),
    )


def first(batches, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and targets of the first batches, joined."""
    images, targets = zip(*(next(batches) for _ in range(count)), strict=True)
    return torch.cat(images), torch.cat(targets)


# (x / 255 - mean) / std in float32, where another way through the batch may round the last bit another way
ROUNDING = {"atol": 1e-6, "rtol": 1e-6}
GREY = {"in_chans": 1, "mean": [0.3], "std": [0.25]}


@pytest.mark.parametrize("changes", [{}, GREY, {"train_interpolation": "nearest"}], ids=["rgb", "grey", "nearest"])
@pytest.mark.parametrize("size", [(16, 16), (20, 28)])
def test_without_augmentation_pixels_and_order_are_those_of_the_loader(changes, size):
    args, split, kept = both(size=size, no_aug=True, **changes)
    images, targets = first(serve(kept, args, batches_per_epoch=3), 6)
    expected, expected_targets = first(serve(split, args, batches_per_epoch=3), 6)
    assert torch.equal(targets, expected_targets)
    torch.testing.assert_close(images, expected, **ROUNDING)


@pytest.mark.parametrize("changes", [{}, GREY, {"crop_pct": 0.8}, {"interpolation": "nearest"}], ids=str)
@pytest.mark.parametrize("size", [(16, 16), (20, 28)])
def test_evaluation_pixels_are_those_of_the_loader(changes, size):
    args, split, kept = both(size=size, training=False, **changes)
    images, targets = first(iter(evaluate(kept, args)), 3)
    expected, expected_targets = first(iter(evaluate(split, args)), 3)
    assert torch.equal(targets, expected_targets)
    torch.testing.assert_close(images, expected, **ROUNDING)


def test_evaluation_serves_each_image_once_over_all_processes():
    args, _, kept = both(length=23, training=False)
    served = [targets for rank in range(3) for _, targets in evaluate(kept, args, process(rank, 3))]
    assert sorted(torch.cat(served).tolist()) == list(range(23))


def test_crops_and_flips_are_those_of_torchvision_at_the_drawn_places():
    args, split, kept = both(size=(16, 16), pad_crop=3, vflip=0.5)
    images, targets = first(serve(kept, args, batches_per_epoch=3), 3)
    shifts, flips = kept._draw_augmentation(0, 0)
    for image, index in zip(images, targets.tolist(), strict=True):
        (top, left), (vertical, horizontal) = shifts[index].tolist(), flips[index].tolist()
        expected = TF.crop(TF.pad(split.dataset[index][0], 3), top, left, 16, 16)
        expected = TF.vflip(expected) if vertical else expected
        expected = TF.hflip(expected) if horizontal else expected
        torch.testing.assert_close(image, TF.normalize(TF.to_tensor(expected), args.mean, args.std), **ROUNDING)


def test_places_and_flips_are_distributed_as_torchvisions():
    _, _, kept = both(length=4000, size=(16, 16), pad_crop=2, hflip=0.3, vflip=0.0)
    shifts, flips = kept._draw_augmentation(0, 0)
    counts = torch.bincount(shifts[:, 0] * 5 + shifts[:, 1], minlength=25)
    chi_square = ((counts - 160) ** 2 / 160).sum()
    assert chi_square < 51  # 24 degrees of freedom, p = 0.001
    assert flips[:, 1].float().mean() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 4000))
    assert not flips[:, 0].any()
    assert not torch.equal(shifts, kept._draw_augmentation(0, 1)[0])  # another epoch
    assert not torch.equal(shifts, kept._draw_augmentation(1, 0)[0])  # another seed


def test_neither_processes_nor_the_place_of_the_start_change_a_pixel():
    _, _, kept = both(length=40, pad_crop=2)
    run = {"batches_per_epoch": 5, "seed": 3}
    batches = kept.train_batches(batch_size=8, start=0, **run)
    whole = [next(batches) for _ in range(10)]
    halves = [kept.train_batches(batch_size=4, start=0, rank=rank, world=2, **run) for rank in range(2)]
    for images, targets in whole:
        parts = [next(half) for half in halves]
        torch.testing.assert_close(torch.cat([part[0] for part in parts]), images, **ROUNDING)
        assert torch.equal(torch.cat([part[1] for part in parts]), targets)
    images, targets = next(kept.train_batches(batch_size=8, start=7, **run))
    assert torch.equal(images, whole[7][0]) and torch.equal(targets, whole[7][1])


def test_the_order_is_that_of_the_loaders_sampler():
    args, _, kept = both(length=40, pad_crop=2)
    sampler = iter(EpochBatches(40, 8, 5, seed=args.seed))
    batches = serve(kept, args)
    for _ in range(10):
        _, targets = next(batches)
        assert targets.tolist() == [position for _, position in next(sampler)]


def test_batches_come_in_the_memory_format_asked_for():
    for channels_last in (False, True):
        args, _, kept = both(pad_crop=2, channels_last=channels_last)
        images = next(serve(kept, args))[0]
        wanted = torch.channels_last if channels_last else torch.contiguous_format
        assert images.is_contiguous(memory_format=wanted)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "random resized"),
        ({"pad_crop": 2, "aa": "rand-m9"}, "--aa"),
        ({"pad_crop": 2, "color_jitter": 0.4}, "jitter"),
    ],
    ids=["rrc", "aa", "jitter"],
)
def test_what_it_cannot_do_is_refused_and_left_to_the_loader_by_auto(changes, word):
    assert resolved(100, **changes) == "none"
    with pytest.raises(InputError, match=word) as caught:
        resolved(100, cache="device", **changes)
    assert "--cache none" in str(caught.value)


def test_auto_takes_what_fits():
    assert resolved(100, pad_crop=2) == "device"
    assert resolved(10**12, pad_crop=2) == "none"
    assert resolved(100, pad_crop=2, cache="none") == "none"


def test_the_images_are_kept_where_the_choice_says():
    accelerator = SimpleNamespace(device=torch.device("cuda"))
    devices = [cache_device(cache, accelerator) for cache in ("device", "cpu", "none")]
    assert devices == [torch.device("cuda"), torch.device("cpu"), None]


def test_the_choice_is_written_down_and_the_data_are_those_of_the_loader():
    args, config = options(dataset="digits", in_chans=1, mean=[0.5], std=[0.5], pad_crop=2)
    args.val_split = "test"
    data = load_data(args, config, PartialState(), cache="auto")
    assert data.cache == "device" and all(isinstance(p, CachedSplit) for p in (data.train, data.switch, data.report))
    loaded = load_data(args, config, PartialState(), cache="none")
    targets, expected = (torch.cat([t for _, t in evaluate(part.switch, args)]) for part in (data, loaded))
    assert torch.equal(targets, expected) and len(data.train) == len(loaded.train)


def test_a_corrupt_image_is_named(tmp_path):
    for split in ("train", "validation"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "train" / "b" / "1.png").write_bytes(b"no image")
    args, config = options(data_dir=str(tmp_path), pad_crop=2, switch_split="0")
    with pytest.raises(InputError, match=r"1\.png"):
        load_data(args, config, PartialState(), cache="auto")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_serves_the_pixels_of_the_cpu():
    args, config = options(pad_crop=2)
    run = {"batch_size": 8, "batches_per_epoch": 3, "seed": 0, "start": 0}
    here, there = (cached(Pictures(24, (16, 16)), args, config, device=d).train_batches(**run) for d in ("cpu", "cuda"))
    for _ in range(6):
        (images, targets), (other, other_targets) = next(here), next(there)
        assert torch.equal(targets, other_targets.cpu())
        torch.testing.assert_close(images, other.cpu())


# --- the processes of a machine --------------------------------------------------------------------------------------


class Counted(Pictures):
    """Pictures that know which of them were read in this process."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.read: list[int] = []

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        self.read.append(row)
        return super().__getitem__(row)


def kept_by_one_of_several(accelerator, length: int) -> tuple[list[int], np.ndarray, np.ndarray, list[str]]:
    args, config = options(pad_crop=2)
    images = Counted(length, (16, 16))
    kept = cached(images, args, config)
    leftover = [path.name for path in Path(tempfile.gettempdir()).glob("w2s-*")]
    return sorted(set(images.read)), kept.images.numpy(), kept.targets.numpy(), leftover


def test_each_image_is_decoded_once_on_a_machine_and_all_processes_have_it():
    args, config = options(pad_crop=2)
    alone = cached(Pictures(23, (16, 16)), args, config)
    (read, images, targets, leftover), (others_read, *others) = on_processes(2, kept_by_one_of_several, 23)
    assert read == list(range(0, 23, 2)) and others_read == list(range(1, 23, 2))
    assert leftover == [] and others[2] == []
    for found in (images, others[0]):
        assert np.array_equal(found, alone.images)
    for found in (targets, others[1]):
        assert np.array_equal(found, alone.targets)


def kept_on_one_of_two_machines(accelerator) -> bool:
    """Whether processes 0 and 1, which are on one machine, and 2 and 3 on another keep what is theirs."""
    machine = accelerator.process_index // 2
    with mock.patch.object(socket, "gethostname", lambda: f"machine{machine}"):
        images, _ = _shared_arrays((4, 2, 2, 1), accelerator.process_index % 2, 2)
        images[accelerator.process_index % 2] = 1 + machine
    accelerator.wait_for_everyone()
    return bool((images[:2] == 1 + machine).all())


def test_machines_that_share_the_folder_for_temporary_files_do_not_share_the_images():
    assert on_processes(4, kept_on_one_of_two_machines) == [True] * 4


def test_where_room_cannot_be_reserved_the_images_are_kept_all_the_same(monkeypatch):
    """As on macOS."""
    monkeypatch.delattr(os, "posix_fallocate")
    images, targets = _shared_arrays((4, 2, 2, 3), 0, 2)
    assert images.shape == (4, 2, 2, 3) and not images.any() and len(targets) == 4


def test_on_a_gpu_auto_counts_the_memory_of_the_host_too(monkeypatch):
    """The images pass through it."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 2**30, 80 * 2**30))
    _, config = options(pad_crop=2)

    def choice(available: int) -> str:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
        return resolve_cache(
            "auto",
            obstacle=None,
            images=1000,
            input_size=config["input_size"],
            pad=2,
            accelerator=SimpleNamespace(device=torch.device("cuda")),
        )

    size = 1000 * 3 * 20 * 20
    assert choice(4 * size) == "device"
    assert choice(4 * size - 4) == "none"
