"""Detection data: annotation checks, splits, crowds, Hugging Face sets, the built-in digits."""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import COCO
from PIL import Image

from w2s.detection import digits as digits_det
from w2s.detection.data import annotate, load_detection, open_detection, read_coco, split_training
from w2s.detection.digits import draw_canvas, write_digits
from w2s.detection.loading import check_images
from w2s.engine.errors import InputError


def truth() -> dict:
    """Three images, the last without objects; category ids with a gap, in no order; a crowd."""
    images = [{"id": k, "file_name": f"{k}.png", "width": 40, "height": 30} for k in (7, 3, 9)]
    boxes = [(1, 7, 90, [2, 3, 10, 12]), (2, 7, 4, [0, 0, 40, 30]), (3, 3, 4, [5, 5, 8.5, 9])]
    annotations = [
        {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for number, image, category, box in boxes
    ]
    annotations.append({"id": 4, "image_id": 3, "category_id": 90, "bbox": [1, 1, 30, 20], "area": 300, "iscrowd": 1})
    categories = [{"id": 90, "name": "brush"}, {"id": 4, "name": "plane"}, {"id": 50, "name": "spoon"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(folder: Path, data: dict | None = None, parts: tuple[str, ...] = ("train", "val")) -> Path:
    """`data` in COCO's layout, with noise for pictures."""
    data = data or truth()
    (folder / "annotations").mkdir(parents=True)
    for part in parts:
        (folder / f"{part}2017").mkdir()
        for image in data["images"]:
            pixels = np.random.default_rng(image["id"]).integers(0, 255, (image["height"], image["width"], 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{part}2017" / image["file_name"])
        (folder / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(data))
    return folder


def options(data: object = None, **changes: object) -> argparse.Namespace:
    """The options that data depend on."""
    args = dict.fromkeys(("train_images", "train_json", "val_images", "val_json", "input_key", "target_key"))
    args |= {"data": data and str(data), "train_split": "train", "val_split": "test", "bbox_format": "xywh"}
    args |= {"fix_boxes": False, "keep_empty": False, "check_images": -1, "switch_split": "0", "switch_seed": 0}
    args |= {"seed": 0, "dry_run": False, "eval_only": False, "batch_size": 2, "output": "."}
    args |= {"photometric": False, "lsj": None, "scale_jitter": None, "hflip": 0.5, "max_size": 100}
    return argparse.Namespace(**{**args, **changes})


# ---- annotations ----


def test_labels_follow_the_category_ids_and_crowds_are_not_trained_on():
    source = annotate(truth(), "here", False, None)
    assert source.names == ["plane", "spoon", "brush"] and source.category_ids == [4, 50, 90]
    assert [labels.tolist() for labels in source.labels] == [[2, 0], [0], []]
    assert source.boxes[0].tolist() == [[2, 3, 12, 15], [0, 0, 40, 30]]
    assert source.boxes[2].shape == (0, 4)
    assert [a["iscrowd"] for a in source.annotations[1]] == [0, 1]  # the metric knows of the crowd
    assert source.truth([1])["images"][0]["id"] == 3 and len(source.truth([1])["annotations"]) == 2


def broken(change) -> dict:
    data = copy.deepcopy(truth())
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("categories"), "not in COCO's format: KeyError: 'categories'"),
        (lambda d: d["images"][0].pop("width"), "not in COCO's format"),
        (lambda d: d["images"].clear(), "has no images"),
        (lambda d: d["images"][0].update(id=3), "image id 3 is there twice"),
        (lambda d: d["annotations"][0].update(id=2), "annotation id 2 is there twice"),
        (lambda d: d["categories"][0].update(id=4), "category id 4 is there twice"),
        (lambda d: d["images"][0].update(width=None), r"image 7 has no width and height in pixels, but \(None, 30\)"),
        (lambda d: d["images"][1].update(height="30"), "image 3 has no width and height"),
        (lambda d: d["annotations"][0].update(iscrowd="no"), "annotation 1 has iscrowd 'no'"),
        (lambda d: d["annotations"][0].update(area="big"), "annotation 1 has iscrowd 0 and area 'big'"),
        (lambda d: d["annotations"][0].update(image_id=8), "annotation 1 has unknown image_id 8"),
        (lambda d: d["annotations"][0].update(category_id=1), "annotation 1 has unknown category_id 1"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), "annotation 1 has no bbox of four numbers"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "no bbox of four numbers"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 0, 5]), r"1 boxes have no area.*annotation 1.*--fix-boxes"),
        (lambda d: d["annotations"][0].update(bbox=[30, 2, 20, 5]), "reach outside their image"),
        (lambda d: d["annotations"][0].update(bbox=[50, 2, 9, 5]), "reach outside their image"),
    ],
)
def test_bad_annotations_are_refused_in_one_line(change, message):
    with pytest.raises(InputError, match=message) as error:
        annotate(broken(change), "here", False, None)
    assert "\n" not in str(error.value)


