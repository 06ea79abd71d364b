"""Opening image datasets and reading their images: the built-in digits, and all that timm's factory opens."""

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset

from w2s.engine.errors import InputError, first_line, on_one_line
from w2s.images.digits import Digits

READERS = ("hfds", "hfids", "tfds", "torch", "wds")  # timm's prefixes of what need not be a folder


def image_mode(in_chans: int) -> str:
    """The PIL mode of images with this many channels.

    Raises:
        InputError: neither 1 nor 3 channels.
    """
    if in_chans not in (1, 3):
        raise InputError(f"--in-chans {in_chans}: images have 1 or 3 channels")
    return "RGB" if in_chans == 3 else "L"


def open_dataset(
    dataset: str,
    split: str,
    *,
    data_dir: str | None,
    mode: str,
    input_key: str | None = None,
    target_key: str | None = None,
    class_map: dict[str, int] | str | None = None,
    labelled: bool = True,
) -> Dataset:
    """Open a split of a dataset with random access.

    Args:
        dataset: a name of `--dataset`; "" for the image folder `data_dir`.
        split: the name of the split.
        data_dir: the image folder, or the root of the dataset.
        mode: the PIL mode of the images.
        input_key, target_key: the columns of the image and the label, for datasets with columns.
        class_map: the index of each class by its name, or a file of it as timm reads it, in place of the dataset's own.
        labelled: whether labels are needed. If not, images without labels are all given class 0.

    Raises:
        InputError: the dataset cannot be opened, has no such split or column, or is empty.
    """
    if dataset == "digits":
        return Digits(split)
    if not dataset and data_dir and not os.path.exists(data_dir):
        raise InputError(f"--data-dir {data_dir}: no such folder")
    prefix, slash, _ = dataset.partition("/")
    if not (slash and prefix.lower() in READERS) and not data_dir:
        what = f"--dataset {dataset}" if dataset else "no data"
        raise InputError(f"{what}: give --data-dir FOLDER, or --dataset digits, hfds/NAME_OR_FOLDER or wds/...")
    columns = {"input_key": input_key, "target_key": target_key}
    opened = create_checked(dataset, split, data_dir=data_dir, mode=mode, class_map=class_map, **columns)
    opened.split_name = split  # for errors
    if len(opened) == 0:
        raise InputError(f"split '{split}' of dataset {dataset or data_dir} is empty")
    reader = getattr(opened, "reader", None)
    if isinstance(reader, ReaderImageFolder):
        reader.samples = PackedSamples(reader.samples)
    if hasattr(reader, "cache_tarfiles"):
        reader.cache_tarfiles = False  # threads and forked workers would share one file and its position in it
    if hasattr(reader, "samples") and os.path.isdir(data_dir) and os.path.samefile(reader.root, data_dir):
        # where timm finds no folder of the split, it takes all images below `data_dir`
        names = sorted(entry.name for entry in os.scandir(data_dir) if entry.is_dir() and entry.name[0] != ".")
        there = f", but {', '.join(names[:5])}{', ...' if names[5:] else ''}" if names else ""
        raise InputError(
            f"{data_dir} has no folder for the split '{split}'{there}; images belong in {split}/CLASS/, or see "
            "--train-split and --val-split"
        )
    _check_columns(reader, dataset, labelled)
    return opened


def create_checked(dataset: str, split: str, *, data_dir: str | None, mode: str, **options: object) -> Dataset:
    """What timm's factory makes of these arguments.

    Raises:
        InputError: in place of whatever the readers raise.
    """
    try:
        return create_dataset(dataset, root=data_dir, split=split, input_img_mode=mode, **options)
    except Exception as error:
        where = " ".join(filter(None, [dataset, data_dir]))
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"cannot open split '{split}' of dataset {where}: {reason}") from None


