"""The switch split and the balanced subset: shares of every class, nothing in both, and impossible cuts refused."""

import numpy as np
import pytest
from helpers import refused

from w2s.images.splits import draw_per_class, stratified_split

IMBALANCED = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [3, 40, 100, 57]))


def split(targets: np.ndarray, num_classes: int, fraction: float, samples: int | None = None, seed: int = 0):
    return stratified_split(targets, num_classes=num_classes, fraction=fraction, samples=samples, seed=seed)


@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.1, 0.5])
def test_the_switch_split_holds_the_same_share_of_each_class_and_at_least_one_image(fraction):
    _, switch = split(IMBALANCED, num_classes=4, fraction=fraction)
    expected = np.maximum(np.bincount(IMBALANCED) * fraction, 1)
    assert (np.abs(np.bincount(IMBALANCED[switch], minlength=4) - expected) <= 0.5).all()


def test_what_is_not_held_out_is_trained_on():
    train, switch = split(IMBALANCED, num_classes=4, fraction=0.1)
    assert sorted([*train, *switch]) == list(range(200))


def test_a_switch_split_of_zero_holds_nothing_out():
    train, switch = split(IMBALANCED, num_classes=4, fraction=0.0)
    assert len(switch) == 0 and len(train) == 200


def test_a_class_whose_only_image_would_be_held_out_is_refused():
    with refused("class 1", "switch split"):
        split(np.array([0, 0, 0, 1]), num_classes=2, fraction=0.1)


def test_a_class_with_no_image_is_refused():
    with refused("class 2", "no image"):
        split(np.array([0, 0, 1, 1, 3, 3]), num_classes=4, fraction=0.1)


def test_small_classes_are_used_up_before_others_fill_in():
    train, _ = split(IMBALANCED, num_classes=4, fraction=0.02, samples=130)
    assert np.bincount(IMBALANCED[train]).tolist() == [2, 39, 45, 44]


def test_so_many_are_drawn_of_each_class_in_order():
    rows = draw_per_class(IMBALANCED, np.array([1, 2, 3, 0]), seed=0)
    assert np.bincount(IMBALANCED[rows], minlength=4).tolist() == [1, 2, 3, 0]
    assert rows.tolist() == sorted(set(rows.tolist()))
