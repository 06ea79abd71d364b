"""The built-in detection data: scikit-learn's digits pasted on textured canvases, in COCO's layout.

python -m w2s.detection.digits FOLDER [--train N] [--val N] [--size PX] [--digits MAX] [--seed N]

Every image is a function of (seed, split, number). The digits of val are those no training canvas shows.
"""

import argparse
import atexit
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from w2s.engine.errors import InputError
from w2s.engine.randomness import mix_seed
from w2s.images.digits import Digits

PARAMETERS = {"train": 600, "val": 100, "size": 96, "digits": 6, "seed": 0}  # of --data digits_det
SIDES = (0.12, 0.36)  # of a digit, as shares of the canvas
TRIES = 20  # to find a free place
_temporary: dict[Path, Path] = {}  # folder -> where its set is until it is kept


def built_in_digits(folder: Path) -> Path:
    """Where the built-in set is: `folder`, or while it is not there, a temporary one of this process."""
    if folder.exists():
        return folder
    scratch = tempfile.mkdtemp(prefix=f"{folder.name}.")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    _temporary[folder] = Path(scratch) / folder.name
    write_digits(_temporary[folder], **PARAMETERS)
    return _temporary[folder]


def keep_digits(folder: Path) -> None:
    """Copy there what `built_in_digits` made: once a run begins, so that one that is refused leaves nothing."""
    if made := _temporary.pop(folder, None):
        with _complete(folder) as beside:
            shutil.copytree(made, beside)


@contextlib.contextmanager
def _complete(folder: Path) -> Iterator[Path]:
    """Gives a path to write to that becomes `folder`; where another process was quicker, its files stay."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        yield (beside := Path(scratch) / "set")
        with contextlib.suppress(OSError):  # not empty: it is there already
            beside.rename(folder)


def check_digits(folder: Path) -> None:
    """Refuse a folder that other parameters, or something else, made.

    Raises:
        InputError: it is not the built-in set.
    """
    for file in folder.glob("annotations/*.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads(file.read_text()).get("info") == PARAMETERS:
                return
    raise InputError(f"{folder} is not the built-in set as it is written today: remove or rename it")


def write_digits(folder: Path, train: int = 600, val: int = 100, size: int = 96, digits: int = 6, seed: int = 0):
    """Write train2017/, val2017/ and annotations/ into `folder`, complete or not at all.

    Args:
        folder: must not exist yet; where another process was quicker, its files stay.
        train, val: numbers of images.
        size: height and width of a canvas in pixels.
        digits: at most so many on a canvas, at least one.
        seed: of everything.
    """
    with _complete(folder) as beside:
        (beside / "annotations").mkdir(parents=True)
        for number, (split, count) in enumerate((("train", train), ("val", val))):
            truth = _write_split(beside / f"{split}2017", (seed, number), count, size, digits)
            truth["info"] = {"train": train, "val": val, "size": size, "digits": digits, "seed": seed}
            (beside / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(truth))


def _write_split(folder: Path, key: tuple[int, int], count: int, size: int, digits: int) -> dict:
    folder.mkdir()
    source = Digits("test" if key[1] else "train")
    images, annotations = [], []
    for index in range(count):
        canvas, boxes = draw_canvas(source, np.random.default_rng(mix_seed(*key, index)), size, digits)
        name = f"{index + 1:012d}.jpg"
        canvas.save(folder / name, quality=95)
        images.append({"id": index + 1, "file_name": name, "height": size, "width": size})
        for label, box in boxes:
            annotation = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": label + 1, "iscrowd": 0}
            annotations.append(annotation | {"bbox": list(box), "area": box[2] * box[3]})
    categories = [{"id": label + 1, "name": str(label)} for label in range(10)]
    return {"images": images, "annotations": annotations, "categories": categories}


def draw_canvas(source: Digits, generator: np.random.Generator, size: int, digits: int) -> tuple[Image.Image, list]:
    """A canvas with 1 to `digits` digits apart from each other, and their (label, (x, y, width, height)) in pixels."""
    pixels = _texture(generator, size)
    taken = np.zeros((size, size), bool)
    boxes = []
    for _ in range(int(generator.integers(1, digits + 1))):
        image, label = source[int(generator.integers(len(source)))]
        side = round(size * generator.uniform(*SIDES))
        ink = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
        rows, columns = (np.flatnonzero((ink > 0.25).any(axis)) for axis in (1, 0))
        ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        height, width = ink.shape
        for _ in range(TRIES):
            y, x = (int(generator.integers(0, size - extent + 1)) for extent in (height, width))
            if not taken[y : y + height, x : x + width].any():
                break
        else:
            continue  # the canvas is full
        taken[y : y + height, x : x + width] = True
        place = pixels[y : y + height, x : x + width]
        # a colour far from what lies beneath, so that every digit can be seen
        colour = (place.mean((0, 1)) + generator.uniform(90, 165, 3)) % 256
        place += ink[..., None] * (colour.astype(np.float32) - place)
        boxes.append((label, (x, y, width, height)))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), boxes


def _texture(generator: np.random.Generator, size: int) -> np.ndarray:
    """Coloured noise of several scales, (size, size, 3) in 0..255."""
    pixels = np.full((size, size, 3), generator.uniform(64, 192, 3), np.float32)
    for cells, strength in ((4, 40), (12, 20), (size // 3, 12)):
        noise = generator.uniform(-strength, strength, (cells, cells, 3)).astype(np.float32)
        layers = [Image.fromarray(noise[..., c]).resize((size, size), Image.Resampling.BICUBIC) for c in range(3)]
        pixels += np.stack([np.asarray(layer) for layer in layers], -1)
    return pixels.clip(0, 255)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, default in PARAMETERS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    options = vars(parser.parse_args(argv))
    write_digits(options.pop("folder"), **options)


if __name__ == "__main__":
    main()