def _check_columns(reader: object, dataset: str, labelled: bool) -> None:
    """Refuse a Hugging Face dataset without the columns that are read, or fill in labels that are not needed."""
    image_key, label_key = getattr(reader, "image_key", None), getattr(reader, "label_key", None)
    if image_key and reader.dataset[0].get(image_key) is None:
        raise InputError(f"dataset {dataset} has nothing in column '{image_key}'; see --input-key")
    if label_key and reader.dataset[0].get(label_key) is None:
        if labelled:
            raise InputError(f"dataset {dataset} has nothing in column '{label_key}'; see --target-key")
        others = reader.dataset.select_columns([c for c in reader.dataset.column_names if c != label_key])
        reader.dataset = others.add_column(label_key, [0] * len(others))


class PackedSamples(Sequence):
    """(path, label) of many files, in arrays.

    Forked workers share arrays with the main process. The objects of a list they would copy, one page after the other,
    by counting references to them.

    Args:
        samples: (path, label) of each file.
    """

    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        paths = [os.fsencode(path) for path, _ in samples]
        self._text = np.frombuffer(b"".join(paths), np.uint8)
        self._ends = np.cumsum([0, *map(len, paths)])
        self.targets = np.asarray([target for _, target in samples])

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[str, int]:
        index = range(len(self))[index]
        path = self._text[self._ends[index] : self._ends[index + 1]].tobytes()
        return os.fsdecode(path), self.targets[index].item()


def class_names(dataset: Dataset) -> dict[str, int]:
    """The index of each class by its name; empty where the dataset does not name its classes."""
    return getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {}


def targets_of(dataset: Dataset, split: str, num_classes: int | None) -> np.ndarray:
    """All labels of a dataset, (N,) int64.

    Raises:
        InputError: labels that are no integers, several labels an image, or a label out of range.
    """
    reader = getattr(dataset, "reader", None)
    try:
        if hasattr(dataset, "targets"):
            targets = np.asarray(dataset.targets)
        elif isinstance(reader, ReaderImageFolder):
            targets = reader.samples.targets
        elif hasattr(reader, "samples"):
            targets = np.asarray([target for _, target in reader.samples])
        elif hasattr(reader, "label_key"):
            targets = np.asarray(reader.dataset.with_format("numpy")[reader.label_key][:])
        else:
            targets = np.asarray([dataset[i][1] for i in range(len(dataset))])
        targets = targets.astype(np.int64, casting="same_kind")
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"the labels of split '{split}' are no integers: {on_one_line(error)}; see --target-key"
        ) from None
    if targets.ndim != 1:
        raise InputError(f"images of split '{split}' have {targets.shape[1]} labels each, not one; see --target-key")
    bound = num_classes if num_classes is not None else targets.max() + 1
    wrong = np.flatnonzero((targets < 0) | (targets >= bound))
    if len(wrong):
        raise InputError(
            f"label {targets[wrong[0]]} of row {wrong[0]} in split '{split}' is out of range 0..{max(bound, 1) - 1}; "
            "see --num-classes and --target-key"
        )
    return targets


def read_image(dataset: Dataset, row: int, mode: str) -> tuple[Image.Image, int]:
    """The decoded image and the target of one row.

    Raises:
        InputError: the image is missing or corrupt; it is named. (timm would silently take the next one.)
    """
    reader = getattr(dataset, "reader", None)
    try:
        image, target = (reader[row] if reader is not None else dataset[row])[:2]
        if not isinstance(image, Image.Image):
            with image:
                return Image.open(image).convert(mode), int(target)
        return image.convert(mode), int(target)
    except Exception as error:  # Pillow and the readers raise many kinds
        try:
            path = reader.filename(row, absolute=True) if reader is not None else None
        except Exception:
            path = None
        split = getattr(dataset, "split_name", None)
        name = f" {path}" if path else ""
        where = f"row {row} of split '{split}'" if split else f"row {row}"
        raise InputError(f"corrupt image{name} ({where}): {on_one_line(error, limit=200)}") from None
