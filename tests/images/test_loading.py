"""What is served, in which order and with which randomness: splits under a transform, and the loaders of a run."""

import random

import numpy as np
import pytest
import torch
from helpers import refused
from images.pictures import Pictures, evaluate, flat, options, process, same, serve, take

from w2s.engine.errors import InputError
from w2s.images.augmentation import classification_transform, device_transform, eval_transform
from w2s.images.datasets import open_dataset
from w2s.images.loading import ImageSplit

CPU = torch.device("cpu")
HEAVY = {"pad_crop": 4, "color_jitter": 0.4, "aa": "rand-m9-mstd0.5", "reprob": 0.5}  # draws of random, numpy and torch


def training_split(images, rows: np.ndarray, args, config: dict) -> ImageSplit:
    """Images as a run with these options trains on them."""
    return ImageSplit(
        images,
        rows,
        mode="RGB",
        transform=classification_transform(args, config),
        on_device=device_transform(args, config, CPU, training=True),
        seed=args.seed,
    )


def split_of(length: int = 40, seed: int = 3, alike: bool = False, rows: list[int] | None = None) -> ImageSplit:
    """Pictures under heavy augmentation."""
    rows = np.arange(length) if rows is None else np.asarray(rows)
    args, config = options(**HEAVY, seed=seed)
    return training_split(Pictures(length, alike=alike), rows, args, config)


def plain_split(length: int, config: dict) -> ImageSplit:
    """Pictures to evaluate on."""
    args, _ = options()
    on_device = device_transform(args, config, CPU)
    rows = np.arange(length)
    return ImageSplit(Pictures(length), rows, mode="RGB", transform=eval_transform(config), on_device=on_device)


def generator_states() -> tuple:
    numpy_state = np.random.get_state()
    return random.getstate(), numpy_state[1].tolist(), numpy_state[2:], torch.get_rng_state().tolist()


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_evaluation_loaders_of_all_processes_serve_each_image_once(world):
    args, config = options(validation_batch_size=3)
    loaders = [evaluate(plain_split(11, config), args, process(rank, world)) for rank in range(world)]
    served = [targets.tolist() for loader in loaders for _, targets in loader]
    assert sorted(flat(served)) == list(range(11))
    assert max(map(len, served)) <= 3


# --- the randomness of an image --------------------------------------------------------------------------------------


def test_the_augmentation_of_an_image_does_not_depend_on_its_batch():
    split = split_of()
    keys = [(2, position) for position in (5, 11, 0, 39)]
    together = split.__getitems__(keys)
    for key, (image, target) in zip(keys, together, strict=True):
        alone, own_target = split.__getitems__([key])[0]
        assert torch.equal(alone, image) and own_target == target
    assert all(torch.equal(a[0], b[0]) for a, b in zip(split.__getitems__(keys[::-1])[::-1], together, strict=True))


def test_the_augmentation_follows_the_image_not_its_place_among_the_training_images():
    few = split_of(rows=[30, 12])
    assert torch.equal(few.__getitems__([(1, 1)])[0][0], split_of().__getitems__([(1, 12)])[0][0])


@pytest.mark.parametrize("other", [{"seed": 4}, {"epoch": 1}, {"position": 9}])
def test_the_augmentation_differs_by_seed_epoch_and_image(other):
    def draw(seed: int = 3, epoch: int = 0, position: int = 8) -> torch.Tensor:
        return split_of(seed=seed, alike=True).__getitems__([(epoch, position)])[0][0]

    assert torch.equal(draw(), draw())
    assert not torch.equal(draw(**other), draw())


def test_the_callers_generators_neither_change_the_augmentation_nor_are_changed_by_it():
    split = split_of()
    first = split.__getitems__([(0, 1), (0, 2)])
    random.seed(11), np.random.seed(11), torch.manual_seed(11)
    before = generator_states()
    second = split.__getitems__([(0, 1), (0, 2)])
    assert generator_states() == before
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


def test_the_callers_generators_are_untouched_even_if_an_image_is_corrupt(tmp_path):
    _, split, _ = folder_split(tmp_path, broken=True)
    before = generator_states()
    with pytest.raises(InputError):
        split.__getitems__([(0, position) for position in range(4)])
    assert generator_states() == before


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("training", [True, False])
def test_serving_batches_leaves_the_callers_generators_alone(workers, training):
    args, config = options(**HEAVY, workers=workers)
    before = generator_states()
    if training:
        take(serve(split_of(), args, start=3), 7)
    else:
        list(evaluate(plain_split(9, config), args))
    assert generator_states() == before


def test_workers_change_no_pixel():
    args, _ = options(**HEAVY)
    alone = take(serve(split_of(), args), 12)
    args.workers = 2
    assert same(take(serve(split_of(), args), 12), alone)


@pytest.mark.parametrize(("workers", "start"), [(0, 3), (0, 5), (0, 8), (2, 8)])
def test_a_resumed_run_sees_exactly_the_batches_that_are_left(workers, start):
    args, _ = options(**HEAVY)
    whole = take(serve(split_of(), args), 12)
    args.workers = workers
    assert same(take(serve(split_of(), args, start=start), 12 - start), whole[start:])


def test_two_processes_see_the_same_pixels_as_one_with_double_the_batch():
    args, _ = options(**HEAVY, batch_size=8)
    whole = take(serve(split_of(), args), 7)
    args.batch_size = 4
    parts = [take(serve(split_of(), args, process(rank, 2)), 7) for rank in range(2)]
    joined = [tuple(torch.cat(pair) for pair in zip(*batch, strict=True)) for batch in zip(*parts, strict=True)]
    assert same(joined, whole)


