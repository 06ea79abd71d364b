"""Detection data of a run: found, opened, checked and cut into splits."""

import json

import numpy as np
import pytest
from detection.annotated import changed, data_options, write_coco
from helpers import COCO
from PIL import Image

from w2s.detection.data import hold_out_images
from w2s.detection.options import open_report, open_training_data
from w2s.engine.errors import InputError

# ---- files ----


def test_an_image_that_is_corrupt_or_of_another_size_is_refused(tmp_path):
    folder = write_coco(tmp_path / "set")
    (folder / "train2017" / "3.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"corrupt image 3.png of .*instances_train2017.json"):
        open_training_data(data_options("--data", folder), first_label=0)
    Image.new("RGB", (30, 40)).save(folder / "train2017" / "3.png")
    with pytest.raises(InputError, match=r"3.png is \(30, 40\), its annotation says \(40, 30\)"):
        open_training_data(data_options("--data", folder), first_label=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "no data: --data FOLDER"),
        ("--train-json a", "no data: --data FOLDER, or all of"),
        ("--data nowhere", "no such folder"),
        ("--data set --train-json a", "exclude each other"),
        ("--data .", "has no instances_train"),
        ("--data set --switch-split half", "--switch-split half"),
        ("--data set --switch-split 1", "--switch-split 1"),
        ("--data set --switch-split 0.9", "leaves no image with objects"),
    ],
)
def test_bad_options(words, message, tmp_path, monkeypatch):
    write_coco(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        open_training_data(data_options(words), first_label=0)


def test_a_folder_with_several_annotation_files_of_a_part_is_refused(tmp_path):
    folder = write_coco(tmp_path / "set")
    (folder / "annotations" / "instances_val2014.json").write_text("{}")
    with pytest.raises(InputError, match=r"annotations has 2 instances_val\*\.json.*--val-json"):
        open_training_data(data_options("--data", folder), first_label=0)


def test_explicit_paths_and_splits_of_other_classes(tmp_path):
    a = write_coco(tmp_path / "a")
    b = write_coco(tmp_path / "b", changed(lambda d: d["categories"][2].update(name="fork")))
    train = ["--train-images", a / "train2017", "--train-json", a / "annotations" / "instances_train2017.json"]
    other = ["--val-images", b / "val2017", "--val-json", b / "annotations" / "instances_val2017.json"]
    with pytest.raises(InputError, match="classes of the two splits differ: fork"):
        open_training_data(data_options(train, other), first_label=0)
    same = ["--val-images", a / "val2017", "--val-json", a / "annotations" / "instances_val2017.json"]
    assert len(open_training_data(data_options(train, same), first_label=0).report) == 3


def test_a_reporting_split_without_a_box_is_refused(tmp_path):
    folder = write_coco(tmp_path / "set")
    file = folder / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    with pytest.raises(InputError, match=r"instances_val2017.json has no boxes to report on"):
        open_training_data(data_options("--data", folder), first_label=0)


def test_an_evaluation_opens_the_reporting_split_only(tmp_path):
    folder = write_coco(tmp_path / "set", parts=("val",))
    report = open_report(data_options("--data", folder), first_label=0)
    assert len(report) == 3 and report.source.classes == ["plane", "spoon", "brush"]
    paths = ["--val-images", folder / "val2017", "--val-json", folder / "annotations" / "instances_val2017.json"]
    assert len(open_report(data_options(paths), first_label=0)) == 3
    with pytest.raises(InputError, match="has no instances_train"):
        open_training_data(data_options("--data", folder), first_label=0)


@pytest.mark.skipif(not COCO.is_dir(), reason="the COCO subset is not there")
def test_the_coco_subset_opens():
    words = "--fix-boxes --switch-split 0.1 --check-images 4 --data"
    data = open_training_data(data_options(words, COCO), first_label=1)
    assert len(data.classes) == 80 and data.classes[0] == "person" and data.classes[-1] == "toothbrush"
    assert len(data.report) == 328 and data.sizes["train"] + data.sizes["switch"] <= 341
    crowds = sum(a["iscrowd"] for each in data.report.source.annotations for a in each)
    assert crowds == 21


# ---- splits ----


def test_images_without_boxes_are_dropped_from_training_only(tmp_path):
    folder = write_coco(tmp_path / "set")
    assert len(open_training_data(data_options("--data", folder), first_label=0).train) == 2
    data = open_training_data(data_options("--hflip 0 --keep-empty --data", folder), first_label=1)
    assert len(data.train) == len(data.report) == 3
    image, target = data.train.__getitems__([(0, 2)])[0]
    assert image.shape == (3, 30, 40) and target["boxes"].shape == (0, 4)
    assert data.train.__getitems__([(0, 0)])[0][1]["labels"].tolist() == [3, 1]  # the first class is 1 here


def test_a_dry_run_evaluates_few_images(tmp_path):
    images = [{"id": k, "file_name": f"{k}.png", "width": 8, "height": 8} for k in range(20)]
    annotations = [{"id": k, "image_id": k, "category_id": 1, "bbox": [1, 1, 4, 4]} for k in range(20)]
    data = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    folder = write_coco(tmp_path / "set", data)
    words = "--switch-split 0.5 --batch-size 1 --data"
    whole = open_training_data(data_options(words, folder), first_label=0)
    assert (len(whole.train), len(whole.switch), len(whole.report)) == (10, 10, 20)
    assert whole.sizes == {"train": 10, "boxes": 10, "switch": 10, "report": 20}
    few = open_training_data(data_options("--dry-run", words, folder), first_label=0)
    assert (len(few.train), len(few.switch), len(few.report)) == (10, 4, 4)
    assert len(open_report(data_options("--dry-run", words, folder), first_label=0)) == 4


def test_a_subset_to_train_on_is_the_same_in_all_arms(tmp_path):
    images = [{"id": k, "file_name": f"{k}.png", "width": 8, "height": 8} for k in range(20)]
    annotations = [{"id": k, "image_id": k, "category_id": 1, "bbox": [1, 1, 4, 4]} for k in range(20)]
    data = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    folder = write_coco(tmp_path / "set", data)

    def opened(words: str):
        return open_training_data(data_options(words, "--switch-split 0.1 --data", folder), first_label=0)

    whole, few, again = opened("--seed 1"), opened("--train-samples 5 --seed 2"), opened("--train-samples 5 --seed 3")
    assert few.train.rows == again.train.rows == sorted(set(few.train.rows)) and len(few.train.rows) == 5
    assert set(few.train.rows) < set(whole.train.rows) and few.switch.rows == whole.switch.rows
    assert few.train.rows != opened("--train-samples 5 --switch-seed 1").train.rows
    with pytest.raises(InputError, match="--train-samples 20: only 18 images"):
        opened("--train-samples 20")


def test_the_switch_split_depends_on_data_and_seed_only():
    generator = np.random.default_rng(0)
    labels = [generator.integers(0, 5, generator.integers(0, 4)) for _ in range(200)]
    train, switch = hold_out_images(labels, 0.1, seed=0)
    assert set(train) | set(switch) == set(range(200)) and not set(train) & set(switch)
    with_objects = sum(len(each) > 0 for each in labels)
    assert len(switch) == round(0.1 * with_objects) and all(len(labels[row]) for row in switch)
    assert hold_out_images(labels, 0.1, seed=0) == (train, switch) != hold_out_images(labels, 0.1, seed=1)
    assert hold_out_images(labels, 0, seed=0) == (list(range(200)), [])


def test_rare_classes_come_into_the_switch_split():
    labels = [np.array([0])] * 100 + [np.array([1]), np.array([1]), np.array([2])]
    train, switch = hold_out_images(labels, 0.05, seed=0)
    held_out = {label for row in switch for label in labels[row].tolist()}
    assert held_out == {0, 1}  # the only image of class 2 stays to train on
    assert {label for row in train for label in labels[row].tolist()} == {0, 1, 2}
