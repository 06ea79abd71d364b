"""Opening, checking and cutting real data: digits, image folders, Hugging Face datasets; every refusal in one line."""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from accelerate import PartialState
from helpers import refused
from images.pictures import hf_folder, picture, picture_folder

from train_cls import build_parser, resolve
from w2s.images.data import load_data


def load(dataset: str = "digits", data_dir: Path | None = None, **changes: object):
    """What a run of the script would train, switch and report on."""
    args = build_parser().parse_recipe(["--model", "resnet10t"])
    given = {"dataset": dataset, "data_dir": data_dir and str(data_dir), "img_size": 32, "workers": 0}
    vars(args).update(given | changes)
    config = resolve(args)
    return load_data(args, config, PartialState(), cache=args.cache)


def targets_in(split) -> list[int]:
    return [target for _, target in split.__getitems__([(0, position) for position in range(len(split))])]


# --- digits ----------------------------------------------------------------------------------------------------------


def test_digits_may_be_trained_on_as_the_grey_images_they_are():
    assert load(in_chans=1, check_images=0).report.__getitems__([(0, 0)])[0][0].shape == (32, 32, 1)


def test_digits_come_ready_for_a_run():
    data = load(switch_split="0.1")
    assert data.sizes == {"train": 1080, "switch": 120, "report": 597}
    assert (data.num_classes, data.samples) == (10, 1080)
    assert data.train.__getitems__([(0, 0)])[0][0].shape == (32, 32, 3)


# --- the switch split ------------------------------------------------------------------------------------------------


def switch_of(**changes: object) -> list[int]:
    return load(switch_split="0.1", check_images=0, **changes).switch.rows.tolist()


@pytest.mark.parametrize("changes", [{"seed": 7}, {"train_samples": 100}, {"seed": 3, "train_samples": 500}])
def test_the_switch_split_is_the_same_whatever_the_runs_seed_and_size(changes):
    assert switch_of(**changes) == switch_of()


def test_the_switch_split_differs_by_switch_seed():
    assert switch_of(switch_seed=1) != switch_of()


@pytest.mark.parametrize("samples", [None, 10, 11, 60, 500, 1079, 1080])
def test_nothing_of_the_switch_split_is_trained_on(samples):
    data = load(switch_split="0.1", train_samples=samples, check_images=0)
    assert not set(data.train.rows) & set(data.switch.rows)
    assert len(set(data.train.rows)) == len(data.train) == (samples or 1080)


def test_nothing_is_held_out_for_a_switch_split_of_zero():
    assert load(switch_split="0", check_images=0).switch is None


def test_the_switch_split_is_evaluated_without_augmentation():
    data = load(switch_split="0.1", check_images=0)
    first, second = (data.switch.__getitems__([(epoch, 5)])[0][0] for epoch in (0, 1))
    assert first.equal(second)


@pytest.mark.parametrize("fraction", ["1", "-0.1", "nan", "1.5", "held"])
def test_an_impossible_switch_split_is_refused(fraction):
    with refused("--switch-split", fraction):
        load(switch_split=fraction, check_images=0)


def test_a_negative_switch_seed_is_refused():
    with refused("--switch-seed"):
        load(switch_seed=-1, check_images=0)


# --- a smaller training set ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "counts"), [(100, {10}), (105, {10, 11}), (10, {1})])
def test_a_subset_is_balanced(samples, counts):
    data = load(train_samples=samples, check_images=0)
    per_class = np.bincount(data.train.dataset.targets[data.train.rows], minlength=10)
    assert per_class.sum() == samples and set(per_class) == counts


def test_a_subset_is_the_same_in_every_run():
    first, again, other = (load(train_samples=100, check_images=0, seed=seed).train.rows for seed in (0, 0, 5))
    assert np.array_equal(first, again) and np.array_equal(first, other)


def test_a_subset_is_drawn_not_cut_from_the_front():
    indices = load(train_samples=100, check_images=0).train.rows
    assert indices.max() > 600


@pytest.mark.parametrize("samples", [9, 1181])
def test_an_impossible_subset_is_refused(samples):
    with refused("--train-samples", str(samples), "1180"):
        load(train_samples=samples, check_images=0)


# --- image folders ---------------------------------------------------------------------------------------------------


def test_an_image_folder_is_read_with_its_classes_in_order(tmp_path):
    data = load("", picture_folder(tmp_path, train={"cat": 4, "ant": 3, "bee": 5}, val={"cat": 2, "ant": 1, "bee": 1}))
    assert data.sizes == {"train": 9, "switch": 3, "report": 4} and data.num_classes == 3
    assert targets_in(data.report) == [0, 1, 2, 2]


