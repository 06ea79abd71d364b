"""What guessing scores, and when a student does no better."""

import math

import numpy as np
import pytest

from w2s.images.chance import guessing_metrics, is_guessing

TEN = guessing_metrics(np.arange(10_000) % 10, 10)  # ten classes of 1,000 images


def test_of_equally_large_classes_the_loss_is_ln_c():
    assert TEN["top1"] == pytest.approx(10)
    assert TEN["eval_loss"] == pytest.approx(math.log(10))


def test_of_unequal_classes_it_is_the_entropy_and_the_largest_is_named():
    guess = guessing_metrics(np.array([0] * 90 + [1] * 10), 3)
    assert guess["top1"] == pytest.approx(90)
    assert guess["eval_loss"] == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    assert guess["top1_error"] == pytest.approx(3)


@pytest.mark.parametrize(
    ("top1", "loss", "expected"),
    [
        (10.0, 2.3026, True),  # constant logits
        (10.0, 57.3, True),  # one class for all images, and sure of it
        (10.4, 2.29, True),  # random
        (11.5, 2.31, False),  # a little above chance, as after the first updates
        (60.0, 2.5, False),  # overconfident
        (10.0, 2.2, False),  # it knows something of the probabilities
    ],
)
def test_a_student_guesses_where_neither_loss_nor_accuracy_is_better(top1, loss, expected):
    assert is_guessing({"top1": top1, "top5": 50.0, "eval_loss": loss}, TEN) is expected
