"""The built-in detection data: scikit-learn's digits pasted on textured canvases, in COCO's layout.

    python -m w2s.detection.digits FOLDER [--train N] [--val N] [--size PX] [--digits MAX] [--seed N]

Every image is a function of (seed, split, number). The training canvases show none of the digits of the val canvases.
"""

import argparse
import atexit
import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from w2s.engine.errors import InputError
from w2s.engine.files import replacing_folder
from w2s.engine.randomness import mix_seed
from w2s.images.digits import Digits

PARAMETERS = {"train": 600, "val": 100, "size": 96, "digits": 6, "seed": 0}  # of --data digits_det
DIGIT_SIDE = (0.12, 0.36)  # shortest and longest side of a digit, as shares of the canvas
ATTEMPTS = 20  # to find a free spot for a digit
_temporary: dict[Path, Path] = {}  # where a set is until `keep_digits` copies it to the folder that is the key


def built_in_digits(folder: Path) -> Path:
    """Where the built-in set is: in `folder`, or, while that does not exist, in a temporary one of this process."""
    if folder.exists():
        return folder
    scratch = tempfile.mkdtemp(prefix=f"{folder.name}.")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    _temporary[folder] = Path(scratch) / folder.name
    write_digits(_temporary[folder], **PARAMETERS)
    return _temporary[folder]


def keep_digits(folder: Path) -> None:
    """Copy to `folder` what `built_in_digits` wrote elsewhere. To be called when a run begins: a refused run leaves no
    data behind."""
    if written := _temporary.pop(folder, None):
        with replacing_folder(folder, keep_existing=True) as beside:
            shutil.copytree(written, beside, dirs_exist_ok=True)


def check_digits(folder: Path) -> None:
    """Refuse a folder that was written with other parameters, or by something else.

    Raises:
        InputError: it does not hold the built-in set.
    """
    for file in folder.glob("annotations/*.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads(file.read_text()).get("info") == PARAMETERS:
                return
    raise InputError(f"{folder} is not the built-in set as it is written today: remove or rename it")


def write_digits(
    folder: Path, *, train: int = 600, val: int = 100, size: int = 96, digits: int = 6, seed: int = 0
) -> None:
    """Write train2017/, val2017/ and annotations/ into `folder`, complete or not at all.

    Args:
        folder: where to write. If it holds files by the time that the set is complete, these stay as they are.
        train, val: numbers of images.
        size: height and width of a canvas in pixels.
        digits: at most so many on a canvas, and at least one.
        seed: of all images.
    """
    with replacing_folder(folder, keep_existing=True) as beside:
        (beside / "annotations").mkdir()
        for number, (split, count) in enumerate((("train", train), ("val", val))):
            truth = _write_split(
                beside / f"{split}2017",
                source=Digits("test" if split == "val" else "train"),
                seed=(seed, number),
                count=count,
                size=size,
                digits=digits,
            )
            truth["info"] = {"train": train, "val": val, "size": size, "digits": digits, "seed": seed}
            (beside / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(truth))


def _write_split(folder: Path, *, source: Digits, seed: tuple[int, int], count: int, size: int, digits: int) -> dict:
    """Write the images of a split into `folder`, and return their annotations in COCO's format.

    Args:
        folder: must not exist yet.
        source: the digits to paste.
        seed: the seed of the set, and the number of the split.
        count: number of images.
        size, digits: see `write_digits`.
    """
    folder.mkdir()
    images, annotations = [], []
    for index in range(count):
        generator = np.random.default_rng(mix_seed(*seed, index))
        canvas, boxes = draw_canvas(source, generator, size=size, digits=digits)
        name = f"{index + 1:012d}.jpg"
        canvas.save(folder / name, quality=95)
        images.append({"id": index + 1, "file_name": name, "height": size, "width": size})
        for label, box in boxes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": label + 1,
                    "iscrowd": 0,
                    "bbox": list(box),
                    "area": box[2] * box[3],
                }
            )
    categories = [{"id": label + 1, "name": str(label)} for label in range(10)]
    return {"images": images, "annotations": annotations, "categories": categories}


def draw_canvas(source: Digits, generator: np.random.Generator, *, size: int, digits: int) -> tuple[Image.Image, list]:
    """A canvas with 1 to `digits` digits that do not overlap, and their (label, (x, y, width, height)) in pixels."""
    canvas = _texture(generator, size)
    is_taken = np.zeros((size, size), bool)
    boxes = []
    for _ in range(int(generator.integers(1, digits + 1))):
        opacity, label = _random_digit(source, generator, size)
        height, width = opacity.shape
        for _ in range(ATTEMPTS):
            y = int(generator.integers(0, size - height + 1))
            x = int(generator.integers(0, size - width + 1))
            if not is_taken[y : y + height, x : x + width].any():
                break
        else:
            continue  # the canvas is full
        is_taken[y : y + height, x : x + width] = True
        background = canvas[y : y + height, x : x + width]
        # a colour far from the background, so that every digit can be seen
        colour = (background.mean((0, 1)) + generator.uniform(90, 165, 3)) % 256
        background += opacity[..., None] * (colour.astype(np.float32) - background)  # in place, on the canvas
        boxes.append((label, (x, y, width, height)))
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), boxes


def _random_digit(source: Digits, generator: np.random.Generator, size: int) -> tuple[np.ndarray, int]:
    """A digit of random size for a canvas of `size` pixels, cropped to its strokes: opacity (H, W), and its label."""
    image, label = source[int(generator.integers(len(source)))]
    side = round(size * generator.uniform(*DIGIT_SIDE))
    opacity = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
    is_stroke = opacity > 0.25
    rows = np.flatnonzero(is_stroke.any(axis=1))
    columns = np.flatnonzero(is_stroke.any(axis=0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], label


def _texture(generator: np.random.Generator, size: int) -> np.ndarray:
    """Coloured noise of several scales, (size, size, 3) in 0..255."""
    canvas = np.full((size, size, 3), generator.uniform(64, 192, 3), np.float32)
    for cells, strength in ((4, 40), (12, 20), (size // 3, 12)):
        noise = generator.uniform(-strength, strength, (cells, cells, 3)).astype(np.float32)
        layers = [Image.fromarray(noise[..., c]).resize((size, size), Image.Resampling.BICUBIC) for c in range(3)]
        canvas += np.stack([np.asarray(layer) for layer in layers], -1)
    return canvas.clip(0, 255)


def main(argv: list[str] | None = None) -> None:
    """Write the set into a folder, with the parameters of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, default in PARAMETERS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    options = vars(parser.parse_args(argv))
    write_digits(options.pop("folder"), **options)


if __name__ == "__main__":
    main()
