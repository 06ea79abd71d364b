"""What the loaders of all tasks share: which process gets which batch, and how batches reach the device."""

import signal
from collections.abc import Iterable, Iterator

import torch
from accelerate.utils import recursively_apply, send_to_device

from w2s.engine.randomness import epoch_order


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


def to_device(batches: Iterable, device: torch.device) -> Iterator:
    """The batches, moved to a device.

    Copies to a GPU are made from pinned memory on a stream of their own, while the GPU still works on the update
    before, so that the training loop does not wait for them.
    """
    if device.type != "cuda":
        yield from (send_to_device(batch, device) for batch in batches)
        return
    copies, training = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for batch in batches:
        with torch.cuda.stream(copies):
            batch = send_to_device(batch, device, non_blocking=True)
        training.wait_stream(copies)
        # once this side has freed a batch, its memory must not be reused before the update that reads it is done
        recursively_apply(lambda tensor: tensor.record_stream(training), batch)
        yield batch


def loader_options(*, workers: int, device: torch.device) -> dict:
    """The arguments of DataLoader that all loaders of a run have in common."""
    return {
        "num_workers": workers,
        "pin_memory": device.type == "cuda",
        "persistent_workers": workers > 0,
        "worker_init_fn": _leave_signals_to_parent,
    }


def _leave_signals_to_parent(_: int) -> None:
    """Ctrl-C and job schedulers signal every process; a worker that died of it would take the last batches with it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
