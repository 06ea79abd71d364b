"""Images kept on a device: the pixels of the loader's path, its order, and augmentation of the same distribution."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from accelerate import PartialState
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch.utils.data import Dataset

from train_cls import build_parser, resolve
from w2s.engine.errors import InputError
from w2s.engine.loading import EpochBatches
from w2s.images.cache import CachedSplit, cache_split, resolve_cache
from w2s.images.data import load_data
from w2s.images.loading import ImageSplit, eval_loader, eval_transform, train_batches, train_transform

CPU = torch.device("cpu")


class Pictures(Dataset):
    """Real PIL images made from a seed, of another shape than the one they are trained in."""

    def __init__(self, length: int, size: tuple[int, int], channels: int = 3) -> None:
        shape = (length, *size, 3) if channels == 3 else (length, *size)
        self.pixels = np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), index


def options(**changes: object):
    """(args, data config) of the script at 16 px."""
    args = build_parser().parse_recipe(["--model", "resnet10t"])
    still = {
        "color_jitter": 0.0,
        "hflip": 0.5,
        "workers": 0,
        "batch_size": 8,
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2] * 3,
    }
    vars(args).update({"img_size": 16, **still, **changes})
    return args, resolve(args)


def both(length: int = 24, size: tuple[int, int] = (16, 16), training: bool = True, **changes: object):
    """The same images behind the loader's path and in the cache; (args, split, cached)."""
    args, config = options(**changes)
    mode = "RGB" if args.in_chans == 3 else "L"
    transform = train_transform(args, config) if training else eval_transform(config)
    split = ImageSplit(
        Pictures(length, size, args.in_chans), np.arange(length), transform, mode, 0 if training else None
    )
    return args, split, cache_split(split, args, config, CPU, training)


def process(rank: int = 0, world: int = 1) -> SimpleNamespace:
    """What the loaders ask of an accelerator."""
    return SimpleNamespace(process_index=rank, num_processes=world, device=CPU)


