"""What the standing choices of `sana config` mean for one call: used, said aloud, or set aside."""

import os
from typing import TYPE_CHECKING

import typer

from sana_cli.commands._defaults import Standing, origins
from sana_cli.settings import option

if TYPE_CHECKING:
    from sana_cli.ui import Talk

LOOKS = {"quiet", "verbose", "color", "preview"}  # which change nothing that is drawn


def was_typed(context: typer.Context, name: str) -> bool:
    return _source(context, name) == "COMMANDLINE"


def is_standing(context: typer.Context, name: str) -> bool:
    return _source(context, name) == "DEFAULT_MAP"


def _source(context: typer.Context, name: str) -> str | None:
    source = context.get_parameter_source(name)
    return source.name if source else None


def take_up(context: typer.Context, talk: "Talk") -> set[str]:
    """Say which standing choices this call uses; the names of those that what was typed rules out.

    What was typed has the higher rank, also where it contradicts another option's standing choice.
    """
    standing: Standing = context.obj["standing"]
    for text in standing.remarks:
        talk.warn(text)
    held = {name for name in standing.settings if is_standing(context, name)}
    aside = held & _ruled_out(context)
    used = {name: standing.settings[name] for name in sorted(held - aside - LOOKS)}
    if used:
        talk.say(origins(used))
    if aside:
        names = ", ".join(option(name)[2:] for name in sorted(aside))
        talk.say(f"set aside, as it does not apply to this call: {names}")
    context.obj["used"] = used
    return aside


def _ruled_out(context: typer.Context) -> set[str]:
    from sana_cli.images.files import SUFFIXES

    values = context.params
    names: set[str] = set()
    if "output" not in values:  # a verb that writes no pictures
        return names
    file = os.path.basename(values["output"] or "")  # nothing of a folder, which ends in /
    implied = SUFFIXES.get(os.path.splitext(file)[1].lower())
    if was_typed(context, "output") and implied:
        names.add("format")
    if was_typed(context, "res") and "x" in values["res"].lower():
        names.add("ar")
    if (implied or values["format"] or "png") == "png":
        names.add("quality")
    return names
