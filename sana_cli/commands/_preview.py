"""Show an image in the terminal: by the terminal's own protocol, else in half-blocks.

Rich draws the blocks. Both protocols take a PNG; the existing libraries for them write to stdout,
which is for results, and wait for an answer of the terminal.

    kitty   https://sw.kovidgoyal.net/kitty/graphics-protocol/
    iterm2  https://iterm2.com/documentation-images.html
"""

import base64
import io
import os

import numpy as np
from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from sana_cli.system.inventory import image_protocol

MAX_COLUMNS = 60
LINES_BESIDE = 4  # of the terminal's height: the lines about the image stay visible
MAX_PIXELS = 1024  # a side, of what is sent
KITTY_CHUNK = 4096  # bytes


def fault(console: Console) -> str | None:
    """Return why this console cannot show images, or None."""
    if not console.file.isatty():  # Rich may be overridden by the environment
        return "stderr is not a terminal"
    if _protocol() is None and (console.no_color or not console.color_system):
        return "this terminal shows images by coloured blocks only, and has no colour"
    return None


class TerminalPreview:
    """Images shown at the cursor, each over the estimate before it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._lines = 0  # of the estimate that is directly above the cursor

    def leave(self) -> None:
        """Show the next image below other output that was written."""
        self._lines = 0

    def estimate(self, pixels: np.ndarray) -> None:
        """Write uint8 RGB (height, width, 3), to be replaced by the next."""
        self._lines = self._show(pixels)

    def show(self, pixels: np.ndarray) -> None:
        """Write uint8 RGB (height, width, 3), to stay, and leave the cursor below it."""
        self._show(pixels)
        self._lines = 0

    def _show(self, pixels: np.ndarray) -> int:
        """Write an image; return the lines that it takes."""
        console = self.console
        image = Image.fromarray(pixels)
        # Cells are about twice as high as they are wide.
        room = max(console.height - LINES_BESIDE, 1)
        columns = max(min(console.width, MAX_COLUMNS, 2 * room * image.width // image.height), 1)
        lines = max(columns * image.height // (2 * image.width), 1)
        if self._lines:
            console.file.write(f"\r\033[{self._lines}A")
        protocol = _protocol()
        if protocol is None:
            console.print(_blocks(image.resize((columns, 2 * lines))), end="")
            return lines
        image.thumbnail((MAX_PIXELS, MAX_PIXELS))
        file = io.BytesIO()
        image.save(file, "PNG")
        codes = _kitty if protocol == "kitty" else _iterm2
        console.file.write(f"{codes(file.getvalue(), lines)}\n")
        console.file.flush()
        return lines


def _protocol() -> str | None:
    name, _ = image_protocol(os.environ, is_terminal=True)
    return name if name in ("kitty", "iterm2") else None


def _blocks(image: Image.Image) -> Segments:
    """Draw two pixels per character: the upper as its colour, the lower as its background."""
    rows = np.asarray(image).tolist()
    cells = []
    for above, below in zip(rows[::2], rows[1::2], strict=True):
        for upper, lower in zip(above, below, strict=True):
            style = Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower))
            cells.append(Segment("▀", style))
        cells.append(Segment.line())
    return Segments(cells)


def _kitty(png: bytes, lines: int) -> str:
    """a=T: show it at once; f=100: a PNG; q=2: no answer; m=1: more follows."""
    text = base64.b64encode(png).decode("ascii")
    parts = [text[i : i + KITTY_CHUNK] for i in range(0, len(text), KITTY_CHUNK)]
    codes = []
    for i, part in enumerate(parts):
        first = f"a=T,f=100,r={lines}," if i == 0 else ""
        codes.append(f"\033_G{first}q=2,m={int(i + 1 < len(parts))};{part}\033\\")
    return "".join(codes)


def _iterm2(png: bytes, lines: int) -> str:
    text = base64.b64encode(png).decode("ascii")
    return f"\033]1337;File=inline=1;size={len(png)};height={lines}:{text}\a"
