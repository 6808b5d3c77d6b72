"""Image metadata: the recipe of an image as text, written and read back.

Every file gets two texts. `sana` is JSON, holds the whole recipe, and is exact. `parameters` is
the format that A1111 and later tools share: the prompt, `Negative prompt: …`, and a last line of
`Name: value` pairs. It is ambiguous: a line of the prompt that begins with "Negative prompt:" is
read as the negative. So where a file has both, `sana` is read.

    PNG               text chunks `sana` and `parameters`
    JPEG, WebP, AVIF  EXIF ImageDescription and UserComment
"""

import json
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from sana_cli import __version__
from sana_cli.errors import SanaError, UsageError
from sana_cli.images import formats, other_tools
from sana_cli.images.a1111 import parameters
from sana_cli.images.claims import Claims, checked
from sana_cli.images.other_tools import Texts
from sana_cli.recipe import Recipe

if TYPE_CHECKING:
    from PIL import Image, PngImagePlugin

IMAGE_DESCRIPTION = 0x010E
EXIF_FOLDER = 0x8769
USER_COMMENT = 0x9286
TAGS = {  # that tools write into
    "ImageDescription": IMAGE_DESCRIPTION,
    "Make": 0x010F,
    "Model": 0x0110,
    "Software": 0x0131,
    "fooocus_scheme": 0x927C,  # MakerNote
    "UserComment": USER_COMMENT,
}
READ = ("PNG", "JPEG", "WEBP", "AVIF")
OURS = '{"recipe"'  # how our JSON begins
LONGEST_JPEG_EXIF = 65533  # bytes of the one segment it has, b"Exif\0\0" among them

# --- writing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metadata:
    """The metadata of a file to write: its recipe, and the version and device that drew it."""

    recipe: Recipe
    device: str
    torch: str  # its version

    def as_json(self) -> str:
        """ASCII, one line."""
        made = {"sana": __version__, "torch": self.torch, "device": self.device}
        return json.dumps({"recipe": self.recipe.as_dict(), "made": made})

    def as_png_text(self) -> "PngImagePlugin.PngInfo":
        from PIL import PngImagePlugin

        info = PngImagePlugin.PngInfo()
        for key, text in (("parameters", parameters(self.recipe)), ("sana", self.as_json())):
            try:
                text.encode("latin-1")
            except UnicodeEncodeError:
                info.add_itxt(key, text)
            else:
                info.add_text(key, text)
        return info

    def as_exif(self, format: str) -> "Image.Exif":
        """Return the EXIF of a format. A JPEG has one segment: if it cannot hold both texts, the
        one for other tools is left out. UsageError if ours alone does not fit."""
        from PIL import Image

        exif = Image.Exif()
        exif[IMAGE_DESCRIPTION] = self.as_json()
        if format == "jpeg" and len(exif.tobytes()) > LONGEST_JPEG_EXIF:
            raise UsageError(
                "the recipe is too long for a JPEG: the prompt, the negative and the instruction",
                "use --format png or webp, or --metadata none",
            )
        comment = b"UNICODE\0" + parameters(self.recipe).encode("utf-16-be")
        exif.get_ifd(EXIF_FOLDER)[USER_COMMENT] = comment
        if format == "jpeg" and len(exif.tobytes()) > LONGEST_JPEG_EXIF:
            del exif.get_ifd(EXIF_FOLDER)[USER_COMMENT]
        return exif


# --- reading -----------------------------------------------------------------------------------


@dataclass
class ImageMetadata:
    """The metadata read from a file, validated field by field, as the file is untrusted."""

    path: str
    format: str  # "png", "jpeg", "webp" or "avif"
    width: int  # of the file, in pixels
    height: int
    source: str = "sana"  # the format of the text: "sana", "a1111" or "other"
    tool: str | None = "sana"  # name and, if given, version; None if unknown
    recipe: dict[str, Any] = field(default_factory=dict)  # fields of Recipe, maybe not all
    made: dict[str, str] = field(default_factory=dict)
    not_understood: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # for the user, a sentence each


