"""Read a recipe and refuse what upstream's reader would pass over in silence, before any model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmcompressor.modifiers.factory import ModifierFactory
from llmcompressor.recipe import Recipe
from pydantic import ValidationError

from llmcompressor_moe.compat.llmcompressor.recipes import known_modifiers, load_modifiers
from llmcompressor_moe.yaml_file import read_yaml

__all__ = ["RecipeError", "read_recipe"]

_SHAPE = "write `default_stage: default_modifiers: NameOfModifier: {field: value}`"


class RecipeError(ValueError):
    """A recipe cannot be used."""


def read_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe file.

    :raises RecipeError: the file is missing, no YAML, names no modifier or an unknown one, or a field is
        wrong; names the modifier, the field, the value and the way out
    """
    path = Path(path)
    load_modifiers()
    found = _modifiers(path, _load(path))
    for name, fields in found:
        try:
            ModifierFactory.create(name, allow_registered=True, allow_experimental=True, **fields)
        except ValidationError as error:
            raise RecipeError(f"recipe {str(path)!r}: {name}: {_first(error)}") from error
        except ValueError as error:
            if name in known_modifiers():
                raise RecipeError(f"recipe {str(path)!r}: {name}: {error}") from error
            raise RecipeError(
                f"recipe {str(path)!r}: there is no modifier {name!r}; there are {', '.join(known_modifiers())}."
            ) from error
    return Recipe.create_instance(str(path))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise RecipeError(f"recipe {str(path)!r} {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {str(path)!r} holds {type(content).__name__}, no mapping: {_SHAPE}.")
    return content


def _modifiers(path: Path, content: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name and fields of every modifier, in order; keys that upstream would ignore are errors."""
    found = []
    for stage, groups in content.items():
        if stage == "args":
            continue
        if not str(stage).endswith("_stage") or not isinstance(groups, dict):
            raise RecipeError(f"recipe {str(path)!r}: {stage!r} is not a stage: {_SHAPE}.")
        for group, modifiers in groups.items():
            if not str(group).endswith("_modifiers") or not isinstance(modifiers, dict):
                raise RecipeError(
                    f"recipe {str(path)!r}: {stage}.{group} is not a group of modifiers: {_SHAPE}."
                )
            for name, fields in modifiers.items():
                if not isinstance(fields, dict):
                    raise RecipeError(
                        f"recipe {str(path)!r}: {name}={fields!r} has no fields: {_SHAPE} (`{{}}` for none)."
                    )
                found.append((name, fields))
    if not found:
        raise RecipeError(f"recipe {str(path)!r} names no modifier: {_SHAPE}.")
    return found


def _first(error: ValidationError) -> str:
    detail = error.errors()[0]
    message = detail["msg"].removeprefix("Value error, ")
    field = ".".join(map(str, detail["loc"]))
    return f"{field}={detail['input']!r}: {message}" if field else message
