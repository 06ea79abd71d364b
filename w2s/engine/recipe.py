"""Recipes: YAML files of options, each of them once."""

from collections.abc import Hashable
from pathlib import Path

import yaml

from w2s.engine.errors import InputError, on_one_line


class _EachKeyOnce(yaml.SafeLoader):
    """YAML whose mappings name no key twice; PyYAML alone would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<, whose keys may be overridden
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                break  # PyYAML refuses it below
            if key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' is given twice", key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> dict:
    """The keys and values of a recipe.

    Raises:
        InputError: it cannot be read, is no mapping, or names a key twice.
    """
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce) or {}
    except OSError as error:
        raise InputError(f"cannot read recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"recipe {path} is no text file") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no valid YAML: {on_one_line(error)}") from None
    if not isinstance(recipe, dict):
        raise InputError(f"{path} must be a mapping of options, not a {type(recipe).__name__}")
    return recipe
