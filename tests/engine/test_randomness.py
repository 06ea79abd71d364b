"""Seeds from keys of integers."""

import itertools

from w2s.engine.randomness import mix_seed


def test_seeds_of_neighbouring_keys_are_all_different_and_fit_the_generators():
    seeds = {mix_seed(*key) for key in itertools.product(range(-2, 10), range(10), range(10))}
    assert len(seeds) == 1200
    assert all(0 <= seed < 2**63 for seed in seeds)
