"""Hugging Face detection sets (an image column and an `objects` column with boxes) in COCO's terms."""

from w2s.coco import Annotated, annotate
from w2s.options import InputError

CATEGORY_KEYS = ("category", "categories", "category_id", "label", "labels")


def open_hf(args, split: str) -> Annotated:
    """A split of `--data hfds/NAME_OR_FOLDER`.

    Raises:
        InputError: it cannot be opened, columns are missing, or its annotations are refused by `annotate`.
    """
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
    names = _class_names(dataset.features[objects_key], category)
    if names is None:
        used = {value for entry in entries for value in entry.get(category, [])}
        names = [str(k) for k in range(max(used, default=-1) + 1)]
    truth = {"images": _images(dataset, image_key), "annotations": []}
    truth["categories"] = [{"id": label, "name": name} for label, name in enumerate(names)]
    for image, entry in zip(truth["images"], entries, strict=True):
        crowds = entry.get("iscrowd") or entry.get("is_crowd") or [0] * len(entry.get("bbox", []))
        for box, label, crowd in zip(entry.get("bbox", []), entry.get(category, []), crowds, strict=True):
            if args.bbox_format == "xyxy":
                box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            number = len(truth["annotations"]) + 1
            truth["annotations"].append({"id": number, "image_id": image["id"], "category_id": label, "bbox": box})
            truth["annotations"][-1]["iscrowd"] = int(crowd)
    return annotate(truth, where, args.fix_boxes, lambda row: dataset[row][image_key].convert("RGB"))


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
        return objects
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
