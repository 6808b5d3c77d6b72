"""Published `config.json` files to the configs of `models/configs.py`, every value checked."""

import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from sana_cli.errors import BrokenModel
from sana_cli.weights.layout import read_json

Config = TypeVar("Config")
LARGEST_NUMBER = 2**20  # no number of a config is negative, infinite or near this


def read_config(cls: type[Config], path: Path) -> tuple[Config, list[str]]:
    """Read a published config into a dataclass; return it and the keys that it lacks.

    Keys that the file lacks take the defaults: old files lack the later ones.
    """
    values = read_json(path)
    kinds = typing.get_type_hints(cls)
    known: dict[str, Any] = {}
    for key in kinds.keys() & values.keys():
        if not _fits(values[key], kinds[key]):
            raise BrokenModel(f"{path}: {key} is {values[key]!r}, which is not {kinds[key]}")
        known[key] = _frozen(values[key])
    try:
        config = cls(**known)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise BrokenModel(f"{path}: {error}") from None
    unknown = [key for key in values if key not in kinds and not key.startswith("_")]
    return config, unknown


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value has the annotated type; lists stand for tuples, whole for real."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in inner)
    if origin is tuple:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if kind is types.NoneType:
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int | float) and 0 <= value < LARGEST_NUMBER
    if kind is dict:
        return isinstance(value, dict)
    return isinstance(value, kind) and (kind is not int or 0 <= value < LARGEST_NUMBER)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