def recipe_of(path: str) -> tuple[dict[str, Any], list[str]]:
    """Return the valid fields of the recipe in an image, and notes for the user on the rest.

    UsageError for a file that is not an image, SanaError for an image without a recipe.
    """
    found = read(path)
    if not found.recipe:
        raise SanaError(
            f"{path[:200]} was made by {_tool_name(found)}; no setting in it could be read"
        )
    return found.recipe, found.notes


def read(path: str) -> ImageMetadata:
    """Read the metadata of a PNG, JPEG, WebP or AVIF file of any size; no pixel is decoded.

    UsageError for any other file, SanaError for an image without the settings of any tool.
    """
    shown = path[:200]
    found, texts = _texts(path, shown)
    # Other tools put their own JSON in the EXIF tag that ours is in.
    own = texts.get("sana", []) + [
        t for t in texts.get("ImageDescription", ()) if t.startswith(OURS)
    ]
    for text in own:
        try:
            _read_own(text, found)
        except (ValueError, RecursionError):
            continue
        _note(found)
        return found
    claims = other_tools.read(texts)
    if claims is None:
        if own:
            raise SanaError(
                f"the recipe in {shown} is damaged", "the image holds no other copy of it"
            )
        raise SanaError(
            f"{shown} holds no recipe", "was it saved with --metadata none, or changed since?"
        )
    _read_claims(claims, found)
    if own:
        found.notes.append("its own recipe is damaged; this is from the text for other tools")
    _note(found)
    return found


def _texts(path: str, shown: str) -> tuple[ImageMetadata, Texts]:
    """Return the format and size of a file, and every text in it by PNG keyword or EXIF tag."""
    from PIL import Image

    try:
        place = os.path.expanduser(path)
        if not stat.S_ISREG(os.stat(place).st_mode):  # opening a pipe could wait for ever
            raise UsageError(f"{shown} is not a file", "give an image")
        with open(place, "rb") as file:
            head = file.read(formats.HEAD)
            file.seek(0)
            with _of_any_size(), Image.open(file, formats=READ) as image:
                kind = (image.format or "").lower().replace("mpo", "jpeg")
                found = ImageMetadata(path, kind, *image.size)
                info = image.info.items()
                texts = {str(key): [str(text)] for key, text in info if isinstance(text, str)}
                for key in ("comment", "xmp"):
                    if isinstance(image.info.get(key), bytes):
                        texts[key] = [image.info[key].decode(errors="replace")]
                # For a PNG without EXIF Pillow would decode the pixels to look for EXIF after them.
                if kind != "png" or "exif" in image.info:
                    try:
                        _add_exif(image.getexif(), texts)
                    except Exception:  # damaged EXIF says nothing, whatever parsing it raises
                        found.notes.append("its EXIF is damaged")
    except UsageError:
        raise
    except Image.UnidentifiedImageError:
        what = formats.describe(head)
        raise UsageError(
            f"{shown} is not a PNG, JPEG, WebP or AVIF" + (f"; it is {what[0]}" if what else "")
        ) from None
    except OSError as error:
        reason = error.strerror or "it is damaged"
        raise UsageError(f"{shown} cannot be read: {reason}") from None
    except Exception as error:  # a damaged file can make any of the parsers raise anything
        raise UsageError(f"{shown} cannot be read: {error}") from None
    return found, texts


def _add_exif(exif: "Image.Exif", texts: Texts) -> None:
    inner = exif.get_ifd(EXIF_FOLDER)
    for name, tag in TAGS.items():
        value = exif.get(tag, inner.get(tag))
        if name == "UserComment" and isinstance(value, bytes):
            texts[name] = _decoded(value)
        elif isinstance(value, str | bytes):
            text = value.decode(errors="replace") if isinstance(value, bytes) else value
            texts.setdefault(name, []).append(text.rstrip("\0"))


