"""Teachers of other classes: which class of the teacher stands for which class of the student."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor, nn

from w2s.engine.errors import InputError, did_you_mean, on_one_line

NOTHING = ("", "-", "~", "null")  # in the place of a class that the teacher does not know


class Classes(NamedTuple):
    """The classes of a data set or a model.

    Attributes:
        count: how many there are.
        namings: names of them all in the order of the labels, one tuple for each way to name them (ImageNet has words
            and synsets); empty where they have no names. None stands for a label without a class.
    """

    count: int
    namings: tuple[tuple[str | None, ...], ...] = ()

    def find(self, text: str) -> int | None:
        """The label of the class that a text means, by name or else by index; None if it means no class."""
        for names in self.namings:
            if text in names:  # also where another name differs in its case alone
                return names.index(text)
            if (label := _labels(names).get(_plain(text))) is not None:
                return label
        return int(text) if text.isascii() and text.isdigit() and int(text) < self.count else None


class ClassMap(NamedTuple):
    """Which class of the teacher stands for each class of the student.

    Attributes:
        columns: the teacher's label for each class of the student, None for those that the teacher does not know.
        how: by what they were matched, for the messages.
    """

    columns: list[int | None]
    how: str

    @property
    def known(self) -> list[int]:
        """The student's classes that the teacher knows."""
        return [label for label, column in enumerate(self.columns) if column is not None]

    def is_identity(self, count: int) -> bool:
        """Whether a teacher of `count` classes has the student's classes, and no others, in the student's order."""
        return self.columns == list(range(count))

    def describe(self) -> str:
        """One line for the start of a run."""
        known = len(self.known)
        line = f"the teacher knows {known} of the {len(self.columns)} classes, matched {self.how}"
        return line if known == len(self.columns) else f"{line}; it teaches these only, and is scored on all images"


def match_classes(student: Classes, teacher: Classes, *, map_file: str | None, spec: str, least: int = 1) -> ClassMap:
    """Match the classes of teacher and student: by a file; by name where both have names and one side has all those of
    the other; by position where one side has no names and they are equally many.

    Args:
        student, teacher: the classes of both.
        map_file: --teacher-classes, see `_read_map`.
        spec: names the teacher in errors.
        least: how many classes they must share at least.

    Raises:
        InputError: the file cannot be read or does not fit, or the classes cannot be matched without one.
    """
    if map_file:
        columns, how = _read_map(Path(map_file), student, teacher), f"by {map_file}"
    else:
        columns, how = _match_names(student, teacher)
    if columns is None:
        raise InputError(
            f"the teacher has {teacher.count} classes, the data {student.count}: {spec} does not fit{how}; say which "
            "belong together with --teacher-classes FILE, one class of the teacher on a line, by name or number"
        )
    matched = ClassMap(columns, how)
    if len(matched.known) < least:
        raise InputError(f"the teacher {spec} shares {len(matched.known)} classes with the data, {least} are needed")
    return matched


def _match_names(student: Classes, teacher: Classes) -> tuple[list[int | None] | None, str]:
    """The teacher's labels and how they were found; None and a hint where they cannot be."""
    most = 0
    for own_names in student.namings:
        for names in teacher.namings:
            if own_names == names and None not in names:  # the same data, also where two of its names are alike
                return list(range(student.count)), "by name"
            own, other = _labels(own_names), _labels(names)
            is_unique = len(own) == student.count and len(other) == sum(name is not None for name in names)
            shared = len(own.keys() & other.keys())
            if is_unique and shared and shared in (len(own), len(other)):
                return [other.get(_plain(name)) for name in own_names], "by name"
            most = max(most, shared)
    if student.namings and teacher.namings:  # the order of names that disagree may not be trusted
        return None, f", and {f'only {most}' if most else 'none'} of their names agree"
    if student.count == teacher.count and not any(None in names for names in teacher.namings):
        return list(range(student.count)), "by position"
    return None, ""


def _read_map(path: Path, student: Classes, teacher: Classes) -> list[int | None]:
    """The teacher's label for each of the student's classes, from a file.

    The file names a class of the teacher on each line, in the order of the student's classes, or it is YAML or JSON: a
    map from the student's class to the teacher's, or a list like the lines. Classes go by their names or, where no
    class has that name, by their labels from 0 up. A class that the teacher does not know is left out of a map, and
    has `-` on its line.

    Raises:
        InputError: it cannot be read, names no such class, or names a class of the teacher twice.
    """
    option = f"--teacher-classes {path}"
    try:
        text = path.read_text(encoding="utf-8")
        is_yaml = path.suffix in (".yaml", ".yml", ".json")
        entries = yaml.load(text, yaml.BaseLoader) if is_yaml else [line.strip() for line in text.splitlines()]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {option}: {on_one_line(error, limit=200)}") from None
    if not isinstance(entries, dict | list):
        raise InputError(f"{option} holds neither a map nor a list")
    if isinstance(entries, list) and len(entries) != student.count:
        raise InputError(f"{option} has {len(entries)} entries, the data have {student.count} classes")
    pairs = entries.items() if isinstance(entries, dict) else enumerate(entries)
    columns: list[int | None] = [None] * student.count
    for own, other in pairs:
        label = own if isinstance(own, int) else _find(student, own, f"{option}: the data have")
        column = None
        if not (other in NOTHING and teacher.find(other) is None):
            column = _find(teacher, other, f"{option}: the teacher has")
        if column is not None and column in columns:
            raise InputError(f"{option}: class '{other}' of the teacher stands for two classes of the data")
        columns[label] = column
    return columns


def _find(classes: Classes, entry: object, whose: str) -> int:
    text = entry if isinstance(entry, str) else str(entry)
    label = classes.find(text)
    if label is None:
        names = [name for naming in classes.namings for name in naming if name is not None]
        hint = did_you_mean(text, names) or f"; they are {classes.count}"
        raise InputError(f"{whose} no class '{text}'{hint}")
    return label


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ").replace("-", " ").strip()


def _labels(names: Sequence[str | None]) -> dict[str, int]:
    return {_plain(name): label for label, name in enumerate(names) if name is not None}


class MappedLogits(nn.Module):
    """A model's logits in the order of the student's classes, `-inf` for those that it does not know.

    Args:
        model: gives logits (..., its own classes).
        columns: of a `ClassMap`.
    """

    def __init__(self, model: nn.Module, columns: Sequence[int | None]) -> None:
        super().__init__()
        self.model, self.num_classes = model, len(columns)
        missing = [column is None for column in columns]
        self.register_buffer("columns", torch.tensor([column or 0 for column in columns]), persistent=False)
        self.register_buffer("missing", torch.tensor(missing), persistent=False)

    def forward(self, *inputs: object) -> Tensor:
        """Logits (..., the student's classes)."""
        return self.model(*inputs)[..., self.columns].masked_fill(self.missing, -math.inf)
