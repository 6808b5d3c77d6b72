"""What a picture file says of itself: its recipe as text, written, and read back.

Two texts go into every file. `sana` is JSON, holds the whole recipe, and is exact. `parameters` is
the form that A1111 and the tools after it share: the prompt, `Negative prompt: …`, and a last line
of `Name: value` pairs. It is ambiguous: a line of the prompt that begins with "Negative prompt:"
reads as the negative. So where both are there, `sana` decides.

    PNG               text chunks `sana` and `parameters`
    JPEG, WebP, AVIF  EXIF ImageDescription and UserComment
"""

import json
import math
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_args, get_type_hints

from PIL import Image, PngImagePlugin

from sana_cli import __version__
from sana_cli.errors import SanaError, UsageError
from sana_cli.recipe import SEED_LIMIT, Recipe
from sana_cli.settings import bounds, choices
from sana_cli.weights.catalogue import known_models

IMAGE_DESCRIPTION = 0x010E
EXIF_FOLDER = 0x8769
USER_COMMENT = 0x9286
LONGEST_JPEG_EXIF = 65533  # bytes of the one segment it has, b"Exif\0\0" among them

# Of fields in a file that anyone may have written; `generate` checks again, against the model.
LIMITS = {
    "seed": (0, SEED_LIMIT - 1),
    "steps": bounds("steps"),
    "guidance": bounds("guidance"),
    "flow_shift": (0, 1000),
    "strength": bounds("strength"),
    "control_scale": bounds("control_scale"),
    "pag": bounds("pag"),
    "pag_layer": bounds("pag_layer"),
    "pag_adaptive": bounds("pag_adaptive"),
    "width": (1, 999_999),
    "height": (1, 999_999),
    "native_width": (1, 999_999),
    "native_height": (1, 999_999),
}
KNOWN = {
    "fit": choices("fit"),
    "solver": choices("solver"),
    "image_fit": choices("image_fit"),
    "text_dtype": ("float32", "bfloat16", "int8"),
    "dit_dtype": ("float32", "bfloat16", "float16"),
    "vae_dtype": ("float32", "bfloat16"),
}
SAME_SAMPLERS = {"Euler": "flow-euler", "DPM++ 2M": "flow-dpm"}  # of other tools, on our flow

