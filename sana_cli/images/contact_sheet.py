"""A contact sheet: thumbnails of images in a grid, each above its caption."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LARGEST_THUMBNAIL = 256  # pixels of its longer side
MAX_PIXELS = 64_000_000  # of the sheet, or its thumbnails become smaller
SHAPE = 3 / 2  # width to height that the sheet comes near to
GAP, CAPTION = 8, 16  # pixels between cells, and of the line below a thumbnail
READABLE = 96  # pixels of a thumbnail, below which there is no room for a caption
PAPER, INK = "white", "#444444"


@dataclass(frozen=True)
class _Grid:
    columns: int
    width: int  # of a thumbnail's cell, in pixels
    height: int
    caption: int

    def size(self, count: int) -> tuple[int, int]:
        rows = math.ceil(count / self.columns)
        width, height = self.width + GAP, self.height + self.caption + GAP
        return self.columns * width + GAP, rows * height + GAP

    def corner(self, index: int) -> tuple[int, int]:
        row, column = divmod(index, self.columns)
        height = self.height + self.caption + GAP
        return GAP + column * (self.width + GAP), GAP + row * height


def draw_sheet(
    sizes: Sequence[tuple[int, int]], images: Iterable[tuple[Image.Image, str]]
) -> np.ndarray:
    """Draw the sheet of images with captions: uint8 RGB (height, width, 3).

    `sizes` has the width and height of every image in pixels. `images` yields them in the same
    order, one at a time, so that only one is in memory.
    """
    grid = _grid(sizes)
    sheet = Image.new("RGB", grid.size(len(sizes)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for index, (image, caption) in enumerate(images):
        x, y = grid.corner(index)
        image.thumbnail((grid.width, grid.height), Image.Resampling.LANCZOS)
        left, top = (grid.width - image.width) // 2, (grid.height - image.height) // 2
        sheet.paste(image.convert("RGB"), (x + left, y + top))
        if grid.caption:
            text = _shortened(caption, font, grid.width)
            draw.text((x + grid.width / 2, y + grid.height + 2), text, INK, font, "ma")
    return np.asarray(sheet)


def _grid(sizes: Sequence[tuple[int, int]]) -> _Grid:
    """Cells that hold every image at its aspect, the largest that MAX_PIXELS allows."""
    wide = max(min(1, width / height) for width, height in sizes)
    high = max(min(1, height / width) for width, height in sizes)
    # The side for which (side * wide + GAP) * (side * high + GAP) is the share of an image.
    area, gaps, rest = wide * high, GAP * (wide + high), GAP**2 - MAX_PIXELS / len(sizes)
    root = math.sqrt(max(0, gaps**2 - 4 * area * rest))
    side = max(1, min(LARGEST_THUMBNAIL, int((root - gaps) / (2 * area))))
    width, height = math.ceil(side * wide), math.ceil(side * high)
    caption = CAPTION if side >= READABLE else 0
    columns = math.sqrt(len(sizes) * SHAPE * (height + caption + GAP) / (width + GAP))
    return _Grid(max(1, min(len(sizes), round(columns))), width, height, caption)


def _shortened(text: str, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont", width: int) -> str:
    """Leave out the middle of a text that is wider than a cell; its end has the seed."""
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        short = f"{text[: kept - kept // 2]}...{text[-(kept // 2) :]}"
        if font.getlength(short) <= width:
            return short
    return ""
