"""Output paths: `--output` as a file, a folder or a template, and portable file names."""

import os
import posixpath
import re
import string
import sys
import tempfile
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_cli.errors import UsageError
from sana_cli.recipe import Recipe
from sana_cli.system.disk import FULL

FORMATS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "avif": ".avif"}
SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".avif": "avif"}
LARGEST_SIDE = {"jpeg": 65500, "webp": 16383, "avif": 65535}  # pixels; PNG takes any
URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # and no drive of Windows
DEFAULT_TEMPLATE = "{slug}-{seed}"
FIELDS = ("slug", "seed", "index", "model", "width", "height", "steps", "guidance")
JOB_FIELDS = (*FIELDS, "id")  # in the names of a batch, which may use columns as well
LONGEST_SLUG = 60
LONGEST_NAME_BYTES = 240  # of the 255 that file systems take, less what -2 and .partial add
UNSAFE = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
WINDOWS_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)


@dataclass(frozen=True)
class Output:
    """A validated `--output`: a folder and a template that give the path for any recipe."""

    folder: str
    template: str
    format: str
    to_stdout: bool = False
    columns: tuple[str, ...] = ()  # that its fields name beside the known ones

    def path(self, recipe: Recipe, index: int, more: Mapping[str, str] | None = None) -> Path:
        """Return the path of an image. `index` counts from 1; `more` has an id and the columns."""
        values = {name: _safe_stem(value) for name, value in (more or {}).items()}
        known: dict[str, Any] = {
            "slug": slug(recipe.prompt),
            "seed": recipe.seed,
            "index": index,
            "model": slug(recipe.model),
            "width": recipe.width,
            "height": recipe.height,
            "steps": recipe.steps,
            "guidance": recipe.guidance,
        }
        known = values | known
        folder, name = (text.format_map(known) for text in (self.folder, self.template))
        return Path(_encodable(folder)) / safe_name(name)


def parse_output(output: str | None, format: str | None) -> Output:
    """Parse `--output` and `--format`, and check all that can be checked before drawing."""
    if output == "-":
        check_format(format or "png")
        return Output("", "", format or "png", to_stdout=True)
    if not output:
        if output is not None:
            raise UsageError("--output is empty", "give a file, a folder, or - for stdout")
        folder, template = "", DEFAULT_TEMPLATE
    else:
        if "\0" in output:
            raise UsageError("--output holds a NUL character")
        if URL.match(output):
            raise UsageError(
                f"--output {output[:200]} is a URL, and images are written to files",
                "sana batch writes the images of its jobs into an object store",
            )
        expanded = os.path.expanduser(output)
        if expanded.endswith(("/", os.sep)) or os.path.isdir(expanded):
            folder, template = expanded, DEFAULT_TEMPLATE
        else:
            folder, template = os.path.split(expanded)
    target = _named(folder, template, format, FIELDS)
    check_writable(Path(target.folder.split("{")[0] or "."))
    return target


def parse_batch_output(
    output: str | None, format: str | None, usual: str
) -> tuple[Path | str, Output]:
    """Parse the folder of a batch, a path or a URL, and the template of names in it; `usual` is the
    default folder."""
    if output is None:
        check_writable(Path(usual))
        return Path(usual), parse_job_name("", format)
    if output == "-":
        raise UsageError("-o - is for a single image", "give a folder for those of a batch")
    if not output or "\0" in output:
        raise UsageError("--output is not a folder", "give a folder for the images of a batch")
    is_url = URL.match(output) is not None
    head, brace, tail = (output if is_url else os.path.expanduser(output)).partition("{")
    folder, template = head, ""
    if brace:
        folder, start = posixpath.split(head) if is_url else os.path.split(head)
        template = start + brace + tail
    elif Path(head).suffix.lower() in SUFFIXES and not os.path.isdir(head):
        raise UsageError(
            f"--output {output} names one file", "give a folder, or a name such as out/{slug}.webp"
        )
    if is_url:
        return folder, parse_job_name(template, format)
    check_writable(Path(folder or "."))
    return Path(folder or "."), parse_job_name(template, format)


def parse_job_name(name: str, format: str | None) -> Output:
    """Parse a name inside the folder of a batch, with the fields of JOB_FIELDS and any column."""
    if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UsageError(f"--output {name[:200]!r} is not inside the folder of the batch")
    folder, template = os.path.split(name)
    return _named(folder, template or DEFAULT_TEMPLATE, format, None)


def _named(folder: str, template: str, format: str | None, known: tuple[str, ...] | None) -> Output:
    """`known` fields, or None for those of a job and any column."""
    suffix = Path(template).suffix.lower()
    implied = SUFFIXES.get(suffix)
    if implied and format and implied != format:
        raise UsageError(
            f"--output ends in {suffix} but --format is {format}", "leave one of them out"
        )
    if not implied:
        if suffix and "{" not in suffix and template != DEFAULT_TEMPLATE:
            raise UsageError(
                f"--output ends in {suffix}, which is not a format that sana writes",
                f"use {', '.join(SUFFIXES)}",
            )
        template += FORMATS[format or "png"]
    named = [field for text in (folder, template) for field in _check_fields(text, known)]
    if len(template.encode()) > LONGEST_NAME_BYTES + 15:
        raise UsageError("--output has too long a file name", "use at most 255 bytes")
    columns = tuple(dict.fromkeys(field for field in named if field not in JOB_FIELDS))
    format = implied or format or "png"
    check_format(format)
    return Output(folder, template, format, columns=columns)


