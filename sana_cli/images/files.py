"""Image files to pixels, and pixels to the bytes of files with the recipe inside."""

import io
import os
import stat
import warnings
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from sana_cli.errors import UsageError
from sana_cli.images import formats
from sana_cli.images.metadata import Metadata
from sana_cli.images.profiles import to_srgb

MAX_PIXELS = 1 << 27  # of an input image: 400 MB as RGB; phones take up to 108 million
ORIENTATION = 274  # of EXIF
NEW_SUBFILE_TYPE = 254  # of a TIFF: its lowest bit marks a page that is a preview of another
DEFAULT_QUALITY = {"jpeg": 92, "webp": 90, "avif": 80}

UPLOADS = ("PNG", "JPEG", "WEBP", "AVIF")  # formats of an uploaded image
UPLOAD_PIXELS = 40_000_000  # of an uploaded image: more than the largest model draws


class Loaded(NamedTuple):
    """A decoded input image, upright."""

    image: Image.Image  # L, RGB or RGBA
    notes: list[str]  # what of it was not used, or was converted
    turned: bool  # by its EXIF


def read(path: str, data: bytes | None = None) -> np.ndarray:
    """Return the pixels of `read_with_notes`."""
    return read_with_notes(path, data)[0]


def read_with_notes(path: str, data: bytes | None = None) -> tuple[np.ndarray, list[str]]:
    """Read an image as `load` does: uint8 RGB (height, width, 3), and notes.

    Transparent pixels are composited on white, and the notes tell where that changes the image.
    """
    loaded = load(path, data)
    return rgb(loaded, path), loaded.notes


