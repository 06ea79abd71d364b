"""Which class of the teacher stands for which class of the student."""

import json

import pytest
import torch
from helpers import refused
from torch import nn

from w2s.images.classes import Classes, MappedLogits, match_classes

PETS = ("cat", "dog", "guinea_pig")
ZOO = ("lion", "Dog", "guinea pig", "cat", "zebra")


def named(names: tuple) -> Classes:
    return Classes(len(names), (names,))


def columns(student: Classes, teacher: Classes, map_file: object = None, least: int = 1) -> list[int | None]:
    map_file = str(map_file) if map_file else None
    return match_classes(student, teacher, map_file=map_file, spec="the zoo", least=least).columns


# ---- without a file ----


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (PETS, ZOO, [3, 1, 2]),  # a superset, other cases and underscores
        (ZOO, PETS, [None, 1, 2, 0, None]),  # a subset
        (PETS, ("dog", "guinea pig", "cat"), [2, 0, 1]),  # another order
        (("Car", "car", "stop-sign", "stop sign"),) * 2 + ([0, 1, 2, 3],),  # the very same list
        (PETS, ("__background__", "cat", None, "dog", "guinea pig", None), [1, 3, 4]),
    ],
)
def test_classes_are_matched_by_name_where_one_side_has_all_of_the_other(student, teacher, expected):
    assert columns(named(student), named(teacher)) == expected


def test_unnamed_classes_are_matched_by_position():
    assert columns(Classes(3), named(PETS)) == [0, 1, 2]
    assert columns(named(PETS), Classes(3)) == [0, 1, 2]


def test_names_of_which_none_agree_are_not_matched_by_position():
    with refused("none of their names agree; say which belong together with --teacher-classes FILE"):
        columns(named(PETS), named(("chat", "chien", "cobaye")))


def test_every_way_to_name_the_classes_is_tried():
    teacher = Classes(3, (("tench", "goldfish", "shark"), ("n01440764", "n01443537", "n01484850")))
    assert columns(named(("n01484850", "n01440764")), teacher) == [2, 0]


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (Classes(2), named(ZOO), ("the teacher has 5 classes, the data 2", "--teacher-classes")),
        (named(("cat", "horse")), named(ZOO), ("only 1 of their names agree", "--teacher-classes")),
        (named(("cat", "horse", "dog")), named(PETS), ("only 2 of their names agree",)),  # equally many, no same order
        (named(("cat", "dog")), named(("cat", "dog", "dog")), ("the teacher has 3 classes, the data 2",)),  # which dog?
    ],
)
def test_what_cannot_be_matched_is_refused(student, teacher, words):
    with refused("the zoo", *words):
        columns(student, teacher)


def test_a_softmax_needs_two_shared_classes():
    with refused("shares 1 classes with the data, 2 are needed"):
        columns(named(PETS), named(("dog",)), least=2)


# ---- a file ----


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.txt", "cat\ndog\n-\n"),
        ("map.txt", "3\n1\n-"),
        ("map.txt", "cat\ndog\n\n"),
        ("map.json", json.dumps({"cat": "cat", "dog": 1})),
        ("map.yaml", "cat: Cat\n1: Dog\n"),
        ("map.yaml", "- cat\n- dog\n- '-'\n"),
    ],
)
def test_a_file_names_classes_or_labels(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert columns(named(PETS), named(ZOO), tmp_path / name) == [3, 1, None]


def test_the_very_name_comes_before_one_of_another_case(tmp_path):
    (tmp_path / "map.txt").write_text("Car\ncar\n")
    assert columns(Classes(2), named(("car", "Car", "van")), tmp_path / "map.txt") == [1, 0]


def test_a_name_comes_before_a_label(tmp_path):
    (tmp_path / "map.txt").write_text("2\n0\n")
    assert columns(Classes(2), named(("0", "1", "2")), tmp_path / "map.txt") == [2, 0]
    assert columns(Classes(2), named(("2", "1", "0")), tmp_path / "map.txt") == [0, 2]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("map.txt", "cat\ndog\n", ("2 entries, the data have 3 classes",)),
        ("map.txt", "cat\nzebar\n-\n", ("the teacher has no class 'zebar'", "did you mean zebra?")),
        ("map.txt", "cat\ndog\n5\n", ("the teacher has no class '5'",)),
        ("map.txt", "cat\ndog\ncat\n", ("class 'cat' of the teacher stands for two classes",)),
        ("map.json", '{"horse": "zebra"}', ("the data have no class 'horse'",)),
        ("map.yaml", "cat: [1, 2]\n", ("the teacher has no class",)),
        ("map.yaml", "cat", ("neither a map nor a list",)),
        ("map.yaml", "cat: : 1", ("cannot read",)),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with refused("--teacher-classes", name, *words):
        columns(named(PETS), named(ZOO), tmp_path / name)


def test_a_missing_file_is_refused(tmp_path):
    with refused("cannot read --teacher-classes", "nowhere.txt"):
        columns(named(PETS), named(ZOO), tmp_path / "nowhere.txt")


# ---- logits ----


def test_mapped_logits_are_the_models_own_in_the_students_order():
    model = nn.Linear(4, 5)
    x = torch.randn(3, 4)
    mapped = MappedLogits(model, [3, None, 1])(x)
    assert torch.equal(mapped[:, [0, 2]], model(x)[:, [3, 1]])
    assert (mapped[:, 1] == -torch.inf).all()
    assert torch.equal(mapped.softmax(-1)[:, [0, 2]], model(x)[:, [3, 1]].softmax(-1))
