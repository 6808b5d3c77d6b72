"""Sana text-to-image: a command for the shell, and `Pipeline` for Python."""

import os
from typing import TYPE_CHECKING, Any

# Threads of OpenMP that wait for the others spin, unless told not to: with another process on one
# of a few cores they then take the time of those that still compute. Read when torch is loaded.
# GNU's OpenMP may look a few hundred times before it sleeps: an image of `demo` takes about 10 %
# less time on two idle cores and 5 % more on two of which one is busy. A thousand times: 20 % each.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "300")

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
