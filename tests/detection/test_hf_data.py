"""Hugging Face detection sets, whatever the layout of their objects and however they name their classes."""

from pathlib import Path

import datasets
import pytest
from detection.annotated import data_options
from PIL import ExifTags, Image

from w2s.detection.options import open_report, open_training_data
from w2s.engine.errors import InputError

BOX = [5.0, 6.0, 10.0, 10.0]


def write_objects(folder: Path, kind: str | list[str], **parts: dict[str, list]) -> None:
    """Splits of one image each, their classes of a plain kind, or a ClassLabel of these names."""
    label = datasets.Value(kind) if isinstance(kind, str) else datasets.ClassLabel(names=kind)
    inner = {"bbox": datasets.Sequence(datasets.Sequence(datasets.Value("float32"), length=4))}
    inner |= {"category": datasets.Sequence(label), "area": datasets.Sequence(datasets.Value("float32"))}
    features = datasets.Features({"image": datasets.Image(), "objects": inner})
    for split, objects in parts.items():
        rows = {"image": [Image.new("RGB", (40, 30))], "objects": [objects]}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")


@pytest.mark.parametrize("layout", ["lists", "structs"])
@pytest.mark.parametrize("bbox_format", ["xywh", "xyxy"])
def test_hugging_face_sets_open_like_any_other(layout, bbox_format, tmp_path):
    label = datasets.ClassLabel(names=["cat", "dog"])
    box = datasets.Sequence(datasets.Value("float32"), length=4)
    inner = {"bbox": datasets.Sequence(box), "category": datasets.Sequence(label)}
    if layout == "structs":
        inner = [{"bbox": box, "category": label}]
    features = datasets.Features({"image": datasets.Image(), "objects": inner})
    first = [5.0, 6.0, 15.0, 16.0] if bbox_format == "xyxy" else BOX
    objects = [{"bbox": [first], "category": [1]}, {"bbox": [], "category": []}]
    if layout == "structs":
        objects = [[{"bbox": first, "category": 1}], []]
    rows = {"image": [Image.new("RGB", (40, 30)), Image.new("L", (20, 20))], "objects": objects}
    table = datasets.Dataset.from_dict(rows, features)
    for split in ("train", "test"):
        table.to_parquet(tmp_path / "set" / f"{split}.parquet")
    words = ["--data", f"hfds/{tmp_path / 'set'}", "--bbox-format", bbox_format]
    data = open_training_data(data_options(words), first_label=0)
    assert data.classes == ["cat", "dog"] and len(data.train) == 1 and len(data.report) == 2
    assert data.report.sizes == [(40, 30), (20, 20)]
    image, target = data.report.item(0)
    assert image.shape == (3, 30, 40) and target["labels"].tolist() == [1]
    assert target["boxes"].tolist() == [[5, 6, 15, 16]]
    with pytest.raises(InputError, match="no column 'things'"):
        open_training_data(data_options(words, "--target-key things"), first_label=0)


def test_sizes_come_from_headers_and_heed_turned_images(tmp_path):
    """A camera's orientation, which decoding turns back, changes width and height."""
    picture, exif = Image.new("RGB", (40, 30)), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture.save(tmp_path / "upright.jpg")
    picture.save(tmp_path / "turned.jpg", exif=exif)
    cut = (tmp_path / "upright.jpg").read_bytes()[:-10]
    files = [(tmp_path / "upright.jpg").read_bytes(), (tmp_path / "turned.jpg").read_bytes(), cut]
    objects = {"bbox": [[1.0, 2.0, 10.0, 10.0]], "category": [0]}
    box = datasets.Sequence(datasets.Value("float32"), length=4)
    inner = {"bbox": datasets.Sequence(box), "category": datasets.Sequence(datasets.ClassLabel(names=["cat"]))}
    features = datasets.Features({"image": datasets.Image(), "objects": inner})
    rows = {"image": [{"bytes": content, "path": None} for content in files], "objects": [objects] * 3}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / "test.parquet")
    report = open_report(data_options("--data", f"hfds/{tmp_path / 'set'}", "--check-images 0"), first_label=0)
    assert report.sizes == [(40, 30), (30, 40), (40, 30)]  # of the last one, only the header is whole
    assert report.item(1)[0].shape == (3, 40, 30)
    rows["image"][2]["bytes"] = b"no image"
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "bad" / "test.parquet")
    with pytest.raises(InputError, match="corrupt image in row 2"):
        open_report(data_options("--data", f"hfds/{tmp_path / 'bad'}"), first_label=0)


def test_an_evaluation_opens_the_reporting_split_only(tmp_path):
    objects = {"bbox": [BOX], "category": [1], "area": [50.0]}
    write_objects(tmp_path / "named", ["cat", "dog"], test=objects)
    words = ["--data", f"hfds/{tmp_path / 'named'}"]
    report = open_report(data_options(words), first_label=0)
    assert len(report) == 1 and report.source.classes == ["cat", "dog"]
    with pytest.raises(InputError, match="cannot open split 'train'"):
        open_training_data(data_options(words), first_label=0)
    # without names the training split says what classes there are
    write_objects(tmp_path / "bare", "int64", train={**objects, "category": [2]}, test=objects)
    report = open_report(data_options("--data", f"hfds/{tmp_path / 'bare'}"), first_label=0)
    assert report.source.classes == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("kind", "train", "test", "names", "label"),
    [
        ("string", ["dog", "cat"], ["dog"], ["cat", "dog"], 1),
        ("int64", [0, 2], [1], ["0", "1", "2"], 1),  # the highest label is in one split only
    ],
)
def test_classes_without_names(kind, train, test, names, label, tmp_path):
    train_objects = {"bbox": [BOX] * 2, "category": train, "area": [30.0, 40.0]}
    test_objects = {"bbox": [BOX], "category": test, "area": [50.0]}
    write_objects(tmp_path, kind, train=train_objects, test=test_objects)
    data = open_training_data(data_options("--data", f"hfds/{tmp_path}"), first_label=0)
    assert data.classes == names and data.report.item(0)[1]["labels"].tolist() == [label]
    assert [a["area"] for a in data.train.source.annotations[0]] == [30, 40], "not the areas of the boxes"


@pytest.mark.parametrize(
    ("kind", "categories", "message"),
    [
        ("int64", [0], "row 0 has 2 boxes, but 1 under 'category'"),
        ("int64", [0, -1], "strings, or numbers from 0"),
        ("int64", [0, None], "strings, or numbers from 0"),
    ],
)
def test_bad_objects(kind, categories, message, tmp_path):
    objects = {"bbox": [BOX] * 2, "category": categories, "area": [1.0, 1.0]}
    write_objects(tmp_path, kind, train=objects, test=objects)
    with pytest.raises(InputError, match=message):
        open_training_data(data_options("--data", f"hfds/{tmp_path}"), first_label=0)
