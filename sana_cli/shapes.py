"""Image sizes: the requested size, and the trained shape that the model draws for it."""

import math
import re
from collections.abc import Collection
from typing import NamedTuple

from sana_cli.errors import UsageError

NAMED_SIDES = {"1k": 1024, "2k": 2048, "4k": 4096}
SMALLEST_SIDE = 32
LARGEST_ASPECT = 100
# The largest ratio of an image's area to the model's native area: beyond it a resize would only
# blur.
LARGEST_AREA_RATIO = 1.5
# The largest ratio of the requested aspect to that of the nearest trained shape.
LARGEST_ASPECT_RATIO = 1.2


class SizeRequest(NamedTuple):
    """`--res`: a pixel budget (`side`, a square's) or an exact size, with `side` None."""

    side: int | None = None
    width: int = 0
    height: int = 0


class Canvas(NamedTuple):
    """The size of the image and the (native) size the network draws it at, in pixels."""

    width: int
    height: int
    native_width: int
    native_height: int


class Margins(NamedTuple):
    """Pixels that outpainting adds on each side."""

    left: int
    top: int
    right: int
    bottom: int


def parse_resolution(text: str) -> SizeRequest:
    """Parse `1024`, `4k` or `1280x720`; UsageError for anything else."""
    word = text.strip().lower()
    if word in NAMED_SIDES:
        return SizeRequest(side=NAMED_SIDES[word])
    hint = "use 512, 1024, 2048, 4096, 1k, 2k, 4k, or a size such as 1280x720"
    match = re.fullmatch(r"(\d{1,6})(?:[x×](\d{1,6}))?", word)
    if match is None:
        raise UsageError(f"--res {text!r} is not a resolution", hint)
    sides = [int(group) for group in match.groups() if group is not None]
    if min(sides) < SMALLEST_SIDE:
        raise UsageError(f"--res {text!r} is below the smallest side, {SMALLEST_SIDE}", hint)
    return SizeRequest(side=sides[0]) if len(sides) == 1 else SizeRequest(None, *sides)


def parse_aspect(text: str) -> float:
    """Parse `16:9` to 16/9, width over height; UsageError for anything else."""
    match = re.fullmatch(r"(\d{1,4}(?:\.\d+)?):(\d{1,4}(?:\.\d+)?)", text.strip())
    width, height = (float(group) for group in match.groups()) if match else (0.0, 0.0)
    if not height or not 1 / LARGEST_ASPECT <= width / height <= LARGEST_ASPECT:
        raise UsageError(f"--ar {text!r} is not an aspect ratio", "write width:height, as in 16:9")
    return width / height


def parse_outpaint(text: str) -> Margins:
    """Parse `256,0,256,0` (left, top, right, bottom), or one number for every side. UsageError."""
    words = text.replace(" ", "").split(",")
    if not all(word.isascii() and word.isdigit() and len(word) < 6 for word in words):
        words = []
    if len(words) not in (1, 4) or not any(map(int, words)):
        raise UsageError(
            f"--outpaint {text!r} does not say how far to grow the canvas",
            "write pixels as LEFT,TOP,RIGHT,BOTTOM, as in 256,0,256,0, or one number for all sides",
        )
    return Margins(*(map(int, words * 4 if len(words) == 1 else words)))


def nearest_class(request: SizeRequest, classes: Collection[int]) -> int:
    """Return the native side whose area is nearest to the request's."""
    area = request.side**2 if request.side is not None else request.width * request.height
    return min(classes, key=lambda side: abs(math.log(area / side**2)))


def choose_canvas(
    request: SizeRequest,
    aspect: float | None,
    fit: str,
    native_side: int,
    squares: tuple[int, ...] = (),
) -> Canvas:
    """Choose the canvas of a model of `native_side`; UsageError if it cannot draw the request.

    `fit` "trained" draws the nearest trained shape and, for an exact size, resizes and crops it
    as the reference pipeline does; "exact" draws the next multiples of 32 and crops only.
    `squares` are the sides of a model that was trained on square images only.
    """
    sides = squares or (native_side,)
    native_side = nearest_class(request, sides)
    shapes = {} if squares else TRAINED_SHAPES
    if request.side is not None:
        if request.side != native_side:
            raise UsageError(
                f"this model draws {squares_of(sides)}, not {request.side}",
                f"use --res {native_side}, or leave --model out to have one chosen",
            )
        aspect = aspect or 1.0
        if fit == "trained":
            height, width = _trained_shape(shapes, native_side, 1 / aspect)
            return Canvas(width, height, width, height)
        width = round(native_side * math.sqrt(aspect))
        height = round(native_side / math.sqrt(aspect))
    else:
        width, height = request.width, request.height
        if aspect is not None:
            raise UsageError(
                f"--ar cannot be used with the exact size {width}x{height}",
                f"use --res {native_side} --ar, or the size alone",
            )
    if width * height > LARGEST_AREA_RATIO * native_side**2:
        raise UsageError(
            f"{width}x{height} is too large for a model that draws {native_side}x{native_side}",
            f"ask for at most {LARGEST_AREA_RATIO * native_side**2 / 1e6:.2f} megapixels",
        )
    if fit == "trained":
        native_height, native_width = _trained_shape(shapes, native_side, height / width)
        return Canvas(width, height, native_width, native_height)
    return Canvas(width, height, _next_multiple(width), _next_multiple(height))


