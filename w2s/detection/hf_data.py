"""Hugging Face detection sets (a column of images and one of objects with boxes) in COCO's terms."""

from collections.abc import Iterator
from io import BytesIO

from PIL import ExifTags, Image

from w2s.detection.annotations import AnnotatedImages, annotate
from w2s.engine.errors import InputError, first_line, on_one_line

CATEGORY_KEYS = ("category", "categories", "category_id", "label", "labels")


class _Split:
    """A split whose objects are a mapping of parallel lists for each image.

    Args:
        name: of the set on the hub, or its folder.
        split: of the set.
        image_key, objects_key: its columns.

    Attributes:
        where: names the split in errors.
        objects: for each image, lists of equal length under `bbox`, `iscrowd`, `area` and `category_key`.
        category_key: the key under which the objects have their classes.
        class_names: of a ClassLabel, or None.

    Raises:
        InputError: it cannot be opened, or columns are missing or do not fit each other.
    """

    def __init__(self, name: str, split: str, image_key: str, objects_key: str) -> None:
        import datasets  # here, because this import takes a second and no other data need it

        self.where, self.image_key = f"split '{split}' of {name}", image_key
        try:
            self.dataset = datasets.load_dataset(name, split=split)
        except Exception as error:  # the hub and the builders raise many kinds
            raise InputError(f"cannot open {self.where}: {type(error).__name__}: {first_line(error)}") from None
        for key in (image_key, objects_key):
            if key not in self.dataset.column_names:
                columns = ", ".join(self.dataset.column_names)
                raise InputError(f"{self.where} has no column '{key}', but {columns}; see --input-key and --target-key")
        self.objects = [_as_lists(objects) for objects in self.dataset[objects_key]]
        keys = {key for objects in self.objects for key in objects}
        self.category_key = next((key for key in CATEGORY_KEYS if key in keys), None)
        if "bbox" not in keys or self.category_key is None:
            raise InputError(
                f"{self.where}: '{objects_key}' has {sorted(keys)}, not bbox and one of {', '.join(CATEGORY_KEYS)}"
            )
        self._complete_objects()
        self.class_names = _class_names(self.dataset.features[objects_key], self.category_key)

    def _complete_objects(self) -> None:
        """Fill in what is optional, and check that the lists of an image are equally long.

        Raises:
            InputError: they are not.
        """
        for row, objects in enumerate(self.objects):
            objects["bbox"] = objects.get("bbox") or []
            objects[self.category_key] = objects.get(self.category_key) or []
            count = len(objects["bbox"])
            objects["iscrowd"] = objects.get("iscrowd") or objects.get("is_crowd") or [0] * count
            objects["area"] = objects.get("area") or [None] * count
            for key in (self.category_key, "iscrowd", "area"):
                if len(objects[key]) != count:
                    raise InputError(
                        f"{self.where}: row {row} has {count} boxes, but {len(objects[key])} under '{key}'"
                    )

    def read(self, row: int) -> Image.Image:
        """The RGB image of a row."""
        return self.dataset[row][self.image_key].convert("RGB")

    def images(self) -> list[dict]:
        """id, width and height of each image: from columns of these names, or else the row and the image's header."""
        present = self.dataset.column_names
        ids = self.dataset["image_id"] if "image_id" in present else range(len(self.dataset))
        if "width" in present and "height" in present:
            sizes = zip(self.dataset["width"], self.dataset["height"], strict=True)
        else:
            sizes = self._sizes()
        return [
            {"id": image_id, "width": width, "height": height}
            for image_id, (width, height) in zip(ids, sizes, strict=True)
        ]

    def _sizes(self) -> Iterator[tuple[int, int]]:
        """(width, height) of each image, from its header.

        Raises:
            InputError: an image is missing or corrupt.
        """
        import datasets

        encoded = self.dataset.select_columns([self.image_key])
        encoded = encoded.cast_column(self.image_key, datasets.Image(decode=False))
        for row, entry in enumerate(encoded):
            path, content = entry[self.image_key]["path"], entry[self.image_key]["bytes"]
            try:
                with Image.open(path if content is None else BytesIO(content)) as image:
                    is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # which decoding turns back
                    yield image.size[::-1] if is_turned else image.size
            except Exception as error:  # Pillow raises many kinds
                raise InputError(f"corrupt image in row {row} of {self.where}: {on_one_line(error, 200)}") from None

    def annotated(self, classes: list[str], *, bbox_format: str, fix_boxes: bool) -> AnnotatedImages:
        """The split in COCO's terms; for the arguments see `open_hf`."""
        images, annotations = self.images(), []
        for image, objects in zip(images, self.objects, strict=True):
            columns = (objects["bbox"], objects[self.category_key], objects["iscrowd"], objects["area"])
            for box, category, is_crowd, area in zip(*columns, strict=True):
                if bbox_format == "xyxy" and box and len(box) == 4 and None not in box:
                    box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image["id"],
                        "category_id": classes.index(category) if isinstance(category, str) else category,
                        "bbox": box,
                        "iscrowd": is_crowd,
                        "area": area,
                    }
                )
        categories = [{"id": label, "name": name} for label, name in enumerate(classes)]
        truth = {"images": images, "annotations": annotations, "categories": categories}
        return annotate(truth, where=self.where, fix_boxes=fix_boxes, read=self.read)


