"""Parametrisations of which the default run takes a part."""

from typing import Any

import pytest


def exhaustive(*values: Any) -> list[Any]:
    """Of a parametrisation, those that only `pytest -m exhaustive` runs; a tuple is one row."""
    rows = (value if isinstance(value, tuple) else (value,) for value in values)
    return [pytest.param(*row, marks=pytest.mark.exhaustive) for row in rows]
