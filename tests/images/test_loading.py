"""What is served, in which order, with which randomness: samplers, augmentation, transforms, streams of real shards."""

import functools
import io
import itertools
import json
import math
import random
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
import webdataset
from helpers import refused
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from train_cls import build_parser, resolve, validate
from w2s.engine.errors import InputError
from w2s.engine.loading import EpochBatches, EvalBatches, to_device
from w2s.engine.randomness import mix_seed
from w2s.images.data import load_data, open_dataset
from w2s.images.loading import ImageSplit, eval_loader, eval_transform, train_batches
from w2s.images.loading import train_transform as make_train_transform

HEAVY = {"pad_crop": 4, "color_jitter": 0.4, "aa": "rand-m9-mstd0.5", "reprob": 0.5}  # draws of random, numpy and torch
STILL = {"hflip": 0.0, "color_jitter": 0.0, "pad_crop": 0}


def process(rank: int = 0, world: int = 1) -> SimpleNamespace:
    """What the loaders ask of an accelerator."""
    return SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))


def options(**changes: object):
    """The script's own defaults for 32 px, values 0-1 unless asked otherwise; (args, data config)."""
    args = build_parser().parse_recipe(["--model", "resnet10t"])
    vars(args).update({"img_size": 32, "mean": [0.0] * 3, "std": [1.0] * 3, "workers": 0, "batch_size": 8, **changes})
    return args, resolve(args)


def train_transform(**changes: object):
    return make_train_transform(*options(**changes))


class Pictures(Dataset):
    """Real PIL images made from a seed; `alike` gives all rows the same pixels."""

    def __init__(self, length: int, size: tuple[int, int] = (32, 32), alike: bool = False) -> None:
        generator = np.random.default_rng(7)
        pixels = generator.integers(0, 256, (1 if alike else length, *size, 3), dtype=np.uint8)
        self.pixels = np.broadcast_to(pixels, (length, *size, 3))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), index


def split_of(length: int = 40, seed: int = 3, alike: bool = False, indices: list[int] | None = None) -> ImageSplit:
    indices = np.arange(length) if indices is None else np.asarray(indices)
    return ImageSplit(Pictures(length, alike=alike), indices, train_transform(**HEAVY), "RGB", seed)


def generator_states() -> tuple:
    numpy_state = np.random.get_state()
    return random.getstate(), numpy_state[1].tolist(), numpy_state[2:], torch.get_rng_state().tolist()


def take(batches, n: int) -> list:
    return list(itertools.islice(batches, n))


def flat(lists) -> list:
    return list(itertools.chain.from_iterable(lists))


def same(a: list, b: list) -> bool:
    """Whether two lists of (images, targets) are equal bit for bit."""
    pairs = zip(flat(a), flat(b), strict=True)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in pairs)


# --- the order of an epoch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_parts_of_all_processes_are_the_batch_of_one_process_that_is_as_large(world):
    together = take(EpochBatches(50, 4 * world, 4, seed=5), 10)
    parts = [take(EpochBatches(50, 4, 4, 5, rank, world), 10) for rank in range(world)]
    assert [flat(batch) for batch in zip(*parts, strict=True)] == together


@pytest.mark.parametrize("start", range(13))
def test_a_sampler_started_later_goes_on_where_the_uninterrupted_one_would_be(start):
    sampler = EpochBatches(23, 4, 5, seed=1)
    sampler.start = start
    assert take(sampler, 8) == take(EpochBatches(23, 4, 5, seed=1), start + 8)[start:]


def test_iterating_a_sampler_again_starts_at_the_same_point():
    sampler = EpochBatches(23, 4, 5, seed=1)
    sampler.start = 7
    assert take(sampler, 3) == take(sampler, 3)


@pytest.mark.parametrize(("length", "batch_size", "world"), [(24, 4, 1), (27, 4, 1), (29, 3, 2)])
def test_no_image_comes_twice_in_an_epoch_and_only_the_rest_is_dropped(length, batch_size, world):
    batches = length // (batch_size * world)
    parts = [take(EpochBatches(length, batch_size, batches, 0, rank, world), 3 * batches) for rank in range(world)]
    for epoch in range(3):
        keys = [key for part in parts for batch in part[epoch * batches : (epoch + 1) * batches] for key in batch]
        assert {e for e, _ in keys} == {epoch}
        positions = [position for _, position in keys]
        assert len(set(positions)) == len(positions) == batches * batch_size * world
        assert set(positions) <= set(range(length))