def test_a_class_map_chooses_the_classes_and_their_order(tmp_path):
    root = picture_folder(tmp_path, train={"cat": 4, "ant": 3, "bee": 5}, val={"cat": 2, "ant": 1, "bee": 1})
    (tmp_path / "map.txt").write_text("cat\nant\n")
    data = load("", root, class_map=str(tmp_path / "map.txt"))
    assert data.num_classes == 2 and targets_in(data.report) == [1, 0, 0]
    with refused("--class-map", "digits"):
        load(class_map=str(tmp_path / "map.txt"))
    with refused("nowhere.txt"):
        load("", root, class_map="nowhere.txt")


def test_a_class_that_the_reporting_split_lacks_is_refused(tmp_path):
    root = picture_folder(tmp_path, train={"ant": 3, "bee": 3, "cat": 3}, val={"ant": 1, "bee": 0, "cat": 2})
    with refused("class 'bee'", "split 'validation'", "no image"):
        load("", root)


def test_a_class_folder_without_images_in_training_is_the_cause_that_is_named(tmp_path):
    root = picture_folder(tmp_path, train={"ant": 3, "bee": 0, "cat": 3}, val={"ant": 1, "bee": 1, "cat": 2})
    with refused("class 'bee'", "split 'train'", "no image"):
        load("", root)


def test_a_class_that_only_the_reporting_split_has_is_refused(tmp_path):
    root = picture_folder(tmp_path, train={"ant": 3, "bee": 3}, val={"ant": 1, "wasp": 1})
    with refused("'wasp'", "'validation'"):
        load("", root)


def test_a_single_class_is_refused_since_the_images_lie_in_the_wrong_folder(tmp_path):
    root = picture_folder(tmp_path, train={"ant": 3}, val={"ant": 1})
    with refused("only one class", "train/CLASS/"):
        load("", root)


def test_more_classes_than_the_data_has_are_refused(tmp_path):
    root = picture_folder(tmp_path, train={"ant": 3, "bee": 3}, val={"ant": 1, "bee": 1})
    with refused("class 2", "no image"):
        load("", root, num_classes=4)


def test_fewer_classes_than_the_data_has_are_refused(tmp_path):
    root = picture_folder(tmp_path, train={"ant": 3, "bee": 3, "cat": 3}, val={"ant": 1})
    with refused("label 2", "--num-classes"):
        load("", root, num_classes=2)


def test_a_reporting_split_without_images_is_refused(tmp_path):
    root = picture_folder(tmp_path, train={"ant": 3, "bee": 3})
    (root / "val" / "ant").mkdir(parents=True)
    with refused("'validation'", str(root)):
        load("", root)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_an_image_folder_without_one_of_its_splits_is_refused(tmp_path, missing):
    """timm reads the whole folder then, so one split would lie within the other."""
    there = {"train", "val"} - {missing}
    root = picture_folder(tmp_path, **{split: {"ant": 3, "bee": 3} for split in there})
    with refused(str(root)):
        load("", root)


def test_a_misspelt_split_of_an_image_folder_is_refused(tmp_path):
    root = picture_folder(tmp_path, train={"ant": 3, "bee": 3}, val={"ant": 1, "bee": 1})
    with refused("vall"):
        load("", root, val_split="vall")


def test_the_same_split_for_training_and_reporting_is_refused(tmp_path):
    root = picture_folder(tmp_path, train={"ant": 3, "bee": 3}, val={"ant": 1, "bee": 1})
    with refused("--val-split"):
        load("", root, val_split="train")


def test_a_missing_folder_is_refused_by_name(tmp_path):
    with refused(str(tmp_path / "nowhere")):
        load("", tmp_path / "nowhere")


def test_no_data_at_all_is_refused_with_the_options_to_give():
    with refused("--dataset", "--data-dir"):
        load("")


@pytest.mark.parametrize("dataset", ["digit", "torch/nothing", "imagenet"])
def test_an_unknown_dataset_is_refused_by_name(dataset):
    with refused(dataset):
        load(dataset)


@pytest.mark.parametrize("dataset", ["imagefolder", "uoft-cs/cifar10", "hfds"])
def test_a_dataset_name_without_a_folder_is_refused_with_what_is_missing(dataset):
    with refused(f"--dataset {dataset}: ", "--data-dir", "hfds/NAME"):
        load(dataset)


def test_images_of_four_channels_are_refused(tmp_path):
    root = picture_folder(tmp_path, train={"ant": 3, "bee": 3}, val={"ant": 1, "bee": 1})
    with refused("--in-chans"):
        load("", root, in_chans=4)


def test_a_corrupt_image_ends_the_run_before_it_begins(tmp_path):
    root = picture_folder(tmp_path, train={"ant": 9, "bee": 9}, val={"ant": 1, "bee": 1})
    path = root / "train" / "bee" / "bee4.png"
    path.write_bytes(path.read_bytes()[:100])
    with refused("bee4.png"):
        load("", root)