def check_format(format: str) -> None:
    """UsageError for a format that this build of Pillow does not write."""
    if format in ("webp", "avif"):  # of libraries that a build may lack
        from PIL import features

        if not features.check(format):
            raise UsageError(
                f"this build of Pillow does not write {format.upper()}", "use png or jpeg"
            )


def check_size(recipe: Recipe, format: str) -> None:
    """UsageError for an image that is too large for a format."""
    if max(recipe.width, recipe.height) > LARGEST_SIDE.get(format, sys.maxsize):
        raise UsageError(
            f"{recipe.width}x{recipe.height} is too large for {format}, which takes"
            f" {LARGEST_SIDE[format]} pixels a side",
            "use --format png",
        )


def check_quality(quality: int | None, formats: set[str]) -> None:
    """UsageError for a quality that has no effect on these formats or is out of range."""
    if quality is not None:
        if formats == {"png"}:
            raise UsageError("--quality has no effect on PNG", "add --format webp, or leave it out")
        if not 1 <= quality <= 100:
            raise UsageError(f"--quality {quality} is not between 1 and 100")


def _check_fields(template: str, known: tuple[str, ...] | None) -> list[str]:
    """Return the fields of a template; UsageError for one not in `known`, unless that is None."""
    found = []
    try:
        for _, field, spec, conversion in string.Formatter().parse(template):
            if field is None:
                continue
            column = known is None and re.fullmatch(r"[^\s\d.\[\]!|{}][^.\[\]!|{}]*", field)
            if conversion or not (field in (known or JOB_FIELDS) or column):
                raise UsageError(
                    f"--output has an unknown field {{{field}}}",
                    f"use {', '.join('{' + name + '}' for name in known or JOB_FIELDS)}",
                )
            found.append(field)
            number = field in ("seed", "index", "width", "height", "steps")
            if not re.fullmatch(r"0?\d{0,2}" if number else r"", spec or ""):
                raise UsageError(
                    f"--output: {{{field}:{spec}}} is not a way to write {field}",
                    "only a width is understood, as in {index:05}",
                )
    except ValueError as error:
        raise UsageError(f"--output is not a template: {error}", "write {{ for a brace") from None
    return found


def check_writable(folder: Path, option: str = "--output") -> None:
    """Check before drawing that the nearest existing folder takes new files; `option` names it."""
    try:
        while not folder.exists():
            folder = folder.parent
    except OSError as error:
        raise UsageError(
            f"{option} cannot be used: {error.strerror}", "use a shorter path"
        ) from None
    if not folder.is_dir():
        raise UsageError(f"{option}: {folder} is not a folder", f"use another {option}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in FULL:
            return  # a full disk is not a usage error; the write itself reports it
        reason = error.strerror
        raise UsageError(
            f"{option}: cannot write in {folder}: {reason}", f"use another {option}"
        ) from None


def slug(text: str) -> str:
    """Join the letters and digits of any script by hyphens, in lower case; "image" if none."""
    name = ""
    for character in unicodedata.normalize("NFC", text.lower()):
        if character.isalnum() or (name[-1:] not in ("", "-") and _is_mark(character)):
            name += character
        elif name[-1:] not in ("", "-"):
            name += "-"
    return name[:LONGEST_SLUG].strip("-") or "image"


def _is_mark(character: str) -> bool:
    """Whether a character is a vowel sign or accent, and not a variation selector of an emoji."""
    return unicodedata.category(character) in ("Mn", "Mc") and not "\ufe00" <= character <= "\ufe0f"


def natural_order(path: str) -> tuple[list[str | int], str]:
    """Return a key that sorts paths with the numbers in them by value: fox-2 before fox-10."""
    parts = re.split(r"(\d+)", path)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], path


def safe_name(name: str) -> str:
    """Make a file name valid on every common file system, shortened before its suffix."""
    name = UNSAFE.sub("-", _encodable(name))
    stem, dot, ending = name.rpartition(".")
    return _safe_stem(stem, room=LONGEST_NAME_BYTES - len((dot + ending).encode())) + dot + ending


def _safe_stem(text: str, room: int = LONGEST_NAME_BYTES) -> str:
    """Make a valid name of text without a suffix, in `room` bytes; "image" for empty text."""
    stem = UNSAFE.sub("-", _encodable(text)).strip(" .") or "image"
    if WINDOWS_DEVICES.fullmatch(stem.split(".")[0]):
        stem = f"_{stem}"
    return stem.encode()[:room].decode(errors="ignore").rstrip(" .")


def _encodable(text: str) -> str:
    """Replace by hyphens what this machine's file names cannot encode, as in the C locale."""
    encoding = sys.getfilesystemencoding()
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(c if c.encode(encoding, "ignore") else "-" for c in text)
    return text
