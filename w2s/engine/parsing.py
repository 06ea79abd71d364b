"""Command lines and recipes: YAML files that hold the same options.

`-c recipe.yaml` comes first, the command line over it. A recipe goes through the same parser as the command line, so an
unknown key or a value of the wrong type is refused in the same way.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from timm.utils import ParseKwargs

from w2s.engine.errors import InputError, on_one_line


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are `InputError`s and that reads recipes."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_argument("-c", "--config", metavar="FILE", help="YAML recipe; the command line overrides it")

    def error(self, message: str) -> None:
        raise InputError(message)

    def parse_recipe(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse a command line and the recipe it names.

        Raises:
            InputError: unknown option or key, wrong type, unreadable recipe.
        """
        config = self.parse_args(argv).config
        if not config:
            return self.parse_args(argv)
        tokens = self._recipe_tokens(Path(config))
        try:
            self.parse_args(tokens)
        except InputError as error:
            raise InputError(f"{config}: {error}") from None
        return self.parse_args(tokens + list(sys.argv[1:] if argv is None else argv))

    def _recipe_tokens(self, path: Path) -> list[str]:
        recipe = read_recipe(path)
        actions = {option[2:]: action for option, action in self._option_string_actions.items() if option[:2] == "--"}
        tokens = []
        for key, value in recipe.items():
            option = str(key).replace("_", "-")
            action = actions.get(option)
            negative = isinstance(action, argparse.BooleanOptionalAction) and f"--{option}" != action.option_strings[0]
            if action is None or option in ("config", "help") or negative:
                close = difflib.get_close_matches(option, actions, n=1)
                hint = f", did you mean '{close[0]}'?" if close else ""
                raise InputError(f"{path}: unknown key '{key}'{hint}")
            tokens += _tokens(path, key, action, value)
        return tokens


def read_recipe(path: Path) -> dict:
    """The keys and values of a recipe.

    Raises:
        InputError: it cannot be read or is no mapping.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(f"cannot read recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"recipe {path} is no text file") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no valid YAML: {on_one_line(error)}") from None
    if not isinstance(recipe, dict):
        raise InputError(f"{path} must be a mapping of options, not a {type(recipe).__name__}")
    return recipe


def _tokens(path: Path, key: str, action: argparse.Action, value: object) -> list[str]:
    """An entry of a recipe as words of a command line."""
    option = action.option_strings[0] if len(action.option_strings) == 1 else f"--{action.dest.replace('_', '-')}"
    if value is None or value == []:  # an empty list is the default, as args.yaml has it
        return []
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise InputError(f"{path}: '{key}' must be true or false, got {value!r}")
        return [option if value else f"--no-{option[2:]}"]
    if isinstance(action, ParseKwargs):
        if not isinstance(value, dict):
            raise InputError(f"{path}: '{key}' must be a mapping of NAME: VALUE, got {value!r}")
        return [option, *(f"{name}={item!r}" for name, item in value.items())]
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and action.nargs is None:
        raise InputError(f"{path}: '{key}' takes one value, got the list {value!r}")
    if any(isinstance(item, bool | dict | list) for item in values):
        raise InputError(f"{path}: '{key}' has a value of the wrong type: {value!r}")
    return [option, *map(str, values)] if action.nargs is not None else [f"{option}={values[0]}"]


class Switch(argparse.BooleanOptionalAction):
    """A yes/no option; unlike its base it may itself be called --no-something."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


class KeyValues(ParseKwargs):
    """timm's NAME=VALUE words, with its errors as argparse knows them; true and false mean what they do in a recipe."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            super().__call__(parser, namespace, values, option_string)
        except (ValueError, SyntaxError):
            raise argparse.ArgumentError(self, f"takes NAME=VALUE words, got {' '.join(values)}") from None
        pairs = getattr(namespace, self.dest)
        truths = {"true": True, "false": False}  # to timm they are words, and a word counts as true
        pairs.update({k: truths[v] for k, v in pairs.items() if isinstance(v, str) and v in truths})


def add_switch(group: argparse._ArgumentGroup, name: str, help: str, default: bool = False) -> None:
    """A yes/no option `--name` that `--no-name` takes back."""
    group.add_argument(name, action=Switch, default=default, help=help)


def positive_int(text: str) -> int:
    """An argparse type: 1, 2, 3, ..."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def natural_int(text: str) -> int:
    """An argparse type: 0, 1, 2, ... below 2^32."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {value}")
    return value


def share(text: str) -> float:
    """An argparse type: a number from 0 up to, but not, 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1), got {text}")
    return value


def probability(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {text}")
    return value


def not_negative(text: str) -> float:
    """An argparse type: a number from 0 up."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def backend(text: str) -> str:
    """An argparse type: a backend of torch.compile."""
    if text not in (known := torch._dynamo.list_backends(None)):
        raise argparse.ArgumentTypeError(f"{text}: torch has {', '.join(known)}")
    return text