def test_boxes_are_fixed_on_request_and_the_metric_still_sees_them_as_they_are():
    def change(data):
        for annotation, box in zip(data["annotations"], ([30, 2, 20, 5], [50, 2, 9, 5], [1, 1, 0, 4]), strict=False):
            annotation["bbox"] = box

    source = annotate(broken(change), "here", True, None)
    assert [boxes.tolist() for boxes in source.boxes] == [[[30, 2, 40, 7]], [], []]
    assert [a["bbox"] for a in source.annotations[0]] == [[30, 2, 20, 5], [50, 2, 9, 5]]


def test_what_is_null_is_not_given():
    source = annotate(broken(lambda d: d["annotations"][0].update(iscrowd=None, area=None)), "here", False, None)
    assert source.annotations[0][0]["iscrowd"] == 0 and source.annotations[0][0]["area"] == 120


def test_rounding_at_the_border_is_no_mistake():
    source = annotate(broken(lambda d: d["annotations"][0].update(bbox=[-0.4, 0, 40.6, 30.5])), "here", False, None)
    assert source.boxes[0][0].tolist() == pytest.approx([0, 0, 40, 30])


def test_files(tmp_path):
    folder = write(tmp_path / "set")
    train, report = open_detection(options(folder))
    assert train.read(0).size == (40, 30) and len(report.images) == 3
    (folder / "train2017" / "3.png").unlink()
    with pytest.raises(InputError, match=r"1 images of .*instances_train2017.json are not in .*: 3.png"):
        open_detection(options(folder))
    (folder / "train2017" / "3.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"corrupt image 3.png of .*instances_train2017.json"):
        load_detection(options(folder), 0)
    Image.new("RGB", (30, 40)).save(folder / "train2017" / "3.png")
    with pytest.raises(InputError, match=r"3.png is \(30, 40\), its annotation says \(40, 30\)"):
        check_images(
            read_coco(folder / "train2017", folder / "annotations" / "instances_train2017.json", False), [1], -1
        )


def test_the_images_that_are_decoded_first_are_spread_over_the_split():
    opened = []
    source = argparse.Namespace(
        images=[{"id": row, "width": 4, "height": 4} for row in range(20)],
        read=lambda row: opened.append(row) or Image.new("RGB", (4, 4)),
    )
    check_images(source, list(range(10, 19)), 3)
    assert sorted(opened) == [10, 13, 16]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "no data: --data FOLDER"),
        ({"train_json": "a"}, "no data: --data FOLDER, or all of"),
        ({"data": "nowhere"}, "no such folder"),
        ({"data": "set", "train_json": "a"}, "exclude each other"),
        ({"data": "."}, "has no instances_train"),
        ({"data": "set", "switch_split": "half"}, "--switch-split half"),
        ({"data": "set", "switch_split": "1"}, "--switch-split 1"),
        ({"data": "set", "switch_split": "0.9"}, "leaves no image with objects"),
    ],
)
def test_bad_options(changes, message, tmp_path, monkeypatch):
    write(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        load_detection(options(**changes), 0)


def test_explicit_paths_and_splits_of_other_classes(tmp_path):
    a = write(tmp_path / "a")
    b = write(tmp_path / "b", broken(lambda d: d["categories"][2].update(name="fork")))
    names = {"train_images": a / "train2017", "train_json": a / "annotations" / "instances_train2017.json"}
    names |= {"val_images": b / "val2017", "val_json": b / "annotations" / "instances_val2017.json"}
    with pytest.raises(InputError, match="classes of the two splits differ: fork"):
        load_detection(options(**names), 0)
    names |= {"val_images": a / "val2017", "val_json": a / "annotations" / "instances_val2017.json"}
    assert len(load_detection(options(**names), 0).report) == 3


def test_an_evaluation_opens_the_reporting_split_only(tmp_path):
    folder = write(tmp_path / "set", parts=("val",))
    data = load_detection(options(folder, eval_only=True), 0)
    assert data.train is None and len(data.report) == 3 and data.classes == ["plane", "spoon", "brush"]
    paths = {"val_images": folder / "val2017", "val_json": folder / "annotations" / "instances_val2017.json"}
    assert len(load_detection(options(eval_only=True, **paths), 0).report) == 3
    with pytest.raises(InputError, match="has no instances_train"):
        load_detection(options(folder), 0)


def test_an_evaluation_opens_the_reporting_split_of_a_hugging_face_set_only(tmp_path):
    objects = {"bbox": [[5.0, 6.0, 10.0, 10.0]], "category": [1], "area": [50.0]}
    write_objects(tmp_path / "named", ["cat", "dog"], test=objects)
    data = load_detection(options(f"hfds/{tmp_path / 'named'}", eval_only=True), 0)
    assert data.train is None and len(data.report) == 1 and data.classes == ["cat", "dog"]
    with pytest.raises(InputError, match="cannot open split 'train'"):
        load_detection(options(f"hfds/{tmp_path / 'named'}"), 0)
    # without names the training split says what classes there are
    write_objects(tmp_path / "bare", "int64", train={**objects, "category": [2]}, test=objects)
    data = load_detection(options(f"hfds/{tmp_path / 'bare'}", eval_only=True), 0)
    assert data.train is None and data.classes == ["0", "1", "2"]


# ---- splits ----


def test_images_without_boxes_are_dropped_from_training_only(tmp_path):
    folder = write(tmp_path / "set")
    assert len(load_detection(options(folder), 0).train) == 2
    data = load_detection(options(folder, keep_empty=True), 1)
    assert len(data.train) == len(data.report) == 3
    image, target = data.train.__getitems__([(0, 2)])[0]
    assert image.shape == (3, 30, 40) and target["boxes"].shape == (0, 4)
    assert data.train.__getitems__([(0, 0)])[0][1]["labels"].tolist() == [3, 1]  # the first class is 1 here


def test_the_switch_split_depends_on_data_and_seed_only():
    generator = np.random.default_rng(0)
    labels = [generator.integers(0, 5, generator.integers(0, 4)) for _ in range(200)]
    train, switch = split_training(labels, 0.1, 0)
    assert set(train) | set(switch) == set(range(200)) and not set(train) & set(switch)
    with_objects = sum(len(each) > 0 for each in labels)
    assert len(switch) == round(0.1 * with_objects) and all(len(labels[row]) for row in switch)
    assert split_training(labels, 0.1, 0) == (train, switch) != split_training(labels, 0.1, 1)
    assert split_training(labels, 0, 0) == (list(range(200)), [])


def test_rare_classes_come_into_the_switch_split():
    labels = [np.array([0])] * 100 + [np.array([1]), np.array([1]), np.array([2])]
    train, switch = split_training(labels, 0.05, 0)
    held = {label for row in switch for label in labels[row].tolist()}
    assert held == {0, 1}  # the only image of class 2 stays to train on
    assert {label for row in train for label in labels[row].tolist()} == {0, 1, 2}


# ---- other sources ----


@pytest.mark.parametrize("layout", ["lists", "structs"])
@pytest.mark.parametrize("corners", [False, True])
def test_hugging_face_sets_come_through_the_same_door(layout, corners, tmp_path):
    import datasets

    label = datasets.ClassLabel(names=["cat", "dog"])
    box = datasets.Sequence(datasets.Value("float32"), length=4)
    inner = {"bbox": datasets.Sequence(box), "category": datasets.Sequence(label)}
    if layout == "structs":
        inner = [{"bbox": box, "category": label}]
    features = datasets.Features({"image": datasets.Image(), "objects": inner})
    first = [5.0, 6.0, 15.0, 16.0] if corners else [5.0, 6.0, 10.0, 10.0]
    objects = {"bbox": [first], "category": [1]}, {"bbox": [], "category": []}
    if layout == "structs":
        objects = [{"bbox": first, "category": 1}], []
    rows = {"image": [Image.new("RGB", (40, 30)), Image.new("L", (20, 20))], "objects": list(objects)}
    table = datasets.Dataset.from_dict(rows, features)
    for split in ("train", "test"):
        table.to_parquet(tmp_path / "set" / f"{split}.parquet")
    args = options(f"hfds/{tmp_path / 'set'}", bbox_format="xyxy" if corners else "xywh")
    data = load_detection(args, 0)
    assert data.classes == ["cat", "dog"] and len(data.train) == 1 and len(data.report) == 2
    assert data.report.sizes == [(40, 30), (20, 20)]
    image, target = data.report.item(0)
    assert image.shape == (3, 30, 40) and target["labels"].tolist() == [1]
    assert target["boxes"].tolist() == [[5, 6, 15, 16]]
    args.target_key = "things"
    with pytest.raises(InputError, match="no column 'things'"):
        load_detection(args, 0)


def write_objects(folder: Path, kind: str | list[str], **parts: dict[str, list]) -> None:
    """Splits of one image each, their classes of a plain kind, or a ClassLabel of these names."""
    import datasets

    label = datasets.Value(kind) if isinstance(kind, str) else datasets.ClassLabel(names=kind)
    inner = {"bbox": datasets.Sequence(datasets.Sequence(datasets.Value("float32"), length=4))}
    inner |= {"category": datasets.Sequence(label), "area": datasets.Sequence(datasets.Value("float32"))}
    features = datasets.Features({"image": datasets.Image(), "objects": inner})
    for split, objects in parts.items():
        rows = {"image": [Image.new("RGB", (40, 30))], "objects": [objects]}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")


@pytest.mark.parametrize(
    ("kind", "train", "test", "names", "label"),
    [
        ("string", ["dog", "cat"], ["dog"], ["cat", "dog"], 1),
        ("int64", [0, 2], [1], ["0", "1", "2"], 1),  # the highest label is in one split only
    ],
)
def test_hugging_face_classes_without_names(kind, train, test, names, label, tmp_path):
    box = [5.0, 6.0, 10.0, 10.0]
    train = {"bbox": [box] * 2, "category": train, "area": [30.0, 40.0]}
    test = {"bbox": [box], "category": test, "area": [50.0]}
    write_objects(tmp_path, kind, train=train, test=test)
    data = load_detection(options(f"hfds/{tmp_path}"), 0)
    assert data.classes == names and data.report.item(0)[1]["labels"].tolist() == [label]
    assert [a["area"] for a in data.train.source.annotations[0]] == [30, 40], "not the boxes'"


@pytest.mark.parametrize(
    ("kind", "categories", "message"),
    [
        ("int64", [0], "row 0 has 2 boxes, but 1 under 'category'"),
        ("int64", [0, -1], "strings, or numbers from 0"),
        ("int64", [0, None], "strings, or numbers from 0"),
    ],
)
def test_bad_hugging_face_objects(kind, categories, message, tmp_path):
    objects = {"bbox": [[5.0, 6.0, 10.0, 10.0]] * 2, "category": categories, "area": [1.0, 1.0]}
    write_objects(tmp_path, kind, train=objects, test=objects)
    with pytest.raises(InputError, match=message):
        load_detection(options(f"hfds/{tmp_path}"), 0)


def test_the_built_in_digits_are_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        write_digits(tmp_path / name, train=3, val=2, size=96)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 7
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    write_digits(tmp_path / "c", train=3, val=2, size=96, seed=1)
    assert (tmp_path / "a" / files[2]).read_bytes() != (tmp_path / "c" / files[2]).read_bytes()
    data = load_detection(options(tmp_path / "a"), 0)
    assert data.classes == [str(k) for k in range(10)] and len(data.train) == 3
    assert not list(tmp_path.glob(".*")), "nothing half-written stays"


def test_the_built_in_digits_are_kept_once_and_not_in_a_dry_run(tmp_path, monkeypatch):
    small, left = {"train": 3, "val": 2, "size": 96, "digits": 2, "seed": 0}, []
    monkeypatch.setattr(digits_det, "PARAMETERS", small)
    monkeypatch.setattr(digits_det.atexit, "register", lambda *call, **kwargs: left.append((*call, kwargs)))
    monkeypatch.setattr(digits_det.tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    output = tmp_path / "out"
    assert len(load_detection(options("digits_det", output=output, dry_run=True), 0).train) == 3
    assert not output.exists() and len(list((tmp_path / "scratch").iterdir())) == 1
    for remove, path, kwargs in left:
        remove(path, **kwargs)
    assert not list((tmp_path / "scratch").iterdir())
    load_detection(options("digits_det", output=output), 0)
    assert not output.exists(), "a run that is refused later leaves nothing"
    digits_det.keep_digits(output / "digits_det")
    assert not list(output.glob(".*")), "nothing half-written stays"
    written = (output / "digits_det" / "annotations" / "instances_val2017.json").stat().st_mtime_ns
    load_detection(options("digits_det", output=output), 0)
    load_detection(options("digits_det", output=output, dry_run=True), 0)
    digits_det.keep_digits(output / "digits_det")
    assert (output / "digits_det" / "annotations" / "instances_val2017.json").stat().st_mtime_ns == written
    monkeypatch.setattr(digits_det, "PARAMETERS", small | {"seed": 1})
    with pytest.raises(InputError, match="digits_det is not the built-in set as it is written today: remove"):
        load_detection(options("digits_det", output=output), 0)


def test_digits_lie_in_their_boxes():
    class Bars:
        """A digit that is a full bar, on a background of nothing."""

        def __len__(self):
            return 1

        def __getitem__(self, index):
            pixels = np.zeros((8, 8), np.uint8)
            pixels[:, 3:5] = 255
            return Image.fromarray(pixels), 4

    counts = set()
    for seed in range(20):
        canvas, boxes = draw_canvas(Bars(), np.random.default_rng(seed), 96, 6)
        counts.add(len(boxes))
        blank, _ = draw_canvas(Bars(), np.random.default_rng(seed), 96, 1)
        covered = np.zeros((96, 96), int)
        for label, (x, y, width, height) in boxes:
            assert label == 4 and height > 2 * width and min(x, y) >= 0 and x + width <= 96 and y + height <= 96
            covered[y : y + height, x : x + width] += 1
        assert covered.max() == 1, "digits do not overlap"
        assert canvas.size == blank.size == (96, 96)
    assert len(counts) > 3 and max(counts) <= 6


@pytest.mark.skipif(not COCO.is_dir(), reason="the COCO subset is not there")
def test_the_coco_subset_opens():
    data = load_detection(options(COCO, fix_boxes=True, switch_split="0.1", check_images=4), 1)
    assert len(data.classes) == 80 and data.classes[0] == "person" and data.classes[-1] == "toothbrush"
    assert len(data.report) == 328 and data.facts["train"] + data.facts["switch"] <= 341
    crowds = sum(a["iscrowd"] for each in data.report.source.annotations for a in each)
    assert crowds == 21