def test_what_is_dropped_changes_from_epoch_to_epoch():
    batches = take(EpochBatches(10, 4, 2, seed=0), 20)
    epochs = [{position for batch in batches[2 * e : 2 * e + 2] for _, position in batch} for e in range(10)]
    assert set.union(*epochs) == set(range(10))


def test_the_order_differs_from_epoch_to_epoch():
    batches = take(EpochBatches(64, 64, 1, seed=0), 3)
    orders = {tuple(position for _, position in batch) for batch in batches}
    assert len(orders) == 3


def test_the_order_differs_from_seed_to_seed():
    assert take(EpochBatches(64, 64, 1, seed=0), 1) != take(EpochBatches(64, 64, 1, seed=1), 1)


def test_the_order_is_the_same_whatever_the_global_generator_holds():
    torch.manual_seed(1)
    first = take(EpochBatches(64, 16, 4, seed=0), 6)
    torch.manual_seed(2)
    assert take(EpochBatches(64, 16, 4, seed=0), 6) == first


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 10, 11, 24])
def test_an_evaluation_covers_each_image_exactly_once_over_all_processes(length, world):
    samplers = [EvalBatches(length, 4, rank, world) for rank in range(world)]
    keys = [position for sampler in samplers for batch in sampler for _, position in batch]
    assert sorted(keys) == list(range(length))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_evaluation_loaders_of_all_processes_serve_each_image_once(world):
    args, config = options(validation_batch_size=3)
    split = ImageSplit(Pictures(11), np.arange(11), eval_transform(config), "RGB")
    loaders = [eval_loader(split, args, process(rank, world)) for rank in range(world)]
    served = [targets.tolist() for loader in loaders for _, targets in loader]
    assert sorted(flat(served)) == list(range(11))
    assert max(map(len, served)) <= 3


def test_seeds_of_neighbouring_keys_are_all_different_and_fit_the_generators():
    seeds = {mix_seed(*key) for key in itertools.product(range(-2, 10), range(10), range(10))}
    assert len(seeds) == 1200
    assert all(0 <= seed < 2**63 for seed in seeds)


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
    few = split_of(indices=[30, 12])
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
    args, config, _ = picture_folder(tmp_path, broken=True)
    split = ImageSplit(open_dataset(args, "train"), np.arange(4), make_train_transform(args, config), "RGB", 0)
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
        take(train_batches(split_of(), args, process(), 3, 5), 7)
    else:
        list(eval_loader(ImageSplit(Pictures(9), np.arange(9), eval_transform(config), "RGB"), args, process()))
    assert generator_states() == before


def test_workers_change_no_pixel():
    args, _ = options(**HEAVY)
    alone = take(train_batches(split_of(), args, process(), 0, 5), 12)
    args.workers = 2
    assert same(take(train_batches(split_of(), args, process(), 0, 5), 12), alone)


@pytest.mark.parametrize(("workers", "start"), [(0, 3), (0, 5), (0, 8), (2, 8)])
def test_a_resumed_run_sees_exactly_the_batches_that_are_left(workers, start):
    args, _ = options(**HEAVY)
    whole = take(train_batches(split_of(), args, process(), 0, 5), 12)
    args.workers = workers
    assert same(take(train_batches(split_of(), args, process(), start, 5), 12 - start), whole[start:])


def test_two_processes_see_the_same_pixels_as_one_with_double_the_batch():
    args, _ = options(**HEAVY, batch_size=8)
    whole = take(train_batches(split_of(), args, process(), 0, 5), 7)
    args.batch_size = 4
    parts = [take(train_batches(split_of(), args, process(rank, 2), 0, 5), 7) for rank in range(2)]
    joined = [tuple(torch.cat(pair) for pair in zip(*batch, strict=True)) for batch in zip(*parts, strict=True)]
    assert same(joined, whole)


