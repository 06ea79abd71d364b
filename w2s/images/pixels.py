"""From pixels to what a model takes, on its device and for whole batches.

Loader workers and caches hand over pixels as uint8, in the order (H, W, C) in which they are decoded. That is a quarter
of the bytes of normalised floats, and the arithmetic is left to the device.
"""

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from w2s.engine.randomness import own_randomness, seed_augmentation

ERASING = 2  # tells these draws from all others of the same image


class DeviceTransform:
    """Normalises the pixels of a batch, and erases a part of some training images.

    Args:
        mean, std: one number a channel; images are (x / 255 - mean) / std.
        device: where it runs.
        channels_last: memory format of the images.
        erasing: timm's random erasing, None for none.
        seed: of what is erased.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        device: torch.device,
        channels_last: bool = False,
        erasing: RandomErasing | None = None,
        seed: int = 0,
    ) -> None:
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.erasing, self.seed = erasing, seed

    def __call__(self, pixels: Tensor, keys: Iterable[tuple[int, ...]] | None = None) -> Tensor:
        """Images (B, C, H, W), float32.

        Args:
            pixels: (B, H, W, C) uint8 on the device.
            keys: what the erasing of each image is a function of, besides the seed: its (epoch, position), or in a
                stream its place in the run.
        """
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=self.memory_format)
        images = images.div_(255).sub_(self.mean).div_(self.std)
        if self.erasing is not None:
            with own_randomness():
                for image, key in zip(images, keys, strict=True):
                    seed_augmentation(self.seed, *key, ERASING)
                    self.erasing(_Patched(image))
        return images


class _Patched:
    """An image (C, H, W) on a device that takes patches from the CPU without waiting for the device.

    It has what timm's RandomErasing asks of an image.
    """

    def __init__(self, image: Tensor) -> None:
        self.image, self.size, self.dtype = image, image.size, image.dtype

    def __setitem__(self, place: tuple, patch: Tensor) -> None:
        if self.image.is_cuda:
            patch = patch.pin_memory()  # a copy from pageable memory would wait for all that was queued before it
        self.image[place] = patch.to(self.image.device, non_blocking=True)


def to_pixels(image: Image.Image) -> Tensor:
    """The pixels of an image, (H, W, C) uint8: the last stage of a transform."""
    pixels = torch.from_numpy(np.array(image))
    return pixels if pixels.ndim == 3 else pixels[..., None]
