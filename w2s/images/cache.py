"""Small datasets decoded once to uint8 and kept on a device, where they are cropped, flipped, erased and normalised.

The same images in the same order as the loader's, augmented with the same distribution: what is drawn for an image is a
function of (seed, epoch, position in the split), whatever the batch size and the number of processes.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import torch
from accelerate.utils import broadcast_object_list
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from w2s.engine.errors import InputError
from w2s.engine.randomness import epoch_order, mix_seed

SHARE = 0.25  # of the free memory that the training images may take under --cache auto
TRIES = 10  # for a rectangle that fits, as timm's RandomErasing
AREA, LOG_ASPECT = (0.02, 1 / 3), math.log(1 / 0.3)


class CachedSplit(Dataset):
    """Images of one split, ready on a device.

    Args:
        pixels: (N, H + 2p, W + 2p, C) uint8, already padded by p = `pad` on each side.
        targets: (N,) int64.
        mean, std: one number a channel; batches are (x / 255 - mean) / std.
        channels_last: memory format of the batches.
        pad, hflip, vflip, reprob, remode: the augmentation of training batches, as the options of these names.
    """

    def __init__(
        self,
        pixels: Tensor,
        targets: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        channels_last: bool = False,
        pad: int = 0,
        hflip: float = 0.0,
        vflip: float = 0.0,
        reprob: float = 0.0,
        remode: str = "pixel",
    ) -> None:
        self.pixels, self.targets, self.pad = pixels, targets, pad
        self.mean, self.std = (torch.tensor(v, device=pixels.device).view(1, -1, 1, 1) for v in (mean, std))
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.hflip, self.vflip, self.reprob, self.remode = hflip, vflip, reprob, remode
        self.height, self.width = pixels.shape[1] - 2 * pad, pixels.shape[2] - 2 * pad

    def __len__(self) -> int:
        return len(self.targets)

    def train_batches(
        self, batch_size: int, batches: int, seed: int, start: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless augmented batches of one process, from batch `start` of the run on, `batches` an epoch."""
        epoch, batch = divmod(start, batches)
        while True:
            order = epoch_order(len(self), seed, epoch).to(self.pixels.device)
            draws = self._draws(seed, epoch)
            for k in range(batch, batches):
                begin = (k * world + rank) * batch_size
                rows = order[begin : begin + batch_size]
                images = self._cropped(rows, draws)
                if self.reprob:
                    noise = self._noise(batch_size * world, mix_seed(seed, epoch, k))
                    self._erase(images, draws["boxes"][rows], noise[rank * batch_size : (rank + 1) * batch_size])
                yield images, self.targets[rows]
            epoch, batch = epoch + 1, 0

    def eval_batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Every rank-th image in order, as it is: each exactly once over all processes."""
        for rows in torch.arange(rank, len(self), world, device=self.pixels.device).split(batch_size):
            yield self._normalised(self.pixels[rows]), self.targets[rows]

    def _normalised(self, pixels: Tensor) -> Tensor:
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=self.format)
        return images.div_(255).sub_(self.mean).div_(self.std)

    def _draws(self, seed: int, epoch: int) -> dict[str, Tensor]:
        """What is random in an epoch, a row for each image."""
        generator, count = torch.Generator().manual_seed(mix_seed(seed, epoch, 1)), len(self)
        draws = {
            "shift": torch.randint(0, 2 * self.pad + 1, (count, 2), generator=generator),
            "flip": torch.rand(count, 2, generator=generator) < torch.tensor([self.vflip, self.hflip]),
        }
        if self.reprob:
            draws["boxes"] = self._boxes(torch.rand(count, 1 + 4 * TRIES, generator=generator))
        return {name: values.to(self.pixels.device) for name, values in draws.items()}

    def _cropped(self, rows: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """One gather takes the shifted and flipped window out of each padded image."""
        axes = []
        for axis, length in enumerate((self.height, self.width)):
            steps = torch.arange(length, device=rows.device)
            steps = torch.where(draws["flip"][rows, axis, None], steps.flip(0), steps)
            axes.append(steps + draws["shift"][rows, axis, None])
        return self._normalised(self.pixels[rows[:, None, None], axes[0][:, :, None], axes[1][:, None, :]])

    def _boxes(self, uniform: Tensor) -> Tensor:
        """(N, 4) top, bottom, left, right of the rectangle to erase, empty where there is none.

        Area, aspect and place are distributed as in timm's RandomErasing (Zhong et al., arXiv 1708.04896).
        """
        erased, tries = uniform[:, 0] <= self.reprob, uniform[:, 1:].view(-1, TRIES, 4)
        area = (AREA[0] + (AREA[1] - AREA[0]) * tries[..., 0]) * self.height * self.width
        aspect = torch.exp((2 * tries[..., 1] - 1) * LOG_ASPECT)
        high, wide = torch.sqrt(area * aspect).round(), torch.sqrt(area / aspect).round()
        fits = (high < self.height) & (wide < self.width)
        first = fits.int().argmax(1, keepdim=True)  # the first try that fits
        high, wide, y, x, fits = (v.gather(1, first)[:, 0] for v in (high, wide, tries[..., 2], tries[..., 3], fits))
        high, wide = (side * (erased & fits) for side in (high, wide))
        top, left = (y * (self.height - high + 1)).floor(), (x * (self.width - wide + 1)).floor()
        return torch.stack([top, top + high, left, left + wide], 1).long()

    def _noise(self, count: int, seed: int) -> Tensor:
        """What erased pixels become: normal a pixel, normal a channel, or 0."""
        shape = {"pixel": (self.height, self.width), "rand": (1, 1)}.get(self.remode)
        channels = self.pixels.shape[-1]
        if shape is None:
            return self.mean.new_zeros(count, channels, 1, 1)
        generator = torch.Generator(self.pixels.device).manual_seed(seed)
        return torch.randn(count, channels, *shape, device=self.pixels.device, generator=generator)

    def _erase(self, images: Tensor, boxes: Tensor, noise: Tensor) -> None:
        top, bottom, left, right = boxes.view(-1, 4, 1, 1).unbind(1)
        y = torch.arange(self.height, device=images.device)[:, None]
        x = torch.arange(self.width, device=images.device)
        inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
        torch.where(inside[:, None], noise, images, out=images)


def obstacle(args) -> str | None:
    """What in the options `--cache` cannot do, None if it can do it all."""
    if not args.no_aug:
        if args.pad_crop is None:
            return "random resized crops (--pad-crop N crops small images)"
        if args.aa:
            return f"--aa {args.aa}"
        if args.color_jitter:
            return f"--color-jitter {args.color_jitter:g}"
    return None


def resolve_cache(args, cache: str, images: int, data_config: dict, accelerator) -> str:
    """ "device", "cpu" or "none": what `--cache` means for so many training images.

    Raises:
        InputError: a cache is asked for that cannot do what the other options ask for.
    """
    reason = obstacle(args)
    if cache != "auto":
        if cache != "none" and reason:
            raise InputError(f"--cache {cache} cannot do {reason}; use --cache none for that")
        return cache
    channels, height, width = data_config["input_size"]
    pad = args.pad_crop or 0
    if accelerator.device.type == "cuda":
        free = torch.cuda.mem_get_info(accelerator.device)[0]
    else:
        free = psutil.virtual_memory().available / accelerator.num_processes
    fits = images * channels * (height + 2 * pad) * (width + 2 * pad) <= SHARE * free
    choice = "device" if fits and not reason else "none"
    return broadcast_object_list([choice])[0]  # memory differs between processes, the choice must not


def cache_split(split: Dataset, args, data_config: dict, device: torch.device, training: bool) -> CachedSplit:
    """Decode and resize a whole `ImageSplit`.

    Raises:
        InputError: an image is corrupt; it is named.
    """
    size = data_config["input_size"][-2:]
    crops = training and not args.no_aug
    if crops:
        resize = transforms.Resize(size, transforms.InterpolationMode(data_config["interpolation"]))
        shape: Callable = transforms.Compose([resize, transforms.PILToTensor()])
    else:
        keys = ("input_size", "interpolation", "mean", "crop_pct", "crop_mode")
        options = {k: data_config[k] for k in keys if k in data_config}
        if training and args.train_interpolation:
            options["interpolation"] = args.train_interpolation
        shape = create_transform(no_aug=training, is_training=training, use_prefetcher=True, **options)

    def decode(position: int) -> tuple[np.ndarray, int]:
        image, target = split.read(position)
        return np.asarray(shape(image)).transpose(1, 2, 0), target

    pad = args.pad_crop if crops else 0
    pixels = np.zeros((len(split), size[0] + 2 * pad, size[1] + 2 * pad, data_config["input_size"][0]), np.uint8)
    targets = torch.empty(len(split), dtype=torch.long)
    with ThreadPoolExecutor() as pool:
        for position, (image, target) in enumerate(pool.map(decode, range(len(split)))):
            pixels[position, pad : pad + size[0], pad : pad + size[1]] = image
            targets[position] = target
    augmentation = {k: getattr(args, k) for k in ("hflip", "vflip", "reprob", "remode")} if crops else {}
    return CachedSplit(
        torch.from_numpy(pixels).to(device),
        targets.to(device),
        *(data_config["mean"], data_config["std"], args.channels_last, pad),
        **augmentation,
    )