def load(path: str, data: bytes | None = None, option: str = "--image") -> Loaded:
    """Open and decode an image in any format of Pillow.

    EXIF orientation is applied; the first of several frames is used, which the notes tell. The
    colours of an `--image` are converted to sRGB. `data` holds the file's bytes if `path` is only
    its name. UsageError, which names the `option`, if the
    file is not an image, is too large, or its values do not define black and white.
    """
    shown = path[:200]
    what = f"{option} {shown}"
    name = os.path.basename(shown)
    notes: list[str] = []
    try:
        # A pipe could wait forever.
        if data is None and not stat.S_ISREG(os.stat(os.path.expanduser(path)).st_mode):
            raise UsageError(f"{what} is not a regular file", "save the image to a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd files; and at half of Pillow's own limit
            with opened(path, data) as image:
                _refuse(image, what)
                frames = getattr(image, "n_frames", 1)
                # The additional images of a phone's MPO and the layers of a PSD are not frames.
                if frames > 1 and image.format not in ("MPO", "PSD"):
                    notes.append(f"{name} has {frames} frames, of which the first is used")
                image.load()
                turned = _turn(image, name, notes)
                plain = _plain(image)
                if option == "--image":  # masks and controls are values, not colours
                    plain = to_srgb(image, plain, name, notes)
    except UsageError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(what, "too many pixels") from None
    except Image.UnidentifiedImageError:
        raise _no_image(path, what, data) from None
    except OSError as error:
        reason = error.strerror or f"it is damaged ({error})"
        raise UsageError(f"{what} cannot be read: {reason}") from None
    except Exception as error:  # a damaged file can make any of the decoders raise anything
        raise UsageError(f"{what} cannot be read: it is damaged ({error})") from None
    return Loaded(plain, notes, turned)


def _plain(image: Image.Image) -> Image.Image:
    """Convert an image to L, RGB or RGBA, the modes that every later step takes."""
    clear = image.info.get("transparency")
    if not isinstance(clear, int | bytes | tuple):
        image.info.pop("transparency", None)  # a PNG's text of that name
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip, not scale
        values = np.asarray(image)
        image = Image.fromarray((values // 256).astype(np.uint8))
        if isinstance(clear, int):
            image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    elif image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:
        # Of 16 bits, of which Pillow reads the upper 8 of the pixels only.
        image.info["transparency"] = tuple(value // 256 for value in clear)
    if image.has_transparency_data:
        return image if image.mode == "RGBA" else image.convert("RGBA")
    if image.mode in ("1", "L"):
        return image.convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def _refuse(image: Image.Image, what: str) -> None:
    """UsageError for an image whose pixels cannot be used, according to its header."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(what, f"{width}x{height} pixels")
    if image.mode in ("I", "F"):
        raise UsageError(
            f"{what} has {image.mode} values, which do not say what is white",
            "save it with 8 bits",
        )
    tags = getattr(image, "tag_v2", {})
    if image.format == "TIFF" and tags.get(NEW_SUBFILE_TYPE, 0) & 1:
        raise UsageError(
            f"{what} is a camera's raw file, of which only a small preview can be read",
            formats.DEVELOP,
        )


def _too_large(what: str, size: str) -> UsageError:
    return UsageError(
        f"{what} has {size}; at most {MAX_PIXELS / 1e6:.0f} million are read",
        "shrink it first: 4096 pixels a side are as many as any model draws",
    )


def _no_image(path: str, what: str, data: bytes | None) -> UsageError:
    if data is None:
        with open(os.path.expanduser(path), "rb") as file:
            head = file.read(formats.HEAD)
    else:
        head = data[: formats.HEAD]
    if not head:
        return UsageError(f"{what} cannot be read: it is empty")
    kind, hint = formats.describe(head) or ("not an image, or a damaged one", None)
    return UsageError(f"{what} cannot be read: it is {kind}", hint)


def _turn(image: Image.Image, name: str, notes: list[str]) -> bool:
    """Turn an image upright by its EXIF; whether that changed it."""
    try:
        before = image.getexif().get(ORIENTATION, 1)
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # the pixels are whole, and most images need not be turned
        notes.append(f"{name} has damaged EXIF, so it may need to be turned")
        return False
    return before in range(2, 9)


def rgb(loaded: Loaded, path: str) -> np.ndarray:
    """Return uint8 RGB (height, width, 3), on white; a note is added where that shows."""
    image, notes, _ = loaded
    if image.mode != "RGBA":
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    on_white = Image.new("RGB", image.size, "white")
    on_white.paste(image, mask=image.getchannel("A"))
    pixels = np.asarray(on_white)
    if not np.array_equal(pixels, np.asarray(image)[..., :3]):
        name = os.path.basename(path[:200])
        notes.append(f"{name} is transparent in parts, which are taken as white")
    return pixels


def opened(path: str, data: bytes | None = None) -> Image.Image:
    """Open an image file, or untrusted bytes, of which only the web's formats are accepted."""
    if data is None:
        return Image.open(os.path.expanduser(path))
    return Image.open(io.BytesIO(data), formats=UPLOADS)


def check_upload(data: bytes, name: str) -> None:
    """UsageError with `name` for data that is not an image, or too large. No pixel is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with opened("", data) as image:
                pixels = image.width * image.height
    except Image.DecompressionBombError:  # Pillow's own limit
        pixels = UPLOAD_PIXELS + 1
    except Exception:  # a damaged file can make any of the parsers raise anything
        text = f"{name} cannot be read"
        raise UsageError(text, f"send one of {', '.join(UPLOADS)}") from None
    if pixels > UPLOAD_PIXELS:
        text = f"{name} has more than {UPLOAD_PIXELS // 10**6} million pixels"
        raise UsageError(text, "make it smaller")


def encode(pixels: np.ndarray, format: str, quality: int | None, record: Metadata | None) -> bytes:
    """Encode uint8 RGB (height, width, 3); with a record of None no metadata is written."""
    buffer = io.BytesIO()
    options = saving(format, quality, record)
    Image.fromarray(pixels).save(buffer, format.upper(), **options)
    return buffer.getvalue()


def saving(format: str, quality: int | None, record: Metadata | None) -> dict[str, Any]:
    """Return the arguments of Pillow's `save` for a format: metadata and compression."""
    if format == "png":
        text = record.as_png_text() if record is not None else None
        return {"pnginfo": text, "compress_level": 6}
    options: dict[str, Any] = {"quality": quality or DEFAULT_QUALITY[format]}
    if record is not None:
        options["exif"] = record.as_exif(format)
    return options
