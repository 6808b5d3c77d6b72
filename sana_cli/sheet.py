"""`--sheet`: the images of a batch or a folder at a glance, as one image or as a page.

Both are made from the files as they are on disk. The image is a grid of thumbnails above their file
names; the page shows the images themselves, with their recipes and the commands that redraw them.
"""

import html
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from sana_cli.errors import SanaError, UsageError
from sana_cli.images import metadata
from sana_cli.images.contact_sheet import draw_sheet
from sana_cli.images.files import encode, read
from sana_cli.images.names import SUFFIXES, check_format, check_writable, natural_order
from sana_cli.replay import command_of
from sana_cli.reporter import Reporter
from sana_cli.system.disk import PARTIAL, save

PAGES = (".html", ".htm")


@dataclass(frozen=True)
class _Entry:
    path: Path
    width: int  # in pixels
    height: int
    found: metadata.ImageMetadata | None  # None without a recipe


def check_sheet(path: str) -> Path:
    """Check before drawing that a sheet of that name can be written; UsageError."""
    sheet = Path(os.path.expanduser(path))
    if sheet.suffix.lower() not in (*SUFFIXES, *PAGES):
        known = ", ".join((*SUFFIXES, PAGES[0]))
        raise UsageError(f"--sheet {path[:200]} ends in no known suffix", f"use one of {known}")
    if sheet.suffix.lower() in SUFFIXES:
        check_format(SUFFIXES[sheet.suffix.lower()])
    check_writable(sheet.parent, "--sheet")
    return sheet


def images_in(paths: Sequence[str], sheet: Path) -> list[Path]:
    """Find the images among files and in folders, in the order of their names, without the sheet
    and earlier ones of its name.

    UsageError if there are none.
    """
    earlier = re.compile(rf"{re.escape(sheet.stem)}(-\d+)?{re.escape(sheet.suffix)}")
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            whole = (f for f in inside if not f.name.startswith(PARTIAL) and f.is_file())
            found += sorted(whole, key=lambda file: natural_order(str(file)))
        else:
            found.append(path)
    folder = sheet.parent.resolve()
    found = [
        path
        for path in dict.fromkeys(found)
        if path.parent.resolve() != folder or not earlier.fullmatch(path.name)
    ]
    if not found:
        raise UsageError(f"{', '.join(paths)[:200]} holds no image", "give a folder with images")
    return found


def write_sheet(sheet: Path, images: Sequence[Path], force: bool, reporter: Reporter) -> Path:
    """Write the sheet of some images, and return its path; -2, -3 … is added as for images.

    An image that cannot be read is left out, with a warning. SanaError if none can be read, or the
    sheet cannot be written.
    """
    entries = list(_read(images, reporter))
    if not entries:
        raise SanaError("no image is there for --sheet")
    if sheet.suffix.lower() in PAGES:
        data = _page(entries, sheet).encode(errors="backslashreplace")  # names that are not UTF-8
    else:
        sizes = [(entry.width, entry.height) for entry in entries]
        pixels = draw_sheet(sizes, map(_thumbnail, entries))
        data = encode(pixels, SUFFIXES[sheet.suffix.lower()], None, None)
    return save(sheet, data, force)


def _read(images: Sequence[Path], reporter: Reporter) -> Iterator[_Entry]:
    for path in images:
        try:
            height, width, _ = read(str(path)).shape
        except UsageError as error:
            reason = error.message.removeprefix(f"--image {str(path)[:200]} ")
            reporter.warn(f"{path} is not on the sheet: it {reason}")
            continue
        try:
            yield _Entry(path, width, height, metadata.read(str(path)))
        except SanaError:
            yield _Entry(path, width, height, None)


# --- as an image -------------------------------------------------------------------------------


def _thumbnail(entry: _Entry) -> tuple[Image.Image, str]:
    # The font has Latin letters only.
    seed = entry.found.recipe.get("seed") if entry.found else None
    caption = entry.path.stem
    if not caption.isascii():
        caption = "" if seed is None else f"seed {seed}"
    return Image.fromarray(read(str(entry.path))), caption


# --- as a page ---------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { margin: 1.5rem; }
h1 { font-size: 1.1rem; font-weight: 600; }
main { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
figure { margin: 0; min-width: 0; }
img { width: 100%; height: auto; display: block; border-radius: 4px; background: #8883; }
figcaption { margin-top: .5rem; overflow-wrap: anywhere; }
summary { cursor: pointer; opacity: .7; font-size: .87rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; font-size: .87rem;
  margin: .5rem 0; }
dt { opacity: .7; }
dd { margin: 0; min-width: 0; }
code { font-size: .8rem; user-select: all; white-space: pre-wrap; }
"""


def _page(entries: Sequence[_Entry], sheet: Path) -> str:
    figures = "\n".join(_figure(entry, sheet) for entry in entries)
    count = len(entries)
    title = html.escape(f"{sheet.stem}: {count} image{'' if count == 1 else 's'}")
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src * file:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{STYLE}</style>
<h1>{title}</h1>
<main>
{figures}
</main>
</html>
"""


def _figure(entry: _Entry, sheet: Path) -> str:
    name = html.escape(entry.path.name)
    url = html.escape(_url(entry.path, sheet))
    recipe = entry.found.recipe if entry.found else {}
    prompt = html.escape(recipe.get("prompt", entry.path.stem))
    size = f'width="{entry.width}" height="{entry.height}"'
    image = f'<img src="{url}" {size} loading="lazy" alt="{prompt}">'
    return (
        f'<figure><a href="{url}">{image}</a>\n'
        f"<figcaption>{prompt}\n<details><summary>{name}</summary>{_facts(entry)}</details>"
        "</figcaption></figure>"
    )


def _facts(entry: _Entry) -> str:
    if entry.found is None:
        return "<p>no recipe</p>"
    recipe = {k: v for k, v in entry.found.recipe.items() if k != "prompt" and v not in (None, "")}
    rows = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in recipe.items()
    )
    line, _ = command_of(entry.found.recipe) if "prompt" in entry.found.recipe else (None, [])
    redraw = f"<code>{html.escape(line)}</code>" if line else ""
    return f"<dl>{rows}</dl>{redraw}"


def _url(path: Path, sheet: Path) -> str:
    """The address of an image from the sheet: relative, so that a folder may be moved with it."""
    target, start = path.resolve(), sheet.parent.resolve()
    try:
        return quote(Path(os.path.relpath(target, start)).as_posix(), errors="surrogateescape")
    except ValueError:  # on another drive of Windows
        return target.as_uri()
