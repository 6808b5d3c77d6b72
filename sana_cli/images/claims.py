"""Settings read from an image file, validated field by field, as the file is untrusted."""

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from sana_cli.recipe import SEED_LIMIT, Recipe
from sana_cli.settings import bounds, choices
from sana_cli.weights.catalogue import known_models

# Checks of fields in an untrusted file; `generate` checks again, against the model.
LIMITS = {
    "seed": (0, SEED_LIMIT - 1),
    "steps": bounds("steps"),
    "guidance": bounds("guidance"),
    "flow_shift": (0, 1000),
    "strength": bounds("strength"),
    "pag": bounds("pag"),
    "pag_layer": bounds("pag_layer"),
    "pag_adaptive": bounds("pag_adaptive"),
    "width": (1, 999_999),
    "height": (1, 999_999),
    "native_width": (1, 999_999),
    "native_height": (1, 999_999),
}
KNOWN = {
    "fit": choices("fit"),
    "solver": choices("solver"),
    "image_fit": choices("image_fit"),
    "quant": choices("quant"),
    "sums": ("float16",),
    "text_dtype": ("float32", "bfloat16", "int8"),
    "dit_dtype": ("float32", "bfloat16", "float16"),
    "vae_dtype": ("float32", "bfloat16"),
}
HASH = "[0-9a-f]{64}"
SCALED = f"{HASH}:-?[0-9.]+(e-?[0-9]+)?"
HASHES = dict.fromkeys(("image", "mask", "control"), HASH) | {"lora": f"{SCALED}(,{SCALED})*"}
KINDS = {name: get_args(kind) or (kind,) for name, kind in get_type_hints(Recipe).items()}
SAME_SAMPLERS = {  # of other tools, on our flow
    **dict.fromkeys(("euler", "k_euler"), "flow-euler"),
    **dict.fromkeys(("dpm++ 2m", "dpmpp_2m", "k_dpmpp_2m"), "flow-dpm"),
}
SIZE = re.compile(r"[(\[]?'?([0-9]{1,6})'?\s*[x×*,]\s*'?([0-9]{1,6})'?[)\]]?")


def checked(name: str, value: object) -> Any:
    """Return the value if it is valid for that field; KeyError, ValueError or OverflowError."""
    kinds = KINDS[name]
    if value is None and type(None) in kinds:
        return None
    if type(value) is int and float in kinds:
        value = float(value)
    if type(value) not in kinds:
        raise ValueError
    if isinstance(value, str):
        value.encode()  # UnicodeEncodeError, a ValueError, for half a surrogate pair
        if "\0" in value or (name in ("prompt", "model") and not value.strip()):
            raise ValueError
        if name in KNOWN and value not in KNOWN[name]:
            raise ValueError
        if name in HASHES and not re.fullmatch(HASHES[name], value):
            raise ValueError
    elif isinstance(value, int | float):
        low, high = LIMITS.get(name, (-math.inf, math.inf))
        if not math.isfinite(value) or not low <= value <= high:
            raise ValueError
    return value


@dataclass
class Claims:
    """The settings written by another tool, under its own names and ours, in its order."""

    tool: str | None  # name and, if given, version; None if unknown
    settings: list[tuple[str, str | None, Any]] = field(default_factory=list)  # its name, ours
    is_a1111: bool = False  # read from the text that many tools share

    def accepted(self, ours: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
        """Return valid fields of a Recipe, and the rest as text under the tool's own names.

        The first value for a field counts. `ours` is for text that this program wrote: only then
        are unknown models accepted, and numbers that other tools define differently.
        """
        recipe: dict[str, Any] = {}
        rest: dict[str, str] = {}
        for label, name, value in self.settings:
            try:
                found = _converted(name, value, ours)
                if found.keys() & recipe.keys():
                    raise ValueError
                recipe |= found
            except (KeyError, ValueError, OverflowError):
                if value not in (None, "", [], {}):
                    rest.setdefault(label, _as_text(value))
        return recipe, rest


def _converted(name: str | None, value: Any, ours: bool) -> dict[str, Any]:
    """Convert to fields of a Recipe; KeyError, ValueError or OverflowError if that fails."""
    if name is None or (name in ("flow_shift", "strength") and not ours):
        raise KeyError
    if name == "size":
        text = " x ".join(map(str, value)) if isinstance(value, list) else str(value)
        size = SIZE.fullmatch(text)
        if size is None:
            raise ValueError
        sides = zip(("width", "height"), map(int, size.groups()), strict=True)
        return {side: checked(side, pixels) for side, pixels in sides}
    if name == "solver":
        value = SAME_SAMPLERS.get(str(value).lower(), value)
    if name == "model" and not ours and not (isinstance(value, str) and value in known_models()):
        raise ValueError
    if name in LIMITS and isinstance(value, str):
        whole = int in KINDS[name]
        if whole and not re.fullmatch(r"[0-9]{1,20}", value.strip()):
            raise ValueError
        value = int(value) if whole else float(value)
    if name in LIMITS and isinstance(value, float) and int in KINDS[name] and value.is_integer():
        value = int(value)
    return {name: checked(name, value)}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
