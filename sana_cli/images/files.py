"""Image files to pixels, and pixels to files with the recipe inside, whole or not at all."""

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from sana_cli.errors import DiskFull, SanaError, UsageError
from sana_cli.images.metadata import Metadata
from sana_cli.system import disk

FORMATS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "avif": ".avif"}
SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".avif": "avif"}
LARGEST_SIDE = {"jpeg": 65500, "webp": 16383, "avif": 65535}  # pixels; PNG takes any
DEFAULT_QUALITY = {"jpeg": 92, "webp": 90, "avif": 80}


def read(path: str) -> np.ndarray:
    """uint8 RGB (height, width, 3) of any file that Pillow reads, turned as its EXIF says.

    UsageError if it is no picture, or one whose values do not say which is black and white.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(os.path.expanduser(path)) as image:
                upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # Pillow's own conversion would clip, not scale
                upright = Image.fromarray((np.asarray(upright) // 256).astype(np.uint8))
            known = upright.mode not in ("I", "F")
            pixels = np.asarray(upright.convert("RGB"))
    except OSError as error:
        reason = error.strerror or "it is no image, or a damaged one"
        raise UsageError(f"--image {path[:200]} cannot be read: {reason}") from None
    except Exception as error:  # a damaged file can make any of the decoders raise anything
        raise UsageError(f"--image {path[:200]} cannot be read: {error}") from None
    if not known:
        raise UsageError(f"--image {path[:200]} has {upright.mode} values", "save it with 8 bits")
    return pixels


def encode(pixels: np.ndarray, format: str, quality: int | None, record: Metadata | None) -> bytes:
    """The file's bytes. uint8 RGB (height, width, 3); a record of None writes no metadata."""
    buffer = io.BytesIO()
    options = saving(format, quality, record)
    Image.fromarray(pixels).save(buffer, format.upper(), **options)
    return buffer.getvalue()


def saving(format: str, quality: int | None, record: Metadata | None) -> dict[str, Any]:
    """What Pillow's `save` is told for a format: the recipe, and how hard to squeeze."""
    if format == "png":
        text = record.as_png_text() if record is not None else None
        return {"pnginfo": text, "compress_level": 6}
    options: dict[str, Any] = {"quality": quality or DEFAULT_QUALITY[format]}
    if record is not None:
        options["exif"] = record.as_exif(format)
    return options


def write(path: Path, data: bytes, force: bool, mark: str = "") -> Path:
    """Put `data` at `path`, or at `path` with -2, -3 … if that exists and `force` is not set.

    The file appears complete or not at all, and an existing one is never lost half-way. Returns
    the path written. DiskFull or SanaError if it cannot be. `mark` is put into the name of the
    temporary file, for whoever has to clean up after a process that was killed.
    """
    try:
        if not force:
            return disk.write_new(path, data, mark)
        disk.replace(path, data, mark)
        return path
    except OSError as error:
        if error.errno in disk.FULL:
            raise DiskFull(
                f"no space left to write {path}", "free some, or use -o elsewhere"
            ) from None
        raise SanaError(f"{path} cannot be written: {error.strerror or error}", "use -o") from None
