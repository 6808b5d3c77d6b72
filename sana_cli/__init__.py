"""Sana text-to-image: a command for the shell, and `Pipeline` for Python."""

import os
from typing import TYPE_CHECKING, Any

# Threads of OpenMP that wait for the others spin, unless told not to: with another process on one
# of a few cores they then take the time of those that still compute. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
__all__ = ["Pipeline", "SanaError", "SanaImage"]

if TYPE_CHECKING:
    from sana_cli.api import Pipeline, SanaImage
    from sana_cli.errors import SanaError


def __getattr__(name: str) -> Any:
    if name in __all__:  # not before they are asked for: the command starts without them
        from sana_cli import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
