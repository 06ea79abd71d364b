"""Command lines and recipes: YAML files that hold the same options.

`-c recipe.yaml` comes first, the command line over it. A recipe goes through the same parser as the command line, so an
unknown key or a value of the wrong type is refused in the same way.
"""

import argparse
import contextlib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from timm.utils import ParseKwargs

from w2s.engine.elsewhere import remedies
from w2s.engine.errors import InputError, did_you_mean, on_one_line
from w2s.engine.recipe import read_recipe


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are `InputError`s and that reads recipes.

    Args:
        description: what the script does.
        common: destinations of the options that most runs need; `--help` begins with them.
    """

    def __init__(self, description: str, common: Sequence[str] = ()) -> None:
        super().__init__(description=description, allow_abbrev=False, formatter_class=HelpFormatter)
        self.common = ("help", "config", *common)
        self._needing: list[tuple[str, argparse._ArgumentGroup]] = []
        self.add_argument("-c", "--config", metavar="FILE", help="YAML recipe; the command line overrides it")

    def error(self, message: str) -> None:
        raise InputError(message)

    def add_group_needing(self, needed: str, title: str) -> argparse._ArgumentGroup:
        """A group of options that do nothing without the option of destination `needed`."""
        group = self.add_argument_group(title)
        self._needing.append((needed, group))
        return group

    def describe_defaults(self, **texts: str) -> None:
        """Say in the help what options come to that are None unless given, by their destinations."""
        for action in self._actions:
            if action.dest in texts:
                action.help = f"{action.help} (default: {texts[action.dest]})"

    def format_help(self) -> str:
        """A usage of one line, what the script does, the options that most runs need, and the others by group."""
        formatter = self._get_formatter()
        formatter.add_usage("%(prog)s [-c RECIPE] [--OPTION VALUE ...]", [], [])
        formatter.add_text(self.description)
        actions = {action.dest: action for action in self._actions}
        sections = {"what most runs need": [actions[dest] for dest in self.common if dest in actions]}
        for group in self._action_groups:
            rest = [action for action in group._group_actions if action.dest not in self.common]
            sections.setdefault(group.title, []).extend(rest)
        for title, section in sections.items():
            formatter.start_section(title)
            formatter.add_arguments(section)
            formatter.end_section()
        return formatter.format_help()

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """Parse a command line.

        Raises:
            InputError: an unknown option or a stray word, with what was probably meant, or a wrong value.
        """
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._explain(unknown[0]))
        return namespace

    def parse_recipe(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse a command line and the recipe it names.

        Raises:
            InputError: unknown option or key, wrong type, unreadable recipe.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        args = self.parse_args(words)
        if [word.partition("=")[0] for word in words].count("--teacher") > 1:  # argparse would keep the last one
            raise InputError("--teacher is given more than once; several teachers follow one: --teacher WEAK STRONG")
        if config := args.config:
            tokens = self._recipe_tokens(Path(config))
            try:
                self.parse_args(tokens)
            except InputError as error:
                raise InputError(f"{config}: {error}") from None
            args = self.parse_args(tokens + words)
        self._warn_of_idle_options(args)
        return args

    def given(self, argv: Sequence[str] | None = None) -> set[str]:
        """The destinations of the options that stand on a command line itself."""
        absent = object()
        namespace = argparse.Namespace(**{action.dest: absent for action in self._actions})
        values, _ = self.parse_known_args(argv, namespace)
        return {name for name, value in vars(values).items() if value is not absent}

    def _warn_of_idle_options(self, args: argparse.Namespace) -> None:
        for needed, group in self._needing:
            changed = [
                action.option_strings[0]
                for action in group._group_actions
                if getattr(args, action.dest) != self.get_default(action.dest)
            ]
            if changed and not getattr(args, needed) and not getattr(args, "eval_only", False):
                do = "does" if len(changed) == 1 else "do"
                announce(f"warning: without --{needed}, {', '.join(changed)} {do} nothing")

    def _explain(self, word: str) -> str:
        """What to do about a word of a command line that means nothing here."""
        option = word.partition("=")[0]
        if not option.startswith("-"):
            data = "--data-dir" if "--data-dir" in self._option_string_actions else "--data"
            return f"'{word}' belongs to no option; the folder of the data is given as {data} {word}"
        return f"unknown option {option}{self._hint(option.lstrip('-'), dashes='--')}"

    def _hint(self, name: str, dashes: str = "") -> str:
        """What was probably meant by the name of an option that does not exist."""
        there = {*self._option_string_actions, "--mixed_precision"}  # the launcher's
        for instead in remedies(name):
            if there.issuperset(re.findall(r"--[\w-]+", instead)):
                return f": {instead}"
        known = [option[2:] for option in self._option_string_actions if option.startswith("--")]
        hint = did_you_mean(name.replace("_", "-"), known, cutoff=0.8, prefix=dashes)
        return hint or "; --help lists those there are"

    def _recipe_tokens(self, path: Path) -> list[str]:
        recipe = read_recipe(path)
        actions = {option[2:]: action for option, action in self._option_string_actions.items() if option[:2] == "--"}
        tokens, seen = [], set()
        for key, value in recipe.items():
            option = str(key).replace("_", "-")
            action = actions.get(option)
            if action is None or option in ("config", "help"):
                raise InputError(f"{path}: unknown key '{key}'{self._hint(option)}")
            if isinstance(action, Switch) and f"--{option}" != action.option_strings[0]:
                meant = f"{action.option_strings[0][2:]}: {'true' if value is False else 'false'}"
                raise InputError(f"{path}: write '{meant}' in place of '{key}'")
            if action.dest in seen:
                raise InputError(f"{path}: '{option}' is given twice")
            seen.add(action.dest)
            tokens += _tokens(path, key, action, value)
        return tokens


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help on 80 columns or more, with the default of every option that has one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if isinstance(action, Switch):
            default = "on" if default else None
        elif isinstance(default, list):
            default = " ".join(map(str, default))
        if default in (None, "", argparse.SUPPRESS) or default == {} or "default" in action.help:
            return action.help
        return f"{action.help} (default: {str(default).replace('%', '%%')})"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, Switch):
            name, negative = action.option_strings
            return f"--[no-]{name[2:]}" if negative.startswith("--no-") else f"{name}, {negative}"
        metavar = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {metavar}".rstrip()


def announce(message: str) -> None:
    """Write a line to the terminal before there is a run with a log, from the main process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, file=sys.stderr, flush=True)