@pytest.mark.parametrize("limit", [0, 3])
def test_only_so_many_images_are_decoded_first(tmp_path, limit):
    root = picture_folder(tmp_path, train={"ant": 9, "bee": 9}, val={"ant": 1, "bee": 1})
    (root / "train" / "bee" / "bee8.png").write_bytes(b"")
    load("", root, check_images=limit, switch_split="0")
    with refused("bee8.png"):
        load("", root, check_images=-1, switch_split="0")


def test_a_dry_run_reports_on_a_few_batches_only():
    data = load(dry_run=True, batch_size=8, switch_split="0.1", check_images=0)
    assert (len(data.report), len(data.switch), len(data.train)) == (32, 32, 1080)


# --- Hugging Face datasets -------------------------------------------------------------------------------------------


def load_hf(root: Path, **changes: object):
    return load(f"hfds/{root}", root.parent / "cache", **{"val_split": "test"} | changes)


def test_a_hugging_face_dataset_is_read_with_the_keys_that_are_given(tmp_path):
    names = datasets.ClassLabel(names=["ant", "bee", "cat"])
    root = hf_folder(tmp_path / "hf", [2, 0, 1] * 4, names, ("img", "fine"))
    data = load_hf(root, input_key="img", target_key="fine")
    assert data.sizes == {"train": 9, "switch": 3, "report": 12} and data.num_classes == 3
    assert targets_in(data.report) == [2, 0, 1] * 4


def test_labels_without_names_count_their_classes(tmp_path):
    data = load_hf(hf_folder(tmp_path / "hf", [3, 0, 1, 2] * 3))
    assert data.num_classes == 4 and len(data.report) == 12


@pytest.mark.parametrize(("in_chans", "mean"), [(1, [0.0]), (3, [0.0] * 3)])
def test_images_are_converted_to_the_channels_of_the_run(tmp_path, in_chans, mean):
    data = load_hf(hf_folder(tmp_path / "hf", [0, 1] * 3), in_chans=in_chans, mean=mean, std=[1.0] * in_chans)
    expected = np.asarray(picture(1).convert("L" if in_chans == 1 else "RGB")).reshape(32, 32, -1)
    assert np.array_equal(data.report.__getitems__([(0, 1)])[0][0], expected)


@pytest.mark.parametrize("names", [None, datasets.ClassLabel(names=["ant", "bee", "cat"])])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_an_image_in_a_split_of_a_hugging_face_dataset_is_refused(tmp_path, split, names):
    root = hf_folder(tmp_path / "hf", [2, 0, 1] * 3, names)
    hf_folder(tmp_path / "less", [2, 0] * 3, names)
    shutil.copy(tmp_path / "less" / "train.parquet", root / f"{split}.parquet")
    with refused("class 'bee'" if names else "class 1", f"split '{split}'", "no image"):
        load_hf(root)


def test_wrong_keys_are_refused(tmp_path):
    root = hf_folder(tmp_path / "hf", [0, 1] * 3)
    with refused("nothing"):
        load_hf(root, input_key="nothing")
    with refused("nothing", "--target-key"):
        load_hf(root, target_key="nothing")


def test_a_missing_split_or_dataset_is_refused(tmp_path):
    root = hf_folder(tmp_path / "hf", [0, 1] * 3)
    with refused("'valid'", str(root)):
        load_hf(root, val_split="valid")
    with refused(str(tmp_path / "nowhere")):
        load_hf(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("labels", "kind", "words"),
    [
        ([0, 1, -1] * 2, None, ("label -1", "row 2")),
        ([0.5, 1.0] * 3, datasets.Value("float32"), ("no integers", "--target-key")),
        (["ant", "bee"] * 3, datasets.Value("string"), ("no integers", "--target-key")),
        ([0, None, 1] * 2, None, ("no integers",)),
    ],
    ids=["negative", "float", "string", "missing"],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, kind, words):
    with refused(*words):
        load_hf(hf_folder(tmp_path / "hf", labels, kind))


def test_labels_out_of_range_are_refused(tmp_path):
    with refused("label 2", "row 1", "0..1"):
        load_hf(hf_folder(tmp_path / "hf", [0, 2, 1] * 2), num_classes=2)


def test_a_row_without_an_image_is_refused(tmp_path):
    root = hf_folder(tmp_path / "hf", [0, 1, 0, 1], without_image=2)
    with refused("row 2", "split 'train'"):
        load_hf(root, switch_split="0")


# --- reporting on the switch split, to choose settings ----------------------------------------------------------------


def test_settings_may_be_chosen_on_the_switch_split_in_place_of_the_test_data():
    data = load(val_split="switch", switch_split="0.1", check_images=0)
    assert data.report.rows.tolist() == data.switch.rows.tolist() == switch_of()
    assert data.sizes == {"train": 1080, "switch": 120, "report": 120}
    assert not set(data.report.rows) & set(data.train.rows)


def test_an_empty_switch_split_cannot_be_reported_on():
    with refused("--val-split switch reports on the switch split"):
        load(val_split="switch", switch_split="0", check_images=0)
