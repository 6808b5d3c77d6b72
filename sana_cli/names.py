"""Where a picture goes: `--output` as a file, a folder or a template, and names safe anywhere."""

import os
import re
import string
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from sana_cli.errors import UsageError
from sana_cli.images import FORMATS, FULL, SUFFIXES
from sana_cli.recipe import Recipe

DEFAULT_TEMPLATE = "{slug}-{seed}"
FIELDS = ("slug", "seed", "index", "model", "width", "height", "steps", "guidance")
LONGEST_SLUG = 60
LONGEST_NAME_BYTES = 240  # of the 255 that file systems take, less what -2 and .partial add
WINDOWS_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)


@dataclass(frozen=True)
class Output:
    """A validated `--output`: `folder` and `template` make a path for any recipe."""

    folder: str
    template: str
    format: str
    to_stdout: bool = False

    def path(self, recipe: Recipe, index: int) -> Path:
        """`index` counts the pictures of the run from 1."""
        values = {
            "slug": slug(recipe.prompt),
            "seed": recipe.seed,
            "index": index,
            "model": slug(recipe.model),
            "width": recipe.width,
            "height": recipe.height,
            "steps": recipe.steps,
            "guidance": recipe.guidance,
        }
        folder, name = (text.format(**values) for text in (self.folder, self.template))
        return Path(folder) / safe_name(name)


def parse_output(output: str | None, format: str | None) -> Output:
    """Check everything about `--output` and `--format` that can be known before drawing."""
    if output == "-":
        return Output("", "", format or "png", to_stdout=True)
    if not output:
        if output is not None:
            raise UsageError("--output is empty", "give a file, a folder, or - for stdout")
        folder, template = "", DEFAULT_TEMPLATE
    else:
        if "\0" in output:
            raise UsageError("--output holds a NUL character")
        expanded = os.path.expanduser(output)
        if expanded.endswith(("/", os.sep)) or os.path.isdir(expanded):
            folder, template = expanded, DEFAULT_TEMPLATE
        else:
            folder, template = os.path.split(expanded)
    suffix = Path(template).suffix.lower()
    implied = SUFFIXES.get(suffix)
    if implied and format and implied != format:
        raise UsageError(
            f"--output ends in {suffix} but --format is {format}", "leave one of them out"
        )
    if not implied:
        if suffix and "{" not in suffix and template != DEFAULT_TEMPLATE:
            raise UsageError(
                f"--output ends in {suffix}, which is no format this writes",
                f"use {', '.join(SUFFIXES)}",
            )
        template += FORMATS[format or "png"]
    for text in (folder, template):
        _check_fields(text)
    if len(template.encode()) > LONGEST_NAME_BYTES + 15:
        raise UsageError("--output has too long a file name", "use at most 255 bytes")
    _check_writable(Path(folder.split("{")[0] or "."))
    return Output(folder, template, implied or format or "png")


def _check_fields(template: str) -> None:
    try:
        for _, field, spec, conversion in string.Formatter().parse(template):
            if field is None:
                continue
            if field not in FIELDS or conversion:
                raise UsageError(
                    f"--output has an unknown field {{{field}}}",
                    f"use {', '.join('{' + name + '}' for name in FIELDS)}",
                )
            number = field in ("seed", "index", "width", "height", "steps")
            if not re.fullmatch(r"0?\d{0,2}" if number else r"", spec or ""):
                raise UsageError(
                    f"--output: {{{field}:{spec}}} is not a way to write {field}",
                    "only a width is understood, as in {index:05}",
                )
    except ValueError as error:
        raise UsageError(f"--output is not a template: {error}", "write {{ for a brace") from None


def _check_writable(folder: Path) -> None:
    """The nearest folder that exists must take new files: better known before drawing."""
    try:
        while not folder.exists():
            folder = folder.parent
    except OSError as error:
        raise UsageError(
            f"--output cannot be used: {error.strerror}", "use a shorter path"
        ) from None
    if not folder.is_dir():
        raise UsageError(f"--output: {folder} is not a folder", "use another -o")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in FULL:
            return  # a full disk is not the call's fault; the write itself will say so
        reason = error.strerror
        raise UsageError(
            f"--output: cannot write in {folder}: {reason}", "use another -o"
        ) from None


def slug(text: str) -> str:
    """Letters and digits of any script in lower case, joined by hyphens; "image" if none."""
    name = ""
    for character in unicodedata.normalize("NFC", text.lower()):
        if character.isalnum() or (name[-1:] not in ("", "-") and _is_mark(character)):
            name += character
        elif name[-1:] not in ("", "-"):
            name += "-"
    return name[:LONGEST_SLUG].strip("-") or "image"


def _is_mark(character: str) -> bool:
    """Vowel signs and accents, as most scripts of India write them; not what selects an emoji."""
    return unicodedata.category(character) in ("Mn", "Mc") and not "\ufe00" <= character <= "\ufe0f"


def safe_name(name: str) -> str:
    """A file name that every common file system takes, cut to length before its suffix."""
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "-", name)
    stem, dot, ending = name.rpartition(".")
    suffix = dot + ending
    stem = stem.strip(" .") or "image"
    if WINDOWS_DEVICES.fullmatch(stem.split(".")[0]):
        stem = f"_{stem}"
    room = LONGEST_NAME_BYTES - len(suffix.encode())
    return stem.encode()[:room].decode(errors="ignore").rstrip(" .") + suffix
