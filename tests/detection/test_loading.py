"""How images with boxes are served: transforms keep boxes right, batches of one aspect ratio, stateless randomness."""

from collections import Counter

import pytest
import torch
from detection.annotated import white_boxes

from w2s.detection.loading import (
    DetectionSplit,
    GroupedBatches,
    SameSizeBatches,
    detection_transform,
    eval_loader,
    train_batches,
)


class Processes:
    """What a loader asks an accelerator."""

    device = torch.device("cpu")

    def __init__(self, index: int = 0, count: int = 1) -> None:
        self.process_index, self.num_processes = index, count


# ---- transforms ----


@pytest.mark.parametrize(
    "changes",
    [
        {"hflip": 0.0},
        {"hflip": 1.0},
        {"scale_jitter": (24, 88), "max_size": 100},
        {"lsj": 64},
        {"photometric": True},
    ],
)
def test_boxes_stay_on_what_they_name(changes):
    transform = detection_transform(**{"hflip": 0.5, **changes})
    split = DetectionSplit(white_boxes(), list(range(6)), first_label=0, transform=transform, seed=3)
    shapes, checked = set(), 0
    for epoch in range(4):
        for image, target in split.__getitems__([(epoch, position) for position in range(6)]):
            assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
            shapes.add(tuple(image.shape[-2:]))
            assert len(target["boxes"]) == len(target["labels"])
            for x1, y1, x2, y2 in target["boxes"].tolist():
                assert 0 <= x1 < x2 <= image.shape[-1] and 0 <= y1 < y2 <= image.shape[-2]
                if min(x2 - x1, y2 - y1) < 6:
                    continue  # smeared by the scaling
                checked += 1
                inside = image[0, round(y1) + 1 : round(y2) - 1, round(x1) + 1 : round(x2) - 1]
                assert inside.mean() > (0.4 if changes.get("photometric") else 0.6), "white inside"
                if not (changes.get("lsj") or changes.get("photometric")):
                    mask = torch.ones(image.shape[-2:], dtype=torch.bool)
                    for a, b, c, d in target["boxes"].round().int().tolist():
                        mask[max(b - 2, 0) : d + 2, max(a - 2, 0) : c + 2] = False
                    assert image[0][mask].mean() < 0.1, "black outside"
    assert checked > 10
    assert len(shapes) > 1 if changes.get("scale_jitter") else len(shapes) == 1


def test_augmentation_is_a_function_of_seed_epoch_and_image():
    def items(keys, seed=0, rows=(0, 1, 2, 3)):
        transform = detection_transform(hflip=0.5, photometric=True)
        split = DetectionSplit(white_boxes(), list(rows), first_label=0, transform=transform, seed=seed)
        return [image for image, _ in split.__getitems__(keys)]

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = items([(0, 0), (0, 1), (1, 1)])
    assert torch.equal(torch.get_rng_state(), before), "nothing global is reseeded"
    again = items([(1, 1), (0, 1)])
    assert torch.equal(first[1], again[1]) and torch.equal(first[2], again[0])
    assert torch.equal(items([(0, 0)], rows=(1,))[0], first[1]), "by image, not by position"
    many = items([(epoch, 0) for epoch in range(8)])
    assert len({image.sum().item() for image in many}) > 2
    assert len({items([(0, 0)], seed)[0].sum().item() for seed in range(8)}) > 2


# ---- batches ----

GROUPS = [0, 1, 0, 0, 2, 1, 0, 0, 1, 1, 0, 0, 1, 0, 2, 0, 1, 0, 0]


def served(
    batch_size: int, *, rank: int = 0, world: int = 1, start: int = 0, count: int = 12, micro_batches: int = 1
) -> list:
    """The first batches of one process, 4 updates an epoch."""
    sampler = GroupedBatches(
        GROUPS,
        batch_size=batch_size,
        batches=4 * micro_batches,
        micro_batches=micro_batches,
        seed=7,
        rank=rank,
        world=world,
    )
    sampler.start = start
    return [batch for batch, _ in zip(sampler, range(count), strict=False)]


def test_batches_hold_one_group_while_there_are_enough_of_it():
    batches = served(4, count=4)
    positions = [position for batch in batches for _, position in batch]
    assert len(set(positions)) == len(positions) == 16
    mixed = [len({GROUPS[p] for _, p in batch}) > 1 for batch in batches]
    assert not any(mixed[:3]) and sum(mixed) <= 1


def test_two_processes_share_the_batches_of_one():
    alone = served(4)
    pairs = zip(served(2, rank=0, world=2), served(2, rank=1, world=2), strict=True)
    assert [a + b for a, b in pairs] == alone


def test_micro_batches_share_the_batches_of_one_update():
    halves = served(2, count=24, micro_batches=2)
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == served(4)


def test_batches_can_start_anywhere_and_differ_between_epochs():
    alone = served(4)
    for start in (1, 4, 6):
        assert served(4, start=start, count=12 - start) == alone[start:]
    assert [p for _, p in alone[0]] != [p for _, p in alone[4]]
    assert {epoch for epoch, _ in alone[4]} == {1}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_serves_each_image_once_in_batches_of_one_size(world, batch_size):
    sizes = [(60, 40)] * 7 + [(40, 60)] * 3 + [(60, 40)] * 3 + [(10, 10)]
    alone = list(SameSizeBatches(sizes, batch_size=batch_size))
    parts = [list(SameSizeBatches(sizes, batch_size=batch_size, rank=rank, world=world)) for rank in range(world)]
    positions = [position for part in parts for batch in part for _, position in batch]
    assert Counter(positions) == Counter(range(14))
    assert all(len({sizes[p] for _, p in batch}) == 1 for part in parts for batch in part)
    assert all(batch in alone for part in parts for batch in part), "batches do not depend on the processes"


def test_loaders():
    transform = detection_transform(hflip=0.5)
    split = DetectionSplit(white_boxes(), list(range(6)), first_label=1, transform=transform, seed=0)

    def batches(start: int):
        return train_batches(
            split,
            Processes(),
            batch_size=2,
            batches_per_epoch=3,
            micro_batches=1,
            start=start,
            seed=0,
            workers=0,
            group_aspect=True,
        )

    whole = batches(start=0)
    straight = [next(whole) for _ in range(5)]
    resumed = batches(start=3)
    for images, targets in straight[3:]:
        more, others = next(resumed)
        assert all(torch.equal(a, b) for a, b in zip(images, more, strict=True))
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, others, strict=True))
    loader = eval_loader(split, Processes(index=1, count=2), batch_size=2, workers=0)
    assert [target["position"] for _, targets in loader for target in targets] == [2, 3]