def test_an_image_kept_in_memory_is_served_like_one_that_is_read():
    transform, source = train_transform(**HEAVY), Pictures(6)
    kept = {i: (source.pixels[i], i) for i in range(6)}
    read = ImageSplit(source, np.arange(6), transform, "RGB", 0)
    held = ImageSplit(source, np.arange(6), transform, "RGB", 0, kept)
    keys = [(1, position) for position in range(6)]
    for (a, t), (b, u) in zip(read.__getitems__(keys), held.__getitems__(keys), strict=True):
        assert torch.equal(a, b) and t == u


# --- transforms ------------------------------------------------------------------------------------------------------


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize(
    "changes",
    [{"no_aug": True}, {"no_aug": True, "pad_crop": 4, "hflip": 1.0, "aa": "rand-m9", "reprob": 1.0}, STILL],
    ids=["no-aug", "no-aug beside others", "a crop without padding"],
)
def test_without_randomness_the_pixels_are_those_of_the_image(changes):
    image = Pictures(1)[0][0]
    assert torch.equal(train_transform(**changes)(image), pixels_of(image))


def test_no_aug_on_the_command_line_takes_the_augmentation_away():
    args = build_parser().parse_recipe(["--model", "resnet10t", "--no-aug", "--img-size", "32"])
    image = Pictures(1)[0][0]
    transform = make_train_transform(args, {**resolve(args), "mean": [0.0] * 3, "std": [1.0] * 3})
    assert torch.equal(transform(image), pixels_of(image))


def test_pixels_are_normalised_by_the_mean_and_std_of_the_run():
    mean, std = [0.5, 0.4, 0.3], [0.1, 0.2, 0.5]
    image = Pictures(1)[0][0]
    expected = (pixels_of(image) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(train_transform(**STILL, mean=mean, std=std)(image), expected)
    torch.testing.assert_close(eval_transform(options(mean=mean, std=std)[1])(image), expected)


def test_pad_crop_cuts_a_window_of_the_image_padded_with_black():
    image, transform = Pictures(1)[0][0], train_transform(**STILL | {"pad_crop": 3})
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
    transform, image = train_transform(hflip=hflip, color_jitter=0.0, **crop), Pictures(1)[0][0]
    straight, mirrored = pixels_of(image), pixels_of(image).flip(-1)
    seen = set()
    for _ in range(40):
        drawn = transform(image)
        assert torch.equal(drawn, straight) or torch.equal(drawn, mirrored)
        seen.add(torch.equal(drawn, mirrored))
    assert seen == expected


def test_vflip_turns_the_image_upside_down():
    image = Pictures(1)[0][0]
    assert torch.equal(train_transform(**STILL, vflip=1.0)(image), pixels_of(image).flip(-2))


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (50, 40), (40, 90)])
@pytest.mark.parametrize("changes", [{"no_aug": True}, {"pad_crop": 4}, {}], ids=["no-aug", "pad-crop", "timm's crop"])
def test_images_of_any_size_come_out_at_the_size_of_the_run(size, changes):
    image = Pictures(1, size)[0][0]
    assert train_transform(**changes)(image).shape == (3, 32, 32)
    assert eval_transform(options()[1])(image).shape == (3, 32, 32)


def test_grey_images_stay_one_channel():
    image = Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32))
    transform = train_transform(in_chans=1, mean=[0.0], std=[1.0], **STILL)
    assert torch.equal(transform(image)[0] * 255, torch.arange(1024).remainder(256).view(32, 32).float())


def test_the_evaluation_transform_has_no_randomness():
    image, transform = Pictures(1, (50, 40))[0][0], eval_transform(options(hflip=1.0, aa="rand-m9")[1])
    assert torch.equal(transform(image), transform(image))


# --- corrupt images --------------------------------------------------------------------------------------------------


