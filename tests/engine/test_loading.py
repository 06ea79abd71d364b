"""Which process gets which batch, in which order, and how batches reach a device."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from w2s.engine.loading import EpochBatches, EvalBatches, to_device


def take(batches, n: int) -> list:
    return list(itertools.islice(batches, n))


def flat(lists) -> list:
    return list(itertools.chain.from_iterable(lists))


# --- the order of an epoch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_parts_of_all_processes_are_the_batch_of_one_process_that_is_as_large(world):
    together = take(EpochBatches(50, 4 * world, 4, seed=5), 10)
    parts = [take(EpochBatches(50, 4, 4, seed=5, rank=rank, world=world), 10) for rank in range(world)]
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
    samplers = [EpochBatches(length, batch_size, batches, seed=0, rank=rank, world=world) for rank in range(world)]
    parts = [take(sampler, 3 * batches) for sampler in samplers]
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
    samplers = [EvalBatches(length, 4, rank=rank, world=world) for rank in range(world)]
    keys = [position for sampler in samplers for batch in sampler for _, position in batch]
    assert sorted(keys) == list(range(length))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]


class Positions(Dataset):
    """Serves the positions of its keys, a batch at a time."""

    def __len__(self) -> int:
        return 8

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[int]:
        return [position for _, position in keys]


def test_a_batch_sampler_of_keys_works_with_torchs_own_loader():
    loader = DataLoader(Positions(), batch_sampler=EvalBatches(8, 3))
    assert [positions.tolist() for positions in loader] == [[0, 1, 2], [3, 4, 5], [6, 7]]


# --- on the way to a device ------------------------------------------------------------------------------------------


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