def _tokens(path: Path, key: str, action: argparse.Action, value: object) -> list[str]:
    """An entry of a recipe as words of a command line."""
    option = f"--{action.dest.replace('_', '-')}"
    if value is None or value == []:  # an empty list is the default, as args.yaml has it
        return []
    if isinstance(action, Switch):
        if not isinstance(value, bool):
            raise InputError(f"{path}: '{key}' must be true or false, got {value!r}")
        return [action.option_strings[0 if value else 1]]
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


class Switch(argparse.Action):
    """A yes/no option `--something` with its opposite, `--no-something`; that of `--no-something` is `--something`."""

    def __init__(self, option_strings: Sequence[str], dest: str, default: bool = False, help: str = "") -> None:
        (name,) = option_strings
        opposite = f"--{name.removeprefix('--no-')}" if name.startswith("--no-") else f"--no-{name[2:]}"
        super().__init__([name, opposite], dest, nargs=0, default=default, help=help)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


class Teachers(argparse.Action):
    """One word is that word, several are a list: a run with one teacher is recorded by its name."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


class KeyValues(ParseKwargs):
    """timm's NAME=VALUE words, with its errors as argparse knows them; true and false mean what they do in a recipe."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            super().__call__(parser, namespace, values, option_string)
        except (ValueError, SyntaxError):
            raise argparse.ArgumentError(self, f"takes NAME=VALUE words, got {' '.join(values)}") from None
        pairs = getattr(namespace, self.dest)
        if broken := [f"{k}={v}" for k, v in pairs.items() if isinstance(v, str) and v.startswith(("[", "(", "{"))]:
            raise argparse.ArgumentError(self, f"takes Python literals, got {broken[0]}")
        truths = {"true": True, "false": False}  # to timm they are words, and a word counts as true
        pairs.update({k: truths[v] for k, v in pairs.items() if isinstance(v, str) and v in truths})


def add_switch(group: argparse._ArgumentGroup, name: str, help: str, default: bool = False) -> None:
    """A yes/no option `--name` and its opposite, see `Switch`."""
    group.add_argument(name, action=Switch, default=default, help=help)


def _checked(kind: type, holds: Callable[[float], bool], meaning: str) -> Callable[[str], float]:
    """An argparse type: a number for which something `holds`, which the error calls by its `meaning`."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if holds(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"takes {meaning}, got {on_one_line(text)}")

    return parse


def _int_or_float(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value


positive_int = _checked(int, lambda value: value >= 1, "a whole number of at least 1")
natural_int = _checked(int, lambda value: 0 <= value < 2**32, "a whole number of 0 or more")
share = _checked(float, lambda value: 0 <= value < 1, "a number in [0, 1)")
probability = _checked(float, lambda value: 0 <= value <= 1, "a number in [0, 1]")
part = _checked(float, lambda value: 0 < value <= 1, "a share above 0 and up to 1")
finite = _checked(float, math.isfinite, "a finite number")
not_negative = _checked(float, lambda value: 0 <= value < math.inf, "a finite number of 0 or more")
positive = _checked(float, lambda value: 0 < value < math.inf, "a finite number above 0")
not_empty = _checked(str, bool, "a name or a path (is a variable of the shell not set?)")
rate_of_evaluations = _checked(
    _int_or_float,
    lambda value: isinstance(value, int) if value >= 1 else value > 0 and abs(round(1 / value) * value - 1) < 0.02,
    "a whole number, or 0.5 for every second epoch, 0.25 for every fourth and so on",
)


def backend(text: str) -> str:
    """An argparse type: a backend of torch.compile."""
    if text not in (known := torch._dynamo.list_backends(None)):
        raise argparse.ArgumentTypeError(f"{text}: torch has {', '.join(known)}")
    return text
