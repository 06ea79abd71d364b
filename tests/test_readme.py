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
    batches = [torch.randn(16, 4) for _ in range(3)]

    class Teacher(nn.Module):
        """Right a little more often than not."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            asked.append((self.training, torch.is_grad_enabled()))
            return images[:, :2] + 3 * images[:, 2:]

    def accuracy(model: nn.Module, images: torch.Tensor) -> float:
        return (model(images).argmax(1) == (images[:, 1] > images[:, 0])).float().mean().item()

    names = {
        "torch": torch,
        "epochs": 8,
        "loader": [(images, (images[:, 1] > images[:, 0]).long()) for images in batches],
        "student": student,
        "teacher": Teacher().train(),
        "criterion": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(student.parameters(), lr=1.0),
        "accuracy": accuracy,
        "held_out": held_out,
    }
    exec(snippet, names)
    assert not torch.equal(student.weight, before)
    assert accuracy(student, held_out) > 0.9
    # asked in eval mode for its own score, then without gradient in two epochs of three updates, but for the first
    # update, whose weight is 0; then it was surpassed
    assert asked[1:] == [(False, False)] * 5
    assert names["phase"].reason == "surpass" and not names["phase"].active
