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
    """Let a block reseed the CPU generators, and restore their states afterwards.

    With 0 workers the main process loads the data, which must not change the state of its own generators.
    """
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


def seed_generators(*key: int) -> None:
    """Seed all generators of this process, those of its devices, too."""
    seed = mix_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def epoch_order(length: int, seed: int, epoch: int) -> torch.Tensor:
    """The order in which an epoch goes through its data: a permutation of (seed, epoch)."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(mix_seed(seed, epoch)))


def evenly_spread(length: int, count: int) -> np.ndarray:
    """`count` of `length` positions, evenly spread; all of them if `count` is negative or not smaller."""
    return np.linspace(0, length, length if count < 0 else min(count, length), endpoint=False).astype(int)
