"""Drawings of things people know: Noto Emoji as RGBA pixels, and their names in two languages.

`emoji.csv` lists the things. Their drawings come from npm's registry (`@iconify-json/noto`,
Apache-2.0) when the first one is rendered and are kept in the user's cache folder.
"""

import csv
import io
import json
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.npm import Package

NOTO = Package(
    "@iconify-json/noto",
    "1.2.9",
    "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
)
TABLE = Path(__file__).with_name("emoji.csv")


@dataclass(frozen=True)
class Thing:
    name: str  # of its drawing in Noto, unique
    emoji: str  # without variation selectors
    category: str
    place: str  # where it is by nature: "ground", "sky", "sea", or "any"
    english: tuple[tuple[str, str], ...]  # singular and plural of each name, the usual one first
    chinese: tuple[str, ...]
    measure: str  # the Chinese measure word
    edge: tuple[tuple[int, ...], ...]  # RGB along its outline that a ground must differ from


@cache
def things() -> tuple[Thing, ...]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(_thing(row) for row in csv.DictReader(file))


def _thing(row: dict[str, str]) -> Thing:
    names = [tuple(pair.split("/")) for pair in row["english"].split("|")]
    return Thing(
        name=row["icon"],
        emoji=row["emoji"],
        category=row["category"],
        place=row["place"],
        english=tuple((one, many) for one, many in names),
        chinese=tuple(row["chinese"].split("|")),
        measure=row["measure"],
        edge=tuple(tuple(bytes.fromhex(colour)) for colour in row["edge"].split()),
    )


@cache
def _drawings() -> dict[str, Any]:
    (icons,) = NOTO.read("icons.json")
    return json.loads(icons)


@lru_cache(maxsize=2048)
def rendering(thing: Thing, pixels: int) -> np.ndarray:
    """Return a thing's drawing, uint8 RGBA (pixels, pixels, 4), not premultiplied; read-only.

    Raises PackageUnavailable if the drawings cannot be had.
    """
    import resvg_py

    found = _drawings()
    icon = found["icons"][thing.name]
    width, height = (icon.get(side, found[side]) for side in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{pixels}" height="{pixels}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=pixels, height=pixels, skip_system_fonts=True)
    image = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA")).copy()
    image.setflags(write=False)
    return image
