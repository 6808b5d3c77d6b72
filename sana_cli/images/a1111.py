"""Write and read the text that A1111 and later tools put into images.

    PROMPT, of any number of lines
    Negative prompt: NEGATIVE, likewise
    Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 512x768, …

The format has no specification. Most tools write values that contain a comma, a colon or a line
break as JSON strings, lists or objects; extensions add lines below the settings.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sana_cli import __version__
from sana_cli.recipe import Recipe

NEGATIVE = "Negative prompt:"
# The line of settings is recognised by its first name and by how many of these it contains.
KNOWN = frozenset(
    ("steps", "sampler", "schedule type", "scheduler", "cfg scale", "guidance", "seed", "size")
    + ("model", "model hash", "denoising strength", "clip skip", "version", "rng", "vae")
)
FEWEST_KNOWN, FEWEST_PAIRS = 2, 3
LONGEST = 200_000  # characters of settings
MAX_TRIED = 5  # places inside lines where they may begin, and values that may be JSON

NAME = re.compile(r"(\w[\w \-/.+']{1,63}):[ \t]*")
STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
STEPS = re.compile(r"(?<!\w)Steps: *[0-9]")
# SD.Next of 2023 separates pairs by bars. Its texts may begin with the word "prompt:".
BARS = re.compile(r"Steps: *[0-9]+ \| ")


def parameters(recipe: Recipe) -> str:
    """Format a recipe: prompt, negative, and `Name: value` pairs in one line."""
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
    """Quote a value as JSON where the plain text would be ambiguous, as readers expect."""
    text = str(value)
    plain = text == text.strip() and not re.search(r'[,:\n\r"]', text)
    return text if plain else json.dumps(text, ensure_ascii=False)


@dataclass
class Text:
    """A parsed text, with all values as strings."""

    prompt: str
    negative: str
    pairs: dict[str, str] = field(default_factory=dict)  # the first of each name
    rest: list[str] = field(default_factory=list)  # text that is not a pair, and repeated names


def read(text: str) -> Text | None:
    """Parse a text; None if it is not in this form."""
    text = text.replace("\r\n", "\n").rstrip()
    if _is_json(text):  # of a tool that writes that in the same place
        return None
    start = _settings(text)
    if start is None:
        return None
    before, settings = text[:start].removesuffix("\n"), text[start:]
    bars = bool(BARS.match(settings))
    lines = before.split("\n")
    if bars:
        lines[0] = re.sub("^prompt: ", "", lines[0])
        if re.match("Version: [^,]*, Pipeline: ", lines[-1]):
            settings += f" | {lines.pop().rstrip(',').replace(', ', ' | ')}"
    first = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[first:]).removeprefix(NEGATIVE).removeprefix(" ")
    found = Text("\n".join(lines[:first]), negative)
    if before == text[:start] and f" {NEGATIVE} " in lines[-1]:  # all of it in one line
        head, _, found.negative = lines[-1].partition(f" {NEGATIVE} ")
        found.prompt = "\n".join([*lines[:-1], head])
    for name, value in _pairs(settings, "|" if bars else ","):
        if name and found.pairs.setdefault(name, value) == value:
            continue
        found.rest.append(f"{name}: {value}" if name else value)
    return found


def _is_json(text: str) -> bool:
    if text[:1] not in ("{", "["):
        return False
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _settings(text: str) -> int | None:
    """Return the offset of the settings: the last settings line that begins with the steps, as
    nearly all do, else the last settings line, else a place inside a line."""
    starts, at = [], 0
    for line in text.split("\n"):
        starts.append(at)
        at += len(line) + 1
    starts.sort(key=lambda start: (bool(STEPS.match(text, start)), start))
    for start in reversed(starts):
        if _are_settings(text, start):
            return start
    for match in list(STEPS.finditer(text))[: -MAX_TRIED - 1 : -1]:
        if _are_settings(text, match.start()):
            return match.start()
    return None


def _are_settings(text: str, start: int) -> bool:
    name = NAME.match(text, start)
    if name is None or name[1].lower() not in KNOWN or len(text) - start > LONGEST:
        return False
    end = text.find("\n", start)
    line = text[start : end if end >= 0 else len(text)]
    pairs = [name for name, _ in _pairs(line, "|" if BARS.match(line) else ",") if name]
    known = {name.lower() for name in pairs} & KNOWN
    return len(pairs) >= FEWEST_PAIRS and len(known) >= FEWEST_KNOWN


def _pairs(text: str, separator: str) -> Iterator[tuple[str, str]]:
    """Yield names and values of settings; text without a name is yielded under ""."""
    ends = re.compile(rf"[{separator}\n]")
    gaps = re.compile(rf"[{separator}\s]*")
    scan = _Scan(text, ends)
    at, first_end = gaps.match(text).end(), text.find("\n")  # type: ignore[union-attr]
    while at < len(text):
        name = NAME.match(text, at)
        below = at > first_end >= 0 and text[at - 1] == "\n"
        if name is None:
            end = _end(ends, text, at)
            yield "", text[at:end].strip()
        elif below and name[1].lower() not in KNOWN:
            # A line of an extension, such as the template of a prompt, with commas of its own.
            end = text.find("\n", at)
            end = end if end >= 0 else len(text)
            yield name[1].strip(), text[name.end() : end].strip()
        else:
            end = scan.value(name.end())
            yield name[1].strip(), _unquoted(text[name.end() : end])
        at = gaps.match(text, end).end()  # type: ignore[union-attr]


def _end(ends: re.Pattern[str], text: str, at: int) -> int:
    found = ends.search(text, at)
    return found.start() if found else len(text)


class _Scan:
    """A scanner for the ends of values, with the pairs of brackets found beforehand."""

    def __init__(self, text: str, ends: re.Pattern[str]) -> None:
        self.text = text
        self.opening = re.compile(ends.pattern[:-1] + r"(\[{]")
        self.end = re.compile(rf"[ \t]*(?:{ends.pattern}|\Z)")
        self.failed = 0  # where values began that were not valid JSON
        self.closers: dict[int, int] = {}
        opened: list[int] = []
        for match in re.finditer(r"[()\[\]{}]", text):
            at = match.start()
            if match[0] in "([{":
                opened.append(at)
            elif opened and text[opened[-1]] + match[0] in ("()", "[]", "{}"):
                self.closers[opened.pop()] = at

    def value(self, at: int) -> int:
        """Return the end of the value at an offset; quotes and brackets protect separators."""
        text = self.text
        if text.startswith('"', at) and (string := STRING.match(text, at)):
            if self.end.match(text, string.end()):
                return string.end()
        elif text.startswith(("[", "{"), at) and self.failed < MAX_TRIED:
            try:
                end = json.JSONDecoder().raw_decode(text, at)[1]
            except (ValueError, RecursionError):
                end, self.failed = at, self.failed + 1
            if end > at and self.end.match(text, end):
                return end
        while match := self.opening.search(text, at):
            at = match.start()
            if match[0] not in "([{":
                return at
            close = self.closers.get(at, -1)
            at = close + 1 if close >= 0 and text.find("\n", at, close) < 0 else at + 1
        return len(text)


def _unquoted(value: str) -> str:
    value = value.strip()
    if value[:1] == value[-1:] == '"' and len(value) > 1:
        try:
            found: Any = json.loads(value, strict=False)  # a line break in it need not be escaped
        except ValueError:
            return value
        return str(found)
    return value
