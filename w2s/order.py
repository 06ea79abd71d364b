"""The order of the data and its randomness, without state.

The order of an epoch is a function of (seed, epoch), the augmentation of an image of (seed, epoch, index). So both arms
of a comparison see the same batches, a resumed run sees exactly what is left, and neither workers nor the number of
processes change a pixel.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def mix_seed(*key: int) -> int:
    """A 63-bit seed from a tuple of integers; nearby tuples give unrelated seeds (splitmix64)."""
    state = 0
    for part in key:
        state = (state + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """Let a block reseed the CPU generators without touching the caller's (the main process, with 0 workers)."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_augmentation(*key: int) -> None:
    """Seed the CPU generators that transforms draw from."""
    seed = mix_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)  # the CPU's only: torch.manual_seed would reset the GPU's too


def epoch_order(length: int, seed: int, epoch: int) -> torch.Tensor:
    """The order in which an epoch goes through its data: a permutation of (seed, epoch)."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(mix_seed(seed, epoch)))


def spread(length: int, count: int) -> np.ndarray:
    """`count` positions of so many, evenly spread over them; all if there are no more, or if it is negative."""
    return np.linspace(0, length, length if count < 0 else min(count, length), endpoint=False).astype(int)


class EpochBatches:
    """A batch sampler: the batches of one process, epoch after epoch, from any point on.

    Global batches are cut from a permutation of (seed, epoch); process r takes the r-th part of each. So one process
    with batch 2B and two with batch B train on the same images in every update.
    """

    def __init__(self, length: int, batch_size: int, batches: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.length, self.batch_size, self.batches, self.seed = length, batch_size, batches, seed
        self.rank, self.world, self.start = rank, world, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, batch = divmod(self.start, self.batches)
        while True:
            order = self.order(epoch)
            for k in range(batch, self.batches):
                begin = (k * self.world + self.rank) * self.batch_size
                yield [(epoch, position) for position in order[begin : begin + self.batch_size]]
            epoch, batch = epoch + 1, 0

    def order(self, epoch: int) -> list[int]:
        """All positions in the order of an epoch, the same on all processes."""
        return epoch_order(self.length, self.seed, epoch).tolist()


class EvalBatches:
    """A batch sampler: every rank-th image in order, each exactly once over all processes, nothing padded."""

    def __init__(self, length: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.positions, self.batch_size = range(rank, length, world), batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for k in range(0, len(self.positions), self.batch_size):
            yield [(0, position) for position in self.positions[k : k + self.batch_size]]

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)
