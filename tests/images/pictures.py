"""Pictures, models, options and loaders for the tests of the images room."""

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from train_cls import build_parser, resolve
from w2s.images.loading import eval_loader, train_batches
from w2s.images.models import create_model


class Pictures(Dataset):
    """PIL images made from a seed, each of a class of its own; `alike` gives all rows the same pixels."""

    def __init__(self, length: int, size: tuple[int, int] = (32, 32), channels: int = 3, alike: bool = False) -> None:
        shape = (*size, 3) if channels == 3 else size
        pixels = np.random.default_rng(7).integers(0, 256, (1 if alike else length, *shape), dtype=np.uint8)
        self.pixels = np.broadcast_to(pixels, (length, *shape))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), index


def picture(number: int) -> Image.Image:
    """One of many pictures of 32 x 32 pixels."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def picture_folder(root: Path, **splits: dict[str, int]) -> Path:
    """root/SPLIT/CLASS/CLASSn.png with so many images a class."""
    for split, classes in splits.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(i).save(root / split / name / f"{name}{i}.png")
    return root


def hf_folder(
    root: Path,
    labels: list,
    label: object = None,
    columns: tuple[str, str] = ("image", "label"),
    without_image: int | None = None,
) -> Path:
    """A dataset of PNGs with these labels in parquet files; train and test hold the same pictures and labels."""
    root.mkdir()
    datasets.disable_progress_bars()
    pictures = [None if i == without_image else picture(i) for i in range(len(labels))]
    features = datasets.Features({columns[0]: datasets.Image(), columns[1]: label or datasets.Value("int64")})
    table = datasets.Dataset.from_dict({columns[0]: pictures, columns[1]: labels}, features=features)
    table.to_parquet(str(root / "train.parquet"))
    shutil.copy(root / "train.parquet", root / "test.parquet")
    return root


TINY = {"channels": (8, 8, 16, 16), "stem_width": 8}  # of a resnet10t


def model_of(
    name: str = "resnet10t", *, seed: int = 0, size: int = 32, mean: tuple = (), std: tuple = (), **options: object
) -> nn.Module:
    """A small model with random weights and statistics, so that every tensor shows in what it gives.

    Args:
        name: a resnet10t is made narrow.
        size: of its images, by its pretrained_cfg.
        mean, std: of their pixels; 0.5 if not given.
        options: for `create_model`.
    """
    torch.manual_seed(seed)
    if name == "resnet10t":
        options["model_kwargs"] = TINY | (options.get("model_kwargs") or {})
    model = create_model(name, **{"num_classes": 10, "img_size": size} | options)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
    half = (0.5,) * options.get("in_chans", 3)
    own = {"input_size": (len(half), size, size), "mean": mean or half, "std": std or half}
    model.pretrained_cfg = {**model.pretrained_cfg, **own}
    return model


def options(**changes: object):
    """The script's own defaults for 32 px, values 0-1 unless asked otherwise; (args, data config)."""
    args = build_parser().parse_recipe(["--model", "resnet10t"])
    vars(args).update({"img_size": 32, "mean": [0.0] * 3, "std": [1.0] * 3, "workers": 0, "batch_size": 8, **changes})
    return args, resolve(args)


def process(rank: int = 0, world: int = 1) -> SimpleNamespace:
    """What the loaders ask of an accelerator."""
    return SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))


def serve(dataset, args, accelerator=None, *, start: int = 0, batches_per_epoch: int = 5):
    """The training batches of a run with these options."""
    return train_batches(
        dataset,
        accelerator or process(),
        batch_size=args.batch_size,
        batches_per_epoch=batches_per_epoch,
        start=start,
        seed=args.seed,
        workers=args.workers,
    )


def evaluate(dataset, args, accelerator=None):
    """The evaluation batches of a run with these options."""
    batch_size = args.validation_batch_size or args.batch_size
    return eval_loader(dataset, accelerator or process(), batch_size=batch_size, workers=args.workers)


def take(batches, n: int) -> list:
    return list(itertools.islice(batches, n))


def flat(lists) -> list:
    return list(itertools.chain.from_iterable(lists))


def same(a: list, b: list) -> bool:
    """Whether two lists of (images, targets) are equal bit for bit."""
    pairs = zip(flat(a), flat(b), strict=True)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in pairs)
