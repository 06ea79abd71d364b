"""Hugging Face detection sets (an image column and an `objects` column with boxes) in COCO's terms."""

from dataclasses import dataclass

from w2s.detection.data import Annotated, annotate
from w2s.engine.errors import InputError

CATEGORY_KEYS = ("category", "categories", "category_id", "label", "labels")


@dataclass
class _Part:
    """A split as it was opened: one entry of lists an image, and under which key its categories are."""

    dataset: "datasets.Dataset"  # noqa: F821
    where: str
    entries: list[dict[str, list]]
    category: str
    names: list[str] | None  # of a ClassLabel


def open_hf(args) -> tuple[Annotated | None, Annotated]:
    """The training and the reporting split of `--data hfds/NAME_OR_FOLDER`; --eval-only gets None for the former.

    Raises:
        InputError: one cannot be opened, columns are missing, or its annotations are refused by `annotate`.
    """
    report = _open(args, args.val_split)
    # classes without a ClassLabel are those that either split uses
    parts = [report] if args.eval_only and report.names else [_open(args, args.train_split), report]
    used = {label for part in parts for entry in part.entries for label in entry[part.category]}
    if all(isinstance(label, str) for label in used):
        names = sorted(used)
    elif all(isinstance(label, int) and label >= 0 for label in used):
        names = [str(label) for label in range(max(used) + 1)]
    else:
        names = []
    if not names and any(part.names is None for part in parts):
        raise InputError(f"{parts[0].where}: '{parts[0].category}' has to hold strings, or numbers from 0")
    train = None if args.eval_only else _annotated(parts[0], parts[0].names or names, args)
    return train, _annotated(report, report.names or names, args)


def _open(args, split: str) -> _Part:
    import datasets

    name = args.data.partition("/")[2]
    where = f"split '{split}' of {name}"
    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub and the builders raise many kinds
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise InputError(f"cannot open {where}: {type(error).__name__}: {reason}") from None
    image_key, objects_key = args.input_key or "image", args.target_key or "objects"
    if missing := [key for key in (image_key, objects_key) if key not in dataset.column_names]:
        there = ", ".join(dataset.column_names)
        raise InputError(f"{where} has no column '{missing[0]}', but {there}; see --input-key and --target-key")
    entries = [_by_key(entry) for entry in dataset[objects_key]]
    keys = {key for entry in entries for key in entry}
    category = next((key for key in CATEGORY_KEYS if key in keys), None)
    if "bbox" not in keys or category is None:
        raise InputError(f"{where}: '{objects_key}' has {sorted(keys)}, not bbox and one of {', '.join(CATEGORY_KEYS)}")
    for row, entry in enumerate(entries):
        entry["bbox"], entry[category] = entry.get("bbox") or [], entry.get(category) or []
        boxes = len(entry["bbox"])
        entry["iscrowd"] = entry.get("iscrowd") or entry.get("is_crowd") or [0] * boxes
        entry["area"] = entry.get("area") or [None] * boxes
        for key in (category, "iscrowd", "area"):
            if len(entry[key]) != boxes:
                raise InputError(f"{where}: row {row} has {boxes} boxes, but {len(entry[key])} under '{key}'")
    return _Part(dataset, where, entries, category, _class_names(dataset.features[objects_key], category))


def _annotated(part: _Part, names: list[str], args) -> Annotated:
    image_key = args.input_key or "image"
    truth = {"images": _images(part.dataset, image_key), "annotations": []}
    truth["categories"] = [{"id": label, "name": name} for label, name in enumerate(names)]
    for image, entry in zip(truth["images"], part.entries, strict=True):
        columns = (entry["bbox"], entry[part.category], entry["iscrowd"], entry["area"])
        for box, label, crowd, area in zip(*columns, strict=True):
            if args.bbox_format == "xyxy" and box and len(box) == 4 and None not in box:
                box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            number, label = len(truth["annotations"]) + 1, names.index(label) if isinstance(label, str) else label
            annotation = {"id": number, "image_id": image["id"], "category_id": label, "bbox": box}
            truth["annotations"].append(annotation | {"iscrowd": crowd, "area": area})
    return annotate(truth, part.where, args.fix_boxes, lambda row: part.dataset[row][image_key].convert("RGB"))


def _images(dataset, image_key: str) -> list[dict]:
    """id, width and height: columns where there are such, else the row number and the image itself."""
    columns = {key: dataset[key] for key in ("image_id", "width", "height") if key in dataset.column_names}
    ids = columns.get("image_id", range(len(dataset)))
    if "width" in columns and "height" in columns:
        sizes = zip(columns["width"], columns["height"], strict=True)
    else:
        sizes = (image.size for image in dataset[image_key])
    return [{"id": key, "width": width, "height": height} for key, (width, height) in zip(ids, sizes, strict=True)]


def _by_key(objects: dict | list[dict]) -> dict[str, list]:
    """A list of objects as lists of their properties."""
    if isinstance(objects, dict):
        return dict(objects)
    return {key: [entry[key] for entry in objects] for key in (objects[0] if objects else ())}


def _class_names(feature: object, key: str) -> list[str] | None:
    """The names of a ClassLabel inside a sequence of structures or a structure of sequences."""
    for _ in range(3):
        if hasattr(feature, "names"):
            return list(feature.names)
        feature = feature.get(key) if isinstance(feature, dict) else getattr(feature, "feature", None)
        if isinstance(feature, list):
            feature = feature[0]
    return list(feature.names) if hasattr(feature, "names") else None
