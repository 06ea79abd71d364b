"""Small datasets that are decoded once and kept as uint8 on a device, where they are cropped and flipped.

The images come in the same order as from the loader, with augmentation of the same distribution: what is drawn for an
image is a function of (seed, epoch, position in the split), whatever the batch size and the number of processes.
"""

import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.utils.data import Dataset

from w2s.engine.decoding import in_threads
from w2s.engine.errors import InputError
from w2s.engine.launch import processes_here
from w2s.engine.randomness import epoch_order, mix_seed
from w2s.images.datasets import read_image
from w2s.images.pixels import DeviceTransform

MEMORY_SHARE = 0.25  # of the free memory that the training images may take under --cache auto


class CachedSplit(Dataset):
    """Images of one split, ready on a device.

    Args:
        images: (N, H + 2p, W + 2p, C) uint8, already padded by p = `pad` on each side.
        targets: (N,) int64.
        on_device: what happens to the pixels of a batch on the device that trains.
        pad, hflip, vflip: the augmentation of training batches: how far a crop may be shifted, in pixels, and the
            probabilities of a flip.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        *,
        on_device: DeviceTransform,
        pad: int = 0,
        hflip: float = 0.0,
        vflip: float = 0.0,
    ) -> None:
        self.images, self.targets, self.on_device = images, targets, on_device
        self.pad, self.hflip, self.vflip = pad, hflip, vflip
        self.height, self.width = images.shape[1] - 2 * pad, images.shape[2] - 2 * pad

    def __len__(self) -> int:
        return len(self.targets)

    def train_batches(
        self, *, batch_size: int, batches_per_epoch: int, seed: int, start: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless augmented pixels (B, H, W, C) and targets of one process, from batch `start` of the run on."""
        epoch, batch = divmod(start, batches_per_epoch)
        while True:
            permutation = epoch_order(len(self), seed, epoch).to(self.images.device)
            shifts, flips = self._draw_augmentation(seed, epoch)
            for k in range(batch, batches_per_epoch):
                begin = (k * world + rank) * batch_size
                rows = permutation[begin : begin + batch_size]
                yield self._crop_and_flip(rows, shifts[rows], flips[rows]), self.targets[rows]
            epoch, batch = epoch + 1, 0

    def eval_batches(self, *, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """The pixels of this rank in order and without augmentation; all ranks together yield each image once."""
        for rows in torch.arange(rank, len(self), world, device=self.images.device).split(batch_size):
            yield self.images[rows], self.targets[rows]

    def _draw_augmentation(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """What is random in an epoch, one row an image: shifts (N, 2) int64 and flips (N, 2) bool, each as (y, x)."""
        generator, count = torch.Generator().manual_seed(mix_seed(seed, epoch, 1)), len(self)
        shifts = torch.randint(0, 2 * self.pad + 1, (count, 2), generator=generator)
        flips = torch.rand(count, 2, generator=generator) < torch.tensor([self.vflip, self.hflip])
        return shifts.to(self.images.device), flips.to(self.images.device)

    def _crop_and_flip(self, rows: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
        """One gather takes the shifted and flipped window out of each padded image."""
        y = _window(self.height, shifts[:, 0, None], flips[:, 0, None])
        x = _window(self.width, shifts[:, 1, None], flips[:, 1, None])
        return self.images[rows[:, None, None], y[:, :, None], x[:, None, :]]


def _window(length: int, shift: Tensor, flip: Tensor) -> Tensor:
    """The coordinates (B, length) along one axis of windows that start at `shift` (B, 1), reversed where `flip`."""
    steps = torch.arange(length, device=shift.device)
    return torch.where(flip, steps.flip(0), steps) + shift


def resolve_cache(
    cache: str,
    *,
    obstacle: str | None,
    images: int,
    input_size: tuple[int, int, int],
    pad: int,
    accelerator: Accelerator,
) -> str:
    """What `--cache` means for this run: "device", "cpu" or "none".

    Args:
        cache: the value of the option.
        obstacle: an option that the cache cannot handle; None if there is none.
        images: how many training images there are.
        input_size: channels, height and width of an image.
        pad: pixels by which each side of an image is padded.
        accelerator: gives the device and the processes.

    Raises:
        InputError: a cache is asked for that cannot do what the other options ask for.
    """
    if cache != "auto":
        if cache != "none" and obstacle:
            raise InputError(f"--cache {cache} cannot do {obstacle}; use --cache none for that, in a new run")
        return cache
    channels, height, width = input_size
    size = images * channels * (height + 2 * pad) * (width + 2 * pad)
    free = [psutil.virtual_memory().available]  # the processes of a machine share one copy, see `_shared_arrays`
    if accelerator.device.type == "cuda":
        free.append(torch.cuda.mem_get_info(accelerator.device)[0])
    fits = size <= MEMORY_SHARE * min(free)
    if processes_here()[1] > 1:
        fits = fits and size < shutil.disk_usage(tempfile.gettempdir()).free
    # memory differs between processes, the choice must not
    return "device" if all(gather_object([fits])) and not obstacle else "none"


def cache_device(cache: str, accelerator: Accelerator) -> torch.device | None:
    """Where the images are kept under a resolved `--cache`; None if they are not."""
    return {"device": accelerator.device, "cpu": torch.device("cpu"), "none": None}[cache]


def cache_split(
    dataset: Dataset,
    rows: np.ndarray,
    *,
    mode: str,
    transform: Callable,
    on_device: DeviceTransform,
    input_size: tuple[int, int, int],
    device: torch.device,
    pad: int = 0,
    hflip: float = 0.0,
    vflip: float = 0.0,
) -> CachedSplit:
    """Decode and resize some images of a dataset, and keep them on a device.

    The processes of a machine share the work and the memory: each image is decoded once. All processes call this.

    Args:
        dataset: where the images are.
        rows: which of them, in this order.
        mode: the PIL mode to decode to.
        transform: from a PIL image to pixels (H, W, C), uint8, of the size in `input_size`.
        on_device, pad, hflip, vflip: see `CachedSplit`.
        input_size: channels, height and width.
        device: where the images are kept.

    Raises:
        InputError: an image is corrupt; it is named. Or there is no room for the images.
    """

    def decode(row: int) -> tuple[np.ndarray, int]:
        image, target = read_image(dataset, int(row), mode)
        return transform(image).numpy(), target

    channels, height, width = input_size
    index, count = processes_here()
    images, targets = _shared_arrays((len(rows), height + 2 * pad, width + 2 * pad, channels), index, count)
    mine = range(index, len(rows), count)
    for position, (image, target) in zip(mine, in_threads(decode, rows[index::count]), strict=True):
        images[position, pad : pad + height, pad : pad + width] = image
        targets[position] = target
    PartialState().wait_for_everyone()
    return CachedSplit(
        torch.from_numpy(images).to(device),
        torch.from_numpy(targets).to(device),
        on_device=on_device,
        pad=pad,
        hflip=hflip,
        vflip=vflip,
    )


def _shared_arrays(shape: tuple[int, ...], index: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, C) uint8 of 0 and targets (N,) int64, in memory that the processes of a machine share.

    It is a file that all of them map and that has no name any more, so that a kill leaves nothing behind.

    Args:
        shape: of the images.
        index, count: see `processes_here`.

    Raises:
        InputError: the disk for temporary files is full.
    """
    if count == 1:
        return np.zeros(shape, np.uint8), np.zeros(shape[0], np.int64)
    # with the machine's name, as machines may share the folder, but not the file
    name = f"w2s-{socket.gethostname()}-{broadcast_object_list([uuid.uuid4().hex])[0]}"
    path = Path(tempfile.gettempdir()) / name
    size = 8 * shape[0] + int(np.prod(shape))
    try:
        if index == 0:
            with open(path, "wb") as file:
                if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash later
                    os.posix_fallocate(file.fileno(), 0, size)
                else:  # macOS
                    file.truncate(size)
        PartialState().wait_for_everyone()
        memory = np.memmap(path, np.uint8, "r+", shape=(size,))
        PartialState().wait_for_everyone()
    except OSError as error:
        reason = f"{error.strerror}: {size / 2**30:.1f} GiB in {path.parent}, where TMPDIR may name another folder"
        raise InputError(f"--cache: no room for the images ({reason}); or use --cache none") from None
    finally:
        if index == 0:
            path.unlink(missing_ok=True)
    targets, images = memory[: 8 * shape[0]].view(np.int64), memory[8 * shape[0] :]
    return np.asarray(images.reshape(shape)), np.asarray(targets)