def picture_folder(root, broken: bool = False):
    """train/{a,b} with two PNGs each, one of them cut short if `broken`; (args, data config, folder)."""
    for name in ("a", "b"):
        (root / "train" / name).mkdir(parents=True)
        for i in range(2):
            Pictures(4)[i][0].save(root / "train" / name / f"{name}{i}.png")
    if broken:
        path = root / "train" / "b" / "b1.png"
        path.write_bytes(path.read_bytes()[:200])
    args, config = options(data_dir=str(root), **HEAVY)
    return args, config, root / "train"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [cut, lambda path: path.write_bytes(b""), lambda path: path.write_text("no image"), lambda path: path.unlink()],
    ids=["truncated", "empty", "text", "gone"],
)
def test_a_corrupt_image_is_named_and_not_replaced_by_another(tmp_path, damage):
    args, config, folder = picture_folder(tmp_path)
    split = ImageSplit(open_dataset(args, "train"), np.arange(4), make_train_transform(args, config), "RGB", 0)
    damage(folder / "b" / "b1.png")
    with refused(str(folder / "b" / "b1.png"), "row 3 of split 'train'"):
        split.__getitems__([(0, 3)])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_ends_a_loader_with_its_name(tmp_path, workers):
    args, config, _ = picture_folder(tmp_path, broken=True)
    args.workers, args.batch_size = workers, 2
    split = ImageSplit(open_dataset(args, "train"), np.arange(4), make_train_transform(args, config), "RGB", 0)
    with pytest.raises(InputError, match=r"b1\.png"):
        take(train_batches(split, args, process(), 0, 2), 2)


def test_a_batch_sampler_of_keys_works_with_torchs_own_loader():
    loader = DataLoader(split_of(8), batch_sampler=EvalBatches(8, 3))
    assert [targets.tolist() for _, targets in loader] == [[0, 1, 2], [3, 4, 5], [6, 7]]


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """train: 4 shards of 12, val: 3 of 7, held: 1 of 6; an image's pixels are its number, its class that mod 3."""
    folder, number, info = tmp_path_factory.mktemp("shards"), 0, {"splits": {}}
    for split, count, length in (("train", 4, 12), ("val", 3, 7), ("held", 1, 6)):
        names = [f"{split}-{shard:04d}.tar" for shard in range(count)]
        for name in names:
            with webdataset.TarWriter(str(folder / name)) as writer:
                for _ in range(length):
                    file = io.BytesIO()
                    Image.fromarray(np.full((32, 32, 3), number, np.uint8)).save(file, "png")
                    writer.write({"__key__": f"{number:04d}", "png": file.getvalue(), "cls": number % 3})
                    number += 1
        lengths = {"num_samples": count * length, "filenames": names, "shard_lengths": [length] * count}
        info["splits"][split] = {"name": split, **lengths}
    (folder / "_info.json").write_text(json.dumps(info))
    return folder


def stream(folder, **changes: object):
    """(args, data) of the shards, without augmentation unless asked otherwise."""
    given = {"dataset": "wds/", "data_dir": str(folder), "train_split": "train", "val_split": "val", "num_classes": 3}
    args, config = options(**given | {"no_aug": True} | changes)
    return args, load_data(args, config, args.num_classes, process())