# The last line of A1111's form, as its own readers split it. The bounds keep a hostile line cheap.
PAIR = re.compile(r'(\w[\w \-/]{1,63}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
FEWEST_PAIRS = 3
LONGEST_LINE = 20_000  # characters
NEGATIVE = "Negative prompt:"


# --- writing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metadata:
    """What a file says of itself: the recipe, which replays it, and where it was drawn."""

    recipe: Recipe
    device: str
    torch: str  # its version

    def as_json(self) -> str:
        """ASCII, one line."""
        made = {"sana": __version__, "torch": self.torch, "device": self.device}
        return json.dumps({"recipe": self.recipe.as_dict(), "made": made})

    def as_png_text(self) -> PngImagePlugin.PngInfo:
        info = PngImagePlugin.PngInfo()
        for key, text in (("parameters", parameters(self.recipe)), ("sana", self.as_json())):
            try:
                text.encode("latin-1")
            except UnicodeEncodeError:
                info.add_itxt(key, text)
            else:
                info.add_text(key, text)
        return info

    def as_exif(self, format: str) -> Image.Exif:
        """In a JPEG, which has room for one segment, a text that is too long for both leaves
        out the one for other tools. UsageError if ours does not fit either."""
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


def parameters(recipe: Recipe) -> str:
    """The text that A1111 and the tools after it read: prompt, negative, `Name: value` pairs."""
    pairs = {
        "Steps": recipe.steps,
        "Sampler": recipe.solver,
        "CFG scale": recipe.guidance,
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
        "Model": recipe.model,
        "Flow shift": recipe.flow_shift,
        "Denoising strength": recipe.strength,
        "Version": f"sana {__version__}",
    }
    lines = [recipe.prompt]
    if recipe.negative:
        lines.append(f"{NEGATIVE} {recipe.negative}")
    lines.append(", ".join(f"{k}: {_quoted(v)}" for k, v in pairs.items() if v is not None))
    return "\n".join(lines)


def _quoted(value: object) -> str:
    """Values that would end or change in the line are JSON strings, as the readers expect."""
    text = str(value)
    plain = text == text.strip() and not re.search(r'[,:\n\r"]', text)
    return text if plain else json.dumps(text, ensure_ascii=False)


# --- reading -----------------------------------------------------------------------------------


@dataclass
class Found:
    """What a file says of itself, checked field by field: nothing in it was trusted."""

    path: str
    format: str  # "png", "jpeg", "webp" or "avif"
    width: int  # of the file, in pixels
    height: int
    source: str = "sana"  # the text it was read from: "sana" or "a1111"
    recipe: dict[str, Any] = field(default_factory=dict)  # fields of Recipe, not always all
    made: dict[str, str] = field(default_factory=dict)
    not_understood: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what the user should know, a sentence each


def recipe_of(path: str) -> tuple[dict[str, Any], list[str]]:
    """The recipe in a picture: its valid fields of Recipe, and what to tell the user of the rest.

    UsageError for a file that is no picture, SanaError for a picture without a recipe.
    """
    found = read(path)
    return found.recipe, found.notes


def read(path: str) -> Found:
    """The texts of a PNG, JPEG, WebP or AVIF file, of any size: no pixel is decoded.

    UsageError for a file that is no such picture, SanaError for one without a recipe.
    """
    shown = path[:200]
    found, own, others = _texts(path, shown)
    damaged = False
    for text in own:
        try:
            _read_own(text, found)
        except (ValueError, RecursionError):
            damaged = True
        else:
            break
    else:
        if not any(_read_parameters(text, found) for text in others):
            if damaged:
                raise SanaError(f"the recipe in {shown} is damaged", "nothing else in it tells it")
            raise SanaError(
                f"{shown} holds no recipe", "was it saved with --metadata none, or changed since?"
            )
        if damaged:
            found.notes.append("its own recipe is damaged; this is from the text for other tools")
    _note(found)
    return found


def _texts(path: str, shown: str) -> tuple[Found, list[str], list[str]]:
    """The file's facts, texts that may be our JSON, and texts that may be in A1111's form."""
    try:
        place = os.path.expanduser(path)
        if not stat.S_ISREG(os.stat(place).st_mode):  # opening a pipe could wait for ever
            raise UsageError(f"{shown} is no file", "give a picture")
        with (
            _of_any_size(),
            open(place, "rb") as file,
            Image.open(file, formats=("PNG", "JPEG", "WEBP", "AVIF")) as image,
        ):
            info = image.info
            kind = (image.format or "").lower().replace("mpo", "jpeg")
            found = Found(path, kind, *image.size)
            own, others = [info.get("sana")], [info.get("parameters")]
            # A PNG without EXIF would be decoded in search of some behind its pixels.
            if kind != "png" or "exif" in info:
                exif = image.getexif()
                own.append(exif.get(IMAGE_DESCRIPTION))
                comment = exif.get_ifd(EXIF_FOLDER).get(USER_COMMENT)
                others += [comment] if isinstance(comment, str) else _decoded(comment)
            if kind == "jpeg" and isinstance(info.get("comment"), bytes):
                others.append(info["comment"].decode(errors="replace"))
    except UsageError:
        raise
    except Image.UnidentifiedImageError:
        raise UsageError(f"{shown} is no PNG, JPEG, WebP or AVIF") from None
    except OSError as error:
        reason = error.strerror or "it is damaged"
        raise UsageError(f"{shown} cannot be read: {reason}") from None
    except Exception as error:  # a damaged file can make any of the parsers raise anything
        raise UsageError(f"{shown} cannot be read: {error}") from None
    texts = [[str(text) for text in some if isinstance(text, str)] for some in (own, others)]
    return found, [text for text in texts[0] if text.startswith("{")], texts[1]


@contextmanager
def _of_any_size() -> Iterator[None]:
    """Lift Pillow's limit on pixels, which is there for those who decode them."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _decoded(comment: object) -> list[str]:
    """An EXIF UserComment (8 bytes that name a code, then text), in every way it may be meant.

    "UNICODE" is UTF-16 in either byte order, whatever the file's own; some tools put UTF-8 there.
    """
    if not isinstance(comment, bytes):
        return []
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


def _read_own(text: str, found: Found) -> None:
    """Fill `found` from our JSON; ValueError or RecursionError where it is none."""
    document = json.loads(text, parse_constant=str)
    if not isinstance(document, dict) or not isinstance(document.get("recipe"), dict):
        raise ValueError
    recipe: dict[str, Any] = {}
    unknown: dict[str, str] = {}
    for name, value in document["recipe"].items():
        try:
            recipe[name] = _checked(name, value)
        except (KeyError, ValueError, OverflowError):
            unknown[name] = value if isinstance(value, str) else json.dumps(value)
    if not recipe:
        raise ValueError
    made = document.get("made")
    if isinstance(made, dict):
        found.made = {key: value for key, value in made.items() if isinstance(value, str)}
    found.recipe, found.not_understood = recipe, unknown


KINDS = {name: get_args(kind) or (kind,) for name, kind in get_type_hints(Recipe).items()}


def _checked(name: str, value: object) -> Any:
    """The value if it may be that field of a Recipe, else KeyError, ValueError or OverflowError."""
    kinds = KINDS[name]
    if value is None and type(None) in kinds:
        return None
    if type(value) is int and float in kinds:
        value = float(value)
    if type(value) not in kinds:
        raise ValueError
    if isinstance(value, str):
        value.encode()  # UnicodeEncodeError, a ValueError, for half a surrogate pair
        if "\0" in value or (name in ("prompt", "model") and not value.strip()):
            raise ValueError
        if name in KNOWN and value not in KNOWN[name]:
            raise ValueError
    elif isinstance(value, int | float):
        low, high = LIMITS.get(name, (-math.inf, math.inf))
        if not math.isfinite(value) or not low <= value <= high:
            raise ValueError
    return value


def _read_parameters(text: str, found: Found) -> bool:
    """Fill `found` from A1111's form, as far as it maps; False where the text is not in it."""
    if not _is_parameters(text):
        return False
    *lines, last = _lines(text)
    start = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    texts = {
        "prompt": "\n".join(lines[:start]),
        "negative": "\n".join(lines[start:]).removeprefix(NEGATIVE).removeprefix(" "),
    }
    recipe: dict[str, Any] = {}
    unknown: dict[str, str] = {}
    pairs = {name.strip(): _unquoted(value) for name, value in PAIR.findall(last)}
    version = pairs.get("Version", "")
    ours = version.startswith("sana ")
    if ours:
        found.made = {"sana": pairs.pop("Version").removeprefix("sana ")}
    for name, value in texts.items():
        try:
            recipe[name] = _checked(name, value)
        except ValueError:
            if value.strip():
                unknown[name] = value
    for name, value in pairs.items():
        try:
            recipe |= _mapped(name, value, ours)
        except (KeyError, ValueError, OverflowError):
            unknown[name] = value
    found.source, found.recipe, found.not_understood = "a1111", recipe, unknown
    return True


def _is_parameters(text: str) -> bool:
    last = _lines(text)[-1]
    if len(last) > LONGEST_LINE or len(PAIR.findall(last)) < FEWEST_PAIRS:
        return False
    try:
        return not isinstance(json.loads(text), dict)  # of a tool that writes JSON there
    except (ValueError, RecursionError):
        return True


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").rstrip().split("\n")


def _unquoted(value: str) -> str:
    value = value.strip()
    if value[:1] == value[-1:] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            pass
    return value


def _mapped(name: str, value: str, ours: bool) -> dict[str, Any]:
    """The fields that a pair sets; KeyError or ValueError where it means nothing to us."""
    if name == "Size":
        size = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", value)
        if size is None:
            raise ValueError
        return {
            side: _checked(side, int(number))
            for side, number in zip(("width", "height"), size.groups(), strict=True)
        }
    if name == "Sampler":
        return {"solver": _checked("solver", SAME_SAMPLERS.get(value, value))}
    if name == "Model":
        if not ours and value not in known_models():
            raise ValueError
        return {"model": _checked("model", value)}
    if name == "Flow shift" and not ours:
        raise ValueError
    whole = {"Steps": "steps", "Seed": "seed"}
    if name in whole:
        if not re.fullmatch(r"[0-9]{1,20}", value):
            raise ValueError
        return {whole[name]: _checked(whole[name], int(value))}
    real = {"CFG scale": "guidance", "Flow shift": "flow_shift"}[name]
    return {real: _checked(real, float(value))}


def _note(found: Found) -> None:
    """Say what the recipe lacks and what of the text was left out."""
    recipe = found.recipe
    if found.source == "sana":
        needed = [f.name for f in fields(Recipe) if f.default is MISSING]
        missing = [n for n in needed if n not in recipe and n not in found.not_understood]
        if missing:
            found.notes.append(f"its recipe does not say {', '.join(missing)}")
    else:
        found.notes.append("read from A1111's text, which does not hold all that decides a picture")
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


def _brief(text: str, length: int) -> str:
    return repr(text if len(text) <= length else f"{text[:length]}…")[1:-1]
