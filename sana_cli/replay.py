"""Convert a recipe from an image back to the settings that reproduce it."""

import re
import shlex
from typing import Any

from sana_cli.instruction import INSTRUCTION
from sana_cli.settings import flag
from sana_cli.weights.catalogue import HUB_ID, choose_model, known_models
from sana_cli.weights.hub_cache import commit_of

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
SPECIAL = re.compile(rf"{CONTROL.pattern}|['!\\]")  # in quotes, to a shell or to its printf
# Fields of a recipe that are settings of the same name.
DIRECT = (
    *("prompt", "negative", "model", "fit", "steps", "guidance", "solver"),
    *("pag", "pag_layer", "pag_adaptive"),
    *("control_scale", "controlnet", "vae", "quant"),
)
# Fields of a recipe that are the hashes of files.
FILES = {
    "image": "the image it started from",
    "mask": "the mask of what was repainted",
    "control": "the control image",
    "lora": "the LoRA",
}
TEXT_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8"}


def settings_of(recipe: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the Settings fields of a recipe, maybe partial, and remarks on what they lack.

    Every choice in the recipe is set explicitly, as the defaults of another version may differ.
    An input image is not among them: only its hash is known.
    """
    settings = {name: recipe[name] for name in DIRECT if name in recipe}
    remarks = _about_model(recipe)
    if "width" in recipe and "height" in recipe:
        settings["res"] = f"{recipe['width']}x{recipe['height']}"
    if recipe.get("strength") is not None:
        settings["strength"] = recipe["strength"]
    if "instruction" in recipe:
        settings["instruction"] = bool(recipe["instruction"])
        if recipe["instruction"] not in ("", INSTRUCTION):
            remarks.append("its instruction text is not the one of this version")
    dit, text = recipe.get("dit_dtype"), recipe.get("text_dtype")
    if dit:
        settings["dtype"] = dit
    # Only the transformer runs in float16; the device decides the precision of the rest.
    if text == "int8" or (text and dit not in (None, "float16", text)):
        settings["text_precision"] = TEXT_PRECISIONS[text]
    if recipe.get("image") or recipe.get("control"):
        settings["image_fit"] = recipe.get("image_fit") or "stretch"  # as version 0.1 did
    if recipe.get("image"):
        if recipe.get("outpaint"):
            settings["outpaint"] = recipe["outpaint"]
        remarks.append(f"it started from an image whose RGB bytes have SHA-256 {recipe['image']!r}")
    if "seed" not in recipe:
        remarks.append("its seed is not known, so the image will be another one")
    return settings, remarks


def _about_model(recipe: dict[str, Any]) -> list[str]:
    name = recipe.get("model")
    if name is None:
        return ["its model is not known; one is chosen by the size"]
    if name not in known_models() and not HUB_ID.fullmatch(name):
        return [f"its model was a folder called {name!r}, wherever that is"]
    drawn_with, here = recipe.get("revision"), commit_of(choose_model(name, None))
    if drawn_with != here:
        return [f"it was drawn with revision {drawn_with!r} of the model; {here!r} is used here"]
    return []


def command_of(recipe: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the shell command that reproduces a recipe, and remarks on what it lacks."""
    settings, remarks = settings_of(recipe)
    prompt = settings.pop("prompt")
    if "seed" in recipe:
        settings["seed"] = recipe["seed"]
    words = []
    for name, what in FILES.items():
        for one in (recipe.get(name) or "").split(","):
            if one:  # a hash, and the scale of a LoRA
                scale = one.partition(":")[1:]
                words += [flag(name), _quoted(name.upper() + "".join(scale))]
                remarks.append(f"replace {name.upper()} by {what}")
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif value != "":
            text = str(value).removesuffix(".0") if isinstance(value, float) else str(value)
            words += [flag(name), _quoted(text)]
    line = " ".join(words)
    if prompt == "-":  # which would mean stdin, so it goes there
        return f"echo - | sana generate - {line}", remarks
    if prompt.startswith("-"):
        return f"sana generate {line} -- {_quoted(prompt)}", remarks
    return f"sana generate {_quoted(prompt)} {line}", remarks


def _quoted(word: str) -> str:
    """Quote for any POSIX shell. printf makes control characters, which a terminal would obey."""
    if not CONTROL.search(word):
        return shlex.quote(word)
    return f"\"$(printf %b '{SPECIAL.sub(_octal, word)}')\""


def _octal(found: re.Match[str]) -> str:
    return "".join(f"\\0{byte:03o}" for byte in found[0].encode())