def test_workers_hand_over_a_quarter_of_the_bytes_of_floats():
    pixels, _ = split_of().__getitems__([(0, 0)])[0]
    assert pixels.dtype == torch.uint8 and pixels.shape == (32, 32, 3) and pixels.is_contiguous()
    args, _ = options(**HEAVY)
    images, _ = next(serve(split_of(), args))
    assert images.dtype == torch.float32 and images.shape == (8, 3, 32, 32)


# --- random erasing, on the device -----------------------------------------------------------------------------------


def erased(split: ImageSplit, count: int = 5, **changes: object) -> torch.Tensor:
    """The images of the first batches of a run."""
    args, _ = options(**changes)
    return torch.cat([images for images, _ in take(serve(split, args), count)])


def still_split(reprob: float, seed: int = 0, **changes: object) -> ImageSplit:
    """Pictures without any augmentation but erasing."""
    still = {"pad_crop": 0, "hflip": 0.0, "color_jitter": 0.0}
    args, config = options(**still, reprob=reprob, seed=seed, **changes)
    return training_split(Pictures(40), np.arange(40), args, config)


@pytest.mark.parametrize("mode", ["const", "pixel", "rand"])
def test_as_many_images_are_erased_as_asked_in_rectangles(mode):
    whole, parts = erased(still_split(0.0)), erased(still_split(0.5, remode=mode))
    changed = (whole != parts).any(1)  # (N, H, W)
    assert 8 <= changed.flatten(1).any(1).sum() <= 32  # of 40; further off once in 30,000
    for mask in changed[changed.flatten(1).any(1)]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert inside.float().mean() > 0.95  # a pixel may have had this value before
        assert 0.01 * mask.numel() < inside.numel() < 0.4 * mask.numel()
    if mode == "const":
        assert (parts.permute(0, 2, 3, 1)[changed] == 0).all()
    if mode == "pixel":
        assert parts.permute(0, 2, 3, 1)[changed].std() == pytest.approx(1, abs=0.1)


def test_what_is_erased_differs_by_image_epoch_and_seed():
    first, other = erased(still_split(1.0), 10), erased(still_split(1.0, seed=1), 5, seed=1)
    whole = erased(still_split(0.0), 10)
    masks = {tuple((a != b).any(0).flatten().tolist()) for a, b in zip(first, whole, strict=True)}
    assert len(masks) > 70  # of 40 images in two epochs
    again = erased(still_split(0.0, seed=1), 5, seed=1)
    assert not masks & {tuple((a != b).any(0).flatten().tolist()) for a, b in zip(other, again, strict=True)}


@pytest.mark.parametrize("mode", ["pixel", "rand"])
def test_noise_is_drawn_alike_for_every_device_and_batch_size(mode):
    args, config = options(reprob=1.0, remode=mode)
    pixels, keys = torch.full((8, 16, 16, 3), 128, dtype=torch.uint8), [(0, position) for position in range(8)]
    on_cpu = device_transform(args, config, torch.device("cpu"), training=True)
    whole = on_cpu(pixels, keys)
    parts = [on_cpu(pixels[rows], keys[rows]) for rows in (slice(0, 3), slice(3, 8))]
    assert torch.equal(torch.cat(parts), whole)
    elsewhere = device_transform(args, config, torch.device("meta"), training=True)
    on_cpu.erasing = elsewhere.erasing  # with the noise of another device
    assert torch.equal(on_cpu(pixels, keys), whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["pixel", "rand"])
def test_a_cuda_device_erases_as_the_cpu_does(mode):
    args, config = options(reprob=1.0, remode=mode)
    pixels, keys = torch.full((8, 16, 16, 3), 128, dtype=torch.uint8), [(0, position) for position in range(8)]
    here, there = (device_transform(args, config, torch.device(d), training=True) for d in ("cpu", "cuda"))
    torch.testing.assert_close(there(pixels.cuda(), keys).cpu(), here(pixels, keys))


# --- corrupt images --------------------------------------------------------------------------------------------------


def folder_split(root, broken: bool = False):
    """A split of train/{a,b} with two PNGs each, the last one cut short if `broken`; (args, split, folder)."""
    for name in ("a", "b"):
        (root / "train" / name).mkdir(parents=True)
        for i in range(2):
            Pictures(4)[i][0].save(root / "train" / name / f"{name}{i}.png")
    if broken:
        path = root / "train" / "b" / "b1.png"
        path.write_bytes(path.read_bytes()[:200])
    args, config = options(data_dir=str(root), **HEAVY)
    dataset = open_dataset("", "train", data_dir=str(root), mode="RGB")
    return args, training_split(dataset, np.arange(4), args, config), root / "train"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [cut, lambda path: path.write_bytes(b""), lambda path: path.write_text("no image"), lambda path: path.unlink()],
    ids=["truncated", "empty", "text", "gone"],
)
def test_a_corrupt_image_is_named_and_not_replaced_by_another(tmp_path, damage):
    _, split, folder = folder_split(tmp_path)
    damage(folder / "b" / "b1.png")
    with refused(str(folder / "b" / "b1.png"), "row 3 of split 'train'"):
        split.__getitems__([(0, 3)])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_ends_a_loader_with_its_name(tmp_path, workers):
    args, split, _ = folder_split(tmp_path, broken=True)
    args.workers, args.batch_size = workers, 2
    with pytest.raises(InputError, match=r"b1\.png"):
        take(serve(split, args, batches_per_epoch=2), 2)