def first(batches, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and targets of the first batches, joined."""
    images, targets = zip(*(next(batches) for _ in range(count)), strict=True)
    return torch.cat(images), torch.cat(targets)


GREY = {"in_chans": 1, "mean": [0.3], "std": [0.25]}


@pytest.mark.parametrize("changes", [{}, GREY, {"train_interpolation": "nearest"}], ids=["rgb", "grey", "nearest"])
@pytest.mark.parametrize("size", [(16, 16), (20, 28)])
def test_without_augmentation_pixels_and_order_are_those_of_the_loader(changes, size):
    args, split, cached = both(size=size, no_aug=True, **changes)
    (mine, mine_of), (theirs, theirs_of) = (
        first(train_batches(part, args, process(), 0, 3), 6) for part in (cached, split)
    )
    assert torch.equal(mine_of, theirs_of) and torch.equal(mine, theirs)


@pytest.mark.parametrize("changes", [{}, GREY, {"crop_pct": 0.8}, {"interpolation": "nearest"}], ids=str)
@pytest.mark.parametrize("size", [(16, 16), (20, 28)])
def test_evaluation_pixels_are_those_of_the_loader(changes, size):
    args, split, cached = both(size=size, training=False, **changes)
    mine, theirs = (first(iter(eval_loader(part, args, process())), 3) for part in (cached, split))
    assert all(map(torch.equal, mine, theirs))


def test_evaluation_serves_each_image_once_over_all_processes():
    args, _, cached = both(length=23, training=False)
    served = [targets for rank in range(3) for _, targets in eval_loader(cached, args, process(rank, 3))]
    assert sorted(torch.cat(served).tolist()) == list(range(23))


def test_crops_and_flips_are_those_of_torchvision_at_the_drawn_places():
    args, split, cached = both(size=(16, 16), pad_crop=3, vflip=0.5)
    (images, targets), draws = first(train_batches(cached, args, process(), 0, 3), 3), cached._draws(0, 0)
    for image, index in zip(images, targets.tolist(), strict=True):
        (top, left), (vertical, horizontal) = draws["shift"][index].tolist(), draws["flip"][index].tolist()
        expected = TF.crop(TF.pad(split.source[index][0], 3), top, left, 16, 16)
        expected = TF.vflip(expected) if vertical else expected
        expected = TF.hflip(expected) if horizontal else expected
        assert torch.equal(image, TF.normalize(TF.to_tensor(expected), args.mean, args.std))


def test_places_and_flips_are_distributed_as_torchvisions():
    _, _, cached = both(length=4000, size=(16, 16), pad_crop=2, hflip=0.3, vflip=0.0)
    draws = cached._draws(0, 0)
    shifts = torch.bincount(draws["shift"][:, 0] * 5 + draws["shift"][:, 1], minlength=25)
    chi_square = ((shifts - 160) ** 2 / 160).sum()
    assert chi_square < 51  # 24 degrees of freedom, p = 0.001
    assert draws["flip"][:, 1].float().mean() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 4000))
    assert not draws["flip"][:, 0].any()
    assert not torch.equal(draws["shift"], cached._draws(0, 1)["shift"])  # another epoch
    assert not torch.equal(draws["shift"], cached._draws(1, 0)["shift"])  # another seed


def test_erased_rectangles_are_distributed_as_timms():
    count, side = 4000, 16
    _, _, cached = both(length=count, size=(side, side), pad_crop=0, reprob=0.4, remode="const")
    top, bottom, left, right = cached._boxes(torch.rand(count, 41, generator=torch.Generator().manual_seed(0))).T
    mine = torch.stack([bottom - top, right - left, top, left], 1)[(bottom - top) > 0].double()
    random.seed(0)
    erase = RandomErasing(0.4, mode="const", device="cpu")
    theirs = []
    for _ in range(count):
        rows, columns = (erase(torch.ones(1, side, side))[0] == 0).nonzero(as_tuple=True)
        if len(rows):
            size = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
            theirs.append([*map(int, size), int(rows.min()), int(columns.min())])
    theirs = torch.tensor(theirs).double()
    assert len(mine) == pytest.approx(len(theirs), abs=4 * math.sqrt(2 * count * 0.24))
    error = torch.sqrt(mine.var(0) / len(mine) + theirs.var(0) / len(theirs))
    assert ((mine.mean(0) - theirs.mean(0)).abs() < 4 * error).all()
    areas = [torch.sort(boxes[:, 0] * boxes[:, 1]).values for boxes in (mine, theirs)]
    at = torch.arange(1, side * side)
    gap = max(abs((areas[0] <= a).double().mean() - (areas[1] <= a).double().mean()) for a in at)
    assert gap < 1.95 * math.sqrt(1 / len(mine) + 1 / len(theirs))  # Kolmogorov-Smirnov, p = 0.001


@pytest.mark.parametrize("remode", ["const", "rand", "pixel"])
def test_what_is_erased_and_what_is_left(remode):
    args, split, cached = both(size=(16, 16), pad_crop=0, hflip=0.0, reprob=1.0, remode=remode)
    images, targets = first(train_batches(cached, args, process(), 0, 3), 3)
    boxes = cached._draws(0, 0)["boxes"]
    for image, index in zip(images, targets.tolist(), strict=True):
        top, bottom, left, right = boxes[index].tolist()
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        whole = TF.normalize(TF.to_tensor(split.source[index][0]), args.mean, args.std)
        assert inside.any() and torch.equal(image[:, ~inside], whole[:, ~inside])
        erased = image[:, inside]
        if remode == "const":
            assert not erased.any()
        elif remode == "rand":
            assert (erased == erased[:, :1]).all() and len(erased[:, 0].unique()) == 3
        else:
            assert len(erased.unique()) == erased.numel()


def test_neither_processes_nor_the_place_of_the_start_change_a_pixel():
    _, _, cached = both(length=40, pad_crop=2, reprob=0.5)
    whole = [next(batch) for batch in [cached.train_batches(8, 5, 3, 0)] for _ in range(10)]
    halves = [cached.train_batches(4, 5, 3, 0, rank, 2) for rank in range(2)]
    for images, targets in whole:
        parts = [next(half) for half in halves]
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), targets)
    images, targets = next(cached.train_batches(8, 5, 3, 7))
    assert torch.equal(images, whole[7][0]) and torch.equal(targets, whole[7][1])


def test_the_order_is_that_of_the_loaders_sampler():
    args, _, cached = both(length=40, pad_crop=2)
    sampler = iter(EpochBatches(40, 8, 5, args.seed))
    for _, targets in (next(b) for b in [train_batches(cached, args, process(), 0, 5)] for _ in range(10)):
        assert targets.tolist() == [position for _, position in next(sampler)]


def test_batches_come_in_the_memory_format_asked_for():
    for channels_last in (False, True):
        args, _, cached = both(pad_crop=2, reprob=0.5, channels_last=channels_last)
        images = next(train_batches(cached, args, process(), 0, 3))[0]
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
    args, config = options(**changes)
    assert resolve_cache(args, 100, config, PartialState()) == "none"
    args.cache = "device"
    with pytest.raises(InputError, match=word) as caught:
        resolve_cache(args, 100, config, PartialState())
    assert "--cache none" in str(caught.value)


def test_auto_takes_what_fits():
    args, config = options(pad_crop=2)
    assert resolve_cache(args, 100, config, PartialState()) == "device"
    assert resolve_cache(args, 10**12, config, PartialState()) == "none"
    args.cache = "none"
    assert resolve_cache(args, 100, config, PartialState()) == "none"


def test_the_choice_is_written_down_and_the_data_are_those_of_the_loader():
    args, config = options(dataset="digits", in_chans=1, mean=[0.5], std=[0.5], pad_crop=2)
    args.val_split = "test"
    data = load_data(args, config, None, PartialState())
    assert args.cache == "device" and all(isinstance(p, CachedSplit) for p in (data.train, data.switch, data.report))
    args.cache = "none"
    loaded = load_data(args, config, None, PartialState())
    mine, theirs = (torch.cat([t for _, t in eval_loader(d.switch, args, process())]) for d in (data, loaded))
    assert torch.equal(mine, theirs) and len(data.train) == len(loaded.train)


def test_a_corrupt_image_is_named(tmp_path):
    for split in ("train", "validation"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "train" / "b" / "1.png").write_bytes(b"no image")
    args, config = options(data_dir=str(tmp_path), pad_crop=2, switch_split="0")
    with pytest.raises(InputError, match=r"1\.png"):
        load_data(args, config, None, PartialState())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_serves_the_pixels_of_the_cpu():
    args, config = options(pad_crop=2, reprob=0.5, remode="const")
    split = ImageSplit(Pictures(24, (16, 16)), np.arange(24), None, "RGB", 0)
    here, there = (
        cache_split(split, args, config, torch.device(device), True).train_batches(8, 3, 0, 0)
        for device in ("cpu", "cuda")
    )
    for (images, targets), (other, other_targets) in zip((next(here) for _ in range(6)), there, strict=False):
        assert torch.equal(targets, other_targets.cpu())
        torch.testing.assert_close(images, other.cpu())