def open_hf(
    name: str,
    *,
    train_split: str,
    report_split: str,
    image_key: str,
    objects_key: str,
    bbox_format: str,
    fix_boxes: bool,
    with_train: bool,
) -> tuple[AnnotatedImages | None, AnnotatedImages]:
    """The training and the reporting split of a Hugging Face set; None for the former unless `with_train`.

    Args:
        name: of the set on the hub, or its folder.
        train_split, report_split: names of the splits.
        image_key, objects_key: columns of the images and of their objects.
        bbox_format: "xywh" (corner and size) or "xyxy" (two corners).
        fix_boxes: see `annotate`.
        with_train: whether training images are needed.

    Raises:
        InputError: a split cannot be opened, columns are missing, or `annotate` refuses the annotations.
    """
    report = _Split(name, report_split, image_key, objects_key)
    if with_train or report.class_names is None:
        # without a ClassLabel the classes are those that either split uses
        splits = [_Split(name, train_split, image_key, objects_key), report]
    else:
        splits = [report]
    used = {category for split in splits for objects in split.objects for category in objects[split.category_key]}
    if all(isinstance(category, str) for category in used):
        used_names = sorted(used)
    elif all(isinstance(category, int) and category >= 0 for category in used):
        used_names = [str(label) for label in range(max(used) + 1)]
    else:
        used_names = []
    if not used_names and any(split.class_names is None for split in splits):
        raise InputError(f"{splits[0].where}: '{splits[0].category_key}' has to hold strings, or numbers from 0")
    annotated = [
        split.annotated(split.class_names or used_names, bbox_format=bbox_format, fix_boxes=fix_boxes)
        for split in (splits if with_train else [report])
    ]
    return (annotated[0] if with_train else None), annotated[-1]


def _as_lists(objects: dict | list[dict]) -> dict[str, list]:
    """The objects of an image as parallel lists, also where they are stored as a list of objects."""
    if isinstance(objects, dict):
        return dict(objects)
    return {key: [entry[key] for entry in objects] for key in (objects[0] if objects else ())}


def _class_names(feature: object, key: str) -> list[str] | None:
    """The names of a ClassLabel inside a sequence of structures or a structure of sequences."""
    for _ in range(3):  # sequence, structure, sequence: a ClassLabel lies no deeper
        if hasattr(feature, "names"):
            return list(feature.names)
        feature = feature.get(key) if isinstance(feature, dict) else getattr(feature, "feature", None)
        if isinstance(feature, list):
            feature = feature[0]
    return list(feature.names) if hasattr(feature, "names") else None