def squares_of(sides: Collection[int]) -> str:
    """Format sides as "256x256 or 512x512"."""
    return " or ".join(f"{side}x{side}" for side in sides)


def _trained_shape(shapes: "Shapes", native_side: int, ratio: float) -> tuple[int, int]:
    """Return the (height, width) nearest in height/width, the first of two equally near."""
    table = shapes.get(native_side, ((1.0, native_side, native_side),))
    nearest, height, width = min(table, key=lambda row: abs(row[0] - ratio))
    if not 1 / LARGEST_ASPECT_RATIO <= ratio / nearest <= LARGEST_ASPECT_RATIO:
        raise UsageError(
            f"no trained shape is near {1 / ratio:.2f}:1; the nearest is {width}x{height}",
            f"use --res {width}x{height}, or --fit exact to draw it untrained",
        )
    return height, width


def _next_multiple(side: int) -> int:
    return math.ceil(side / 32) * 32


# (height/width as published, height, width) in pixels. The tables of 1024 and 4096 are exactly
# twice those of 512 and 2048.
Table = tuple[tuple[float, int, int], ...]
Shapes = dict[int, Table]  # by native side
_OF_512: Table = (
    (0.25, 256, 1024),
    (0.28, 256, 928),
    (0.32, 288, 896),
    (0.33, 288, 864),
    (0.35, 288, 832),
    (0.4, 320, 800),
    (0.42, 320, 768),
    (0.48, 352, 736),
    (0.5, 352, 704),
    (0.52, 352, 672),
    (0.57, 384, 672),
    (0.6, 384, 640),
    (0.68, 416, 608),
    (0.72, 416, 576),
    (0.78, 448, 576),
    (0.82, 448, 544),
    (0.88, 480, 544),
    (0.94, 480, 512),
    (1.0, 512, 512),
    (1.07, 512, 480),
    (1.13, 544, 480),
    (1.21, 544, 448),
    (1.29, 576, 448),
    (1.38, 576, 416),
    (1.46, 608, 416),
    (1.67, 640, 384),
    (1.75, 672, 384),
    (2.0, 704, 352),
    (2.09, 736, 352),
    (2.4, 768, 320),
    (2.5, 800, 320),
    (3.0, 864, 288),
    (4.0, 1024, 256),
)
_OF_2048: Table = (
    (0.25, 1024, 4096),
    (0.26, 1024, 3968),
    (0.27, 1024, 3840),
    (0.28, 1024, 3712),
    (0.32, 1152, 3584),
    (0.33, 1152, 3456),
    (0.35, 1152, 3328),
    (0.4, 1280, 3200),
    (0.42, 1280, 3072),
    (0.48, 1408, 2944),
    (0.5, 1408, 2816),
    (0.52, 1408, 2688),
    (0.57, 1536, 2688),
    (0.6, 1536, 2560),
    (0.68, 1664, 2432),
    (0.72, 1664, 2304),
    (0.78, 1792, 2304),
    (0.82, 1792, 2176),
    (0.88, 1920, 2176),
    (0.94, 1920, 2048),
    (1.0, 2048, 2048),
    (1.07, 2048, 1920),
    (1.13, 2176, 1920),
    (1.21, 2176, 1792),
    (1.29, 2304, 1792),
    (1.38, 2304, 1664),
    (1.46, 2432, 1664),
    (1.67, 2560, 1536),
    (1.75, 2688, 1536),
    (2.0, 2816, 1408),
    (2.09, 2944, 1408),
    (2.4, 3072, 1280),
    (2.5, 3200, 1280),
    (2.89, 3328, 1152),
    (3.0, 3456, 1152),
    (3.11, 3584, 1152),
    (3.62, 3712, 1024),
    (3.75, 3840, 1024),
    (3.88, 3968, 1024),
    (4.0, 4096, 1024),
)


def _doubled(table: Table) -> Table:
    return tuple((ratio, 2 * height, 2 * width) for ratio, height, width in table)


TRAINED_SHAPES: Shapes = {
    512: _OF_512,
    1024: _doubled(_OF_512),
    2048: _OF_2048,
    4096: _doubled(_OF_2048),
}
