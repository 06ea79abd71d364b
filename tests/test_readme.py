"""The code in README.md does what is said of it."""

import re

import torch
from helpers import ROOT
from torch import nn


def test_the_method_in_a_loop_of_ones_own():
    (snippet,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    torch.manual_seed(0)
    student, asked = nn.Linear(4, 2), []
    before = student.weight.detach().clone()
    held_out = torch.randn(64, 4)
    batches = [torch.randn(16, 4) for _ in range(12)]

    def teacher(images: torch.Tensor) -> torch.Tensor:
        asked.append(torch.is_grad_enabled())
        return images[:, :2]

    def accuracy(model: nn.Module, images: torch.Tensor) -> float:
        return (model(images).argmax(1) == (images[:, 1] > images[:, 0])).float().mean().item()

    names = {
        "torch": torch,
        "loader": [(images, (images[:, 1] > images[:, 0]).long()) for images in batches],
        "steps_per_epoch": 3,
        "student": student,
        "teacher": teacher,
        "criterion": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(student.parameters(), lr=1.0),
        "accuracy": accuracy,
        "held_out": held_out,
        "teacher_accuracy": 0.5,
    }
    exec(snippet, names)
    assert not torch.equal(student.weight, before)
    assert accuracy(student, held_out) > 0.9
    assert asked == [False] * 5  # two epochs of three updates but the first, whose weight is 0; then it was surpassed
    assert names["phase"].reason == "surpass" and not names["phase"].active