@contextmanager
def _of_any_size() -> Iterator[None]:
    """Lift Pillow's limit on pixels, which only matters when they are decoded."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _decoded(comment: bytes) -> list[str]:
    """Decode an EXIF UserComment (8 bytes that name a code, then text), in every plausible way.

    "UNICODE" is UTF-16 in either byte order, whatever the file's own; some tools put UTF-8 there.
    """
    code, body = comment[:8], comment[8:]
    if code == b"UNICODE\0":
        if body[:2] in (b"\xff\xfe", b"\xfe\xff"):
            ways = ["utf-16"]
        else:
            ways = ["utf-16-be", "utf-16-le", "utf-8"]
    else:
        ways, body = ["utf-8", "latin-1"], body if code in (b"ASCII\0\0\0", bytes(8)) else comment
    texts = []
    for way in ways:
        try:
            texts.append(body.decode(way).rstrip("\0"))
        except UnicodeDecodeError:
            continue
    return texts


def _read_own(text: str, found: ImageMetadata) -> None:
    """Fill `found` from our JSON; ValueError or RecursionError if the text is not that."""
    document = json.loads(text, parse_constant=str)
    if not isinstance(document, dict) or not isinstance(document.get("recipe"), dict):
        raise ValueError
    recipe: dict[str, Any] = {}
    unknown: dict[str, str] = {}
    for name, value in document["recipe"].items():
        try:
            recipe[name] = checked(name, value)
        except (KeyError, ValueError, OverflowError):
            unknown[name] = value if isinstance(value, str) else json.dumps(value)
    if not recipe:
        raise ValueError
    made = document.get("made")
    if isinstance(made, dict):
        found.made = {key: value for key, value in made.items() if isinstance(value, str)}
    found.recipe, found.not_understood = recipe, unknown


def _read_claims(claims: Claims, found: ImageMetadata) -> None:
    found.tool = claims.tool
    found.source = "a1111" if claims.is_a1111 else "other"
    ours = (claims.tool or "").startswith("sana ")
    if ours:
        found.made = {"sana": str(claims.tool).removeprefix("sana ")}
        claims.settings = [claim for claim in claims.settings if claim[0] != "Version"]
    found.recipe, found.not_understood = claims.accepted(ours)


def _note(found: ImageMetadata) -> None:
    """Add notes on fields the recipe lacks and on text that was not understood."""
    recipe = found.recipe
    if found.source == "sana":
        needed = [f.name for f in fields(Recipe) if f.default is MISSING]
        missing = [n for n in needed if n not in recipe and n not in found.not_understood]
        if missing:
            found.notes.append(f"its recipe does not say {', '.join(missing)}")
    elif not recipe:
        found.notes.append(f"made by {_tool_name(found)}; no setting in it could be read")
    else:
        whose = "A1111's text" if found.source == "a1111" else f"the text of {_tool_name(found)}"
        found.notes.append(f"read from {whose}, which does not hold all that decides an image")
    if found.not_understood:
        # repr: these come from a stranger's file and go to a terminal
        pairs = [f"{_brief(k, 40)} {_brief(v, 60)}" for k, v in found.not_understood.items()]
        more = f" and {len(pairs) - 12} more" if len(pairs) > 12 else ""
        found.notes.append(f"not understood: {', '.join(pairs[:12])}{more}")
    size = (recipe.get("width", found.width), recipe.get("height", found.height))
    if size != (found.width, found.height):
        found.notes.append(
            f"it was drawn at {size[0]}x{size[1]} and is {found.width}x{found.height} now"
        )


def _tool_name(found: ImageMetadata) -> str:
    return _brief(found.tool or "another tool", 40)


def _brief(text: str, length: int) -> str:
    return repr(text if len(text) <= length else f"{text[:length]}…")[1:-1]
