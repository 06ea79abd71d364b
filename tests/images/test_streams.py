"""Streams of real shards: their sizes, their order, resumed within an epoch, evaluated once; and their refusals."""

import functools
import io
import json
import math
import random
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
import webdataset
from helpers import on_processes, refused
from images.pictures import evaluate, flat, options, process, same, serve, take
from PIL import Image

from train_cls import validate
from w2s.engine.stopping import Stopping
from w2s.images.data import load_data
from w2s.images.loading import eval_loader, train_batches


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
    return args, load_data(args, config, process(), cache="auto")


def numbers(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


@functools.cache
def streamed(folder, start: int, count: int, workers: int, **changes: object) -> list:
    """`count` batches of a new run from batch `start` on, 6 an epoch, with the generators seeded as the script does."""
    args, data = stream(folder, workers=workers, **changes)
    batches, taken = serve(data.train, args, start=start, batches_per_epoch=6), []
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


def read_by_process(accelerator, folder, start: int) -> list[list[int]]:
    """The batches that one process reads of an epoch of 4, from batch `start` on."""
    given = {"dataset": "wds/", "data_dir": str(folder), "train_split": "train", "val_split": "val", "num_classes": 3}
    args, config = options(**given, no_aug=True, workers=2, batch_size=6)
    train = load_data(args, config, accelerator, cache="auto").train
    batches = train_batches(
        train, accelerator, batch_size=6, batches_per_epoch=4, start=start, seed=args.seed, workers=args.workers
    )
    return [numbers(images) for images, _ in take(batches, 4 - start)]


def test_processes_share_out_the_shards_of_a_stream_and_resume_with_what_is_left_of_theirs(shards):
    """Two processes of two workers each: each of the four shards of 12 has one reader."""
    one, other = on_processes(2, read_by_process, shards, 0)
    assert sorted(flat(one) + flat(other)) == list(range(48))
    assert on_processes(2, read_by_process, shards, 1) == [one[1:], other[1:]]


def erased_places(batches: list) -> list[torch.Tensor]:
    """Which pixels of each image were erased; the others of an image are all alike."""
    images = torch.cat([images for images, _ in batches])[:, 0]
    return [image != image.median() for image in images]


def test_what_is_erased_in_a_stream_does_not_depend_on_the_processes(shards):
    """Two processes with half the batch erase at the places of an update where one erases with the whole of it."""
    erasing = {"no_aug": False, "pad_crop": 0, "hflip": 0.0, "color_jitter": 0.0, "reprob": 1.0, "remode": "pixel"}
    args, data = stream(shards, batch_size=8, **erasing)
    whole = erased_places(take(serve(data.train, args, batches_per_epoch=6), 2))
    parts = []
    for rank in range(2):
        args, data = stream(shards, batch_size=4, **erasing)
        parts.append(erased_places(take(serve(data.train, args, process(rank, 2), batches_per_epoch=6), 2)))
    assert any(mask.any() for mask in whole)
    of_two = [*parts[0][:4], *parts[1][:4], *parts[0][4:], *parts[1][4:]]
    assert all(torch.equal(one, two) for one, two in zip(whole, of_two, strict=True))


def test_a_stream_with_more_workers_than_shards_is_refused(shards):
    """Some workers would have nothing to read, and an epoch would end early."""
    with refused("train-{0000..0001}.tar", "2 shards", "3 loader workers"):
        stream(shards, train_split="train-{0000..0001}.tar|24", workers=3)


def test_a_stream_whose_shards_are_gone_is_refused(shards):
    args, data = stream(shards, train_split="gone-{0000..0001}.tar|12")
    with refused("gone-{0000..0001}.tar"):
        take(serve(data.train, args, batches_per_epoch=1), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_of_a_stream_counts_every_image_once_each_time(shards, workers):
    args, data = stream(shards, workers=workers)
    for _ in range(2):
        served = [numbers(images) for images, _ in evaluate(data.report, args)]
        assert sorted(flat(served)) == list(range(48, 69))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_length_of_a_streamed_split_is_that_of_its_images_whatever_the_workers(shards, workers):
    args, data = stream(shards, workers=workers)
    evaluate(data.report, args)
    assert data.report.total == data.sizes["report"] == 21


@pytest.mark.parametrize("workers", [0, 2])
def test_the_script_accepts_its_count_of_a_streamed_split_whatever_the_workers(shards, workers):
    args, data = stream(shards, workers=workers)
    accelerator = accelerate.Accelerator(cpu=True)
    run = SimpleNamespace(accelerator=accelerator, device=accelerator.device, stopping=Stopping(accelerator))
    metrics = validate(args, run, lambda images: torch.zeros(len(images), 3), data.report)
    assert metrics["eval_loss"] == pytest.approx(math.log(3))


def test_a_share_as_switch_split_of_a_stream_is_refused(shards):
    with refused("--switch-split", "held-out shards"):
        stream(shards, teacher="somewhere", switch_split="0.1")


def test_held_out_shards_are_the_switch_split_of_a_stream(shards):
    args, data = stream(shards, teacher="somewhere", switch_split="held")
    assert data.sizes["switch"] == 6
    served = [numbers(images) for images, _ in evaluate(data.switch, args)]
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


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_label_beyond_the_classes_is_refused_before_it_reaches_the_model(shards, split):
    args, data = stream(shards, num_classes=2, workers=1)
    with refused(f"label 2 in split '{split}'", "--num-classes 2 is 0..1"):
        if split == "train":
            next(serve(data.train, args, start=0, batches_per_epoch=6))
        else:
            list(eval_loader(data.report, process(), batch_size=4, workers=0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"val_split": "train"}, ("--train-split and --val-split are both 'train'",)),
        ({"teacher": "somewhere", "switch_split": "val"}, ("--val-split and --switch-split are both 'val'",)),
    ],
)
def test_shards_have_one_purpose(shards, changes, words):
    with refused(*words):
        stream(shards, **changes)
