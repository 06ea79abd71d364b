"""Which images are trained on and which are held out for the switch-off, class by class."""

import numpy as np

from w2s.engine.errors import InputError


def stratified_split(
    targets: np.ndarray, *, num_classes: int, fraction: float, samples: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hold a slice of the training data out for the switch-off, and choose the rows to train on from the others.

    The held-out slice depends on the labels, the fraction and the seed alone, so all arms of a comparison share it.

    Args:
        targets: (N,) labels of the training data.
        num_classes: how many classes there are.
        fraction: the share of each class to hold out; at least one image of each class unless it is 0.
        samples: how many of the other images to train on, balanced over the classes; all of them if None.
        seed: of the random choice.

    Returns:
        The rows to train on and the rows held out, both sorted. The latter are empty for a fraction of 0.

    Raises:
        InputError: an impossible fraction, seed or number of samples, or a class with too few images.
    """
    if seed < 0:
        raise InputError(f"--switch-seed {seed}: must be 0 or more")
    if not 0 <= fraction < 1:
        raise InputError(f"--switch-split {fraction:g}: a share lies in [0, 1)")
    per_class = np.bincount(targets, minlength=num_classes)
    if empty := [c for c in range(num_classes) if per_class[c] == 0]:
        raise InputError(f"class {empty[0]} has no image in the training split ({len(empty)} such classes)")
    held_out = np.maximum(np.round(per_class * fraction).astype(int), 1) if fraction else np.zeros(num_classes, int)
    switch = draw_per_class(targets, held_out, seed)
    train = np.setdiff1d(np.arange(len(targets)), switch)
    left = per_class - held_out
    if (left == 0).any():
        raise InputError(f"class {int(np.argmin(left))} has no image left to train on beside the switch split")
    if samples is not None:
        if not num_classes <= samples <= len(train):
            raise InputError(f"--train-samples {samples}: between {num_classes} and {len(train)} images are there")
        train = train[draw_per_class(targets[train], _balanced_counts(left, samples), seed)]
    return train, switch


def _balanced_counts(available: np.ndarray, samples: int) -> np.ndarray:
    """How many images to take of each class, as equal as the `available` images of each allow."""
    num_classes = len(available)
    counts = np.full(num_classes, samples // num_classes)
    counts[: samples % num_classes] += 1
    counts = np.minimum(counts, available)
    while (missing := samples - counts.sum()) > 0:  # small classes are used up: the others fill in
        counts[np.flatnonzero(counts < available)[:missing]] += 1
    return counts


def draw_per_class(targets: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Sorted positions of `counts[c]` random items of each class c."""
    generator = np.random.default_rng(seed)
    picks = [generator.permutation(np.flatnonzero(targets == c))[:n] for c, n in enumerate(counts)]
    return np.sort(np.concatenate(picks))