def numbers(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


@functools.cache
def streamed(folder, start: int, count: int, workers: int, **changes: object) -> list:
    """`count` batches of a new run from batch `start` on, 6 an epoch, with the generators seeded as the script does."""
    args, data = stream(folder, workers=workers, **changes)
    batches, taken = train_batches(data.train, args, process(), start, 6), []
    for update in range(start, start + count):
        random.seed(update), np.random.seed(update), torch.manual_seed(update)
        taken.append(next(batches))
    return taken


def test_a_stream_knows_its_sizes(shards):
    _, data = stream(shards)
    assert data.sizes == {"train": 48, "switch": 0, "report": 21}
    assert data.samples == 48 and data.switch is None and data.num_classes == 3


def test_an_epoch_of_a_stream_is_as_long_as_its_split_also_if_the_batch_size_does_not_divide_it(shards):
    assert stream(shards, batch_size=7)[1].samples == 48


def test_a_stream_may_be_named_by_its_shards_and_their_length(shards):
    _, data = stream(shards, train_split="train-{0000..0001}.tar|24", val_split="val-0000.tar|7")
    assert data.sizes == {"train": 24, "switch": 0, "report": 7}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_serves_every_image_once_an_epoch(shards, workers):
    batches = streamed(shards, 0, 12, workers)
    for epoch in (batches[:6], batches[6:]):
        assert sorted(flat(numbers(images) for images, _ in epoch)) == list(range(48))
    assert all([n % 3 for n in numbers(images)] == targets.tolist() for images, targets in batches)


def test_the_order_of_a_stream_differs_from_epoch_to_epoch_and_from_seed_to_seed(shards):
    first, other = ([numbers(images) for images, _ in streamed(shards, 0, 12, 1, seed=seed)] for seed in (0, 1))
    assert len({str(batches) for batches in (first[:6], first[6:], other[:6], other[6:])}) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_the_same_batches_again_for_the_same_seed(shards, workers):
    again = streamed.__wrapped__(shards, 0, 12, workers)
    assert same(again, streamed(shards, 0, 12, workers))


@pytest.mark.parametrize(("workers", "start"), [(0, 2), (0, 6), (0, 8), (1, 2), (1, 8)])
def test_a_resumed_stream_gives_exactly_the_batches_that_are_left(shards, workers, start):
    assert same(streamed(shards, start, 12 - start, workers), streamed(shards, 0, 12, workers)[start:])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_resumed_within_an_epoch_augments_as_the_uninterrupted_one(shards, workers):
    whole, resumed = (streamed(shards, start, 5 - start, workers, no_aug=False, pad_crop=4) for start in (0, 2))
    assert same(resumed, whole[2:])


def test_a_stream_with_more_workers_than_shards_is_refused(shards):
    """Some workers would have nothing to read, and an epoch would end early."""
    with refused("train-{0000..0001}.tar", "2 shards", "3 loader workers"):
        stream(shards, train_split="train-{0000..0001}.tar|24", workers=3)


def test_a_stream_whose_shards_are_gone_is_refused(shards):
    args, data = stream(shards, train_split="gone-{0000..0001}.tar|12")
    with refused("gone-{0000..0001}.tar"):
        take(train_batches(data.train, args, process(), 0, 1), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_of_a_stream_counts_every_image_once_each_time(shards, workers):
    args, data = stream(shards, workers=workers)
    for _ in range(2):
        served = [numbers(images) for images, _ in eval_loader(data.report, args, process())]
        assert sorted(flat(served)) == list(range(48, 69))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_length_of_a_streamed_split_is_that_of_its_images_whatever_the_workers(shards, workers):
    args, data = stream(shards, workers=workers)
    eval_loader(data.report, args, process())
    assert data.report.total == data.sizes["report"] == 21


@pytest.mark.parametrize("workers", [0, 2])
def test_the_script_accepts_its_count_of_a_streamed_split_whatever_the_workers(shards, workers):
    args, data = stream(shards, workers=workers)
    accelerator = accelerate.Accelerator(cpu=True)
    metrics = validate(lambda images: torch.zeros(len(images), 3), data.report, args, accelerator)
    assert metrics["eval_loss"] == pytest.approx(math.log(3))


def test_a_share_as_switch_split_of_a_stream_is_refused(shards):
    with refused("--switch-split", "held-out shards"):
        stream(shards, teacher="somewhere", switch_split="0.1")


def test_held_out_shards_are_the_switch_split_of_a_stream(shards):
    args, data = stream(shards, teacher="somewhere", switch_split="held")
    assert data.sizes["switch"] == 6
    served = [numbers(images) for images, _ in eval_loader(data.switch, args, process())]
    assert sorted(flat(served)) == list(range(69, 75))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": None}, ("--num-classes",)),
        ({"train_samples": 10}, ("--train-samples",)),
        ({"train_split": "train-{0000..0001}.tar"}, ("train-{0000..0001}.tar",)),  # no length
        ({"val_split": "val-{0000..0002}.tar"}, ("val-{0000..0002}.tar",)),  # no length
        ({"val_split": "nothing"}, ("nothing",)),
        ({"teacher": "somewhere", "switch_split": "nothing"}, ("nothing",)),
    ],
    ids=["no classes", "a subset", "no length", "no length to report on", "no such split", "no such switch split"],
)
def test_a_stream_that_cannot_be_used_is_refused(shards, changes, words):
    with refused(*words):
        stream(shards, **changes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_copied_beside_the_work_on_a_gpu_are_the_same():
    device, busy = torch.device("cuda"), torch.ones(2048, 2048, device="cuda")
    batches = [([torch.full((1 << 20,), k, dtype=torch.float32).pin_memory()], {"row": k}) for k in range(16)]
    sums = []
    for row, (images, target) in enumerate(to_device(batches, device)):
        busy = busy @ busy / 2048  # ones: work of an update, still going when the next copy starts
        sums.append(images[0].sum() * busy[0, 0])
        assert target["row"] == row
    assert torch.stack(sums).tolist() == [k * (1 << 20) for k in range(16)]
