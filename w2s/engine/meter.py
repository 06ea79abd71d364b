"""The mean losses between two evaluations."""

import torch
from accelerate import Accelerator
from torch import Tensor

from w2s.engine.plan import accumulation_dtype


class LossMeter:
    """Sums losses on the device, without waiting for it, and gives their means over all processes.

    Args:
        accelerator: gives the device and the processes.
        terms: names of further losses; those called kd_* are averaged over the taught updates only.
    """

    def __init__(self, accelerator: Accelerator, terms: tuple[str, ...] = ()) -> None:
        self.accelerator, self.names = accelerator, ("train_loss", "task_loss", "kd_loss", *terms)
        # updates, taught updates, and the sum of each loss
        device = accelerator.device
        self.sums = torch.zeros(2 + len(self.names), dtype=accumulation_dtype(device), device=device)

    def add(self, losses: Tensor, taught: bool) -> None:
        """Count an update with its losses (3 + terms,)."""
        # made on the device: no copy to wait for
        counts = torch.stack([torch.ones_like(losses[0]), torch.full_like(losses[0], float(taught))])
        self.sums += torch.cat([counts, losses])

    def take_means(self) -> dict[str, float]:
        """The mean of each loss by name since the last call; none where no update was counted, or none taught."""
        updates, taught, *sums = self.state()
        self.sums.zero_()
        means = {}
        for name, total in zip(self.names, sums, strict=True):
            if count := taught if name.startswith("kd_") else updates:
                means[name] = total / count
        return means

    def state(self) -> list[float]:
        """The sums, as means over the processes."""
        return self.accelerator.reduce(self.sums, "mean").tolist()

    def load_state(self, sums: list[float]) -> None:
        """Continue from the sums of a checkpoint."""
        self.sums += self.sums.new_tensor(sums)
