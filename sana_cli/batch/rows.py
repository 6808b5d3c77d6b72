"""Rows of a batch: what each line of a file or a pipe asks for, and where it is at fault.

txt          a prompt a line; blank lines and those that begin with # are skipped
jsonl        a JSON object a line
csv, tsv     the first row names the columns; an empty cell is as good as none
"""

import csv
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from sana_cli.errors import UsageError
from sana_cli.settings import declared

FORMATS = ("txt", "jsonl", "csv", "tsv")
COLUMNS = {name: one for name, one in declared().items() if one.option.column}
KINDS = {name: one.kind for name, one in COLUMNS.items()}
REPEATED = {name for name, one in COLUMNS.items() if one.repeated}
FIELDS = ("prompt", *KINDS, "output")
TRUTH = {"true": True, "yes": True, "on": True, "1": True}
TRUTH |= {"false": False, "no": False, "off": False, "0": False}
TOGETHER = 1.0  # seconds: rows of a pipe that come within this are validated and drawn together
POLL = 0.2  # seconds between looks at whether to go on waiting


@dataclass(frozen=True)
class Row:
    number: int  # of the line that it begins on, from 1
    fields: dict[str, Any]  # those of FIELDS that it sets
    columns: dict[str, str]  # all that it holds as text, for templates and names


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row, and in which column if it is in one."""

    row: int
    column: str | None
    message: str
    hint: str | None = None


Lines = Iterable[bytes]
RowOrFault = Row | Fault


def parse(lines: Lines, format: str, used: Collection[str] = ()) -> Iterator[RowOrFault]:
    """The rows of a text in one of FORMATS; `used` are columns allowed beside FIELDS."""
    text = _Text(lines)
    parsers = {"txt": _prompts, "jsonl": _objects, "csv": _cells, "tsv": _cells}
    try:
        for number, values in parsers[format](text, format, used):
            yield values if isinstance(values, Fault) else _row(number, values, used)
    except UnicodeDecodeError:
        yield Fault(text.number, None, "this is not UTF-8 text")
    except _BadHeader as error:
        yield error.fault


class _Text:
    """Lines as text, counted."""

    def __init__(self, lines: Lines) -> None:
        self.lines, self.number = lines, 0

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            self.number += 1
            yield line.decode("utf-8-sig" if self.number == 1 else "utf-8")


class _BadHeader(Exception):
    def __init__(self, fault: Fault) -> None:
        self.fault = fault


Parsed = Iterator[tuple[int, dict[str, Any] | Fault]]


def _prompts(text: _Text, format: str, used: Collection[str]) -> Parsed:
    for line in text:
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            yield text.number, {"prompt": prompt}


def _objects(text: _Text, format: str, used: Collection[str]) -> Parsed:
    for line in text:
        if not line.strip():
            continue
        try:
            found = json.loads(line, object_pairs_hook=_Object)
        except (ValueError, RecursionError) as error:
            reason = str(error).split(": line")[0]
            yield text.number, Fault(text.number, None, f"this is not JSON: {reason}")
            continue
        if not isinstance(found, _Object):
            message = 'this is no JSON object, such as {"prompt": "a fox"}'
            yield text.number, Fault(text.number, None, message)
            continue
        twice = _twice(found.names)
        yield text.number, Fault(text.number, twice, "is there twice") if twice else found


class _Object(dict[str, Any]):
    """A JSON object that remembers a name that it had twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.names = [name for name, _ in pairs]


def _cells(text: _Text, format: str, used: Collection[str]) -> Parsed:
    delimiter = "," if format == "csv" else "\t"
    reader = csv.reader(iter(text), delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield first, Fault(first, None, f"this is not {format.upper()}: {error}")
            return
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if not names:
            names = [cell.strip() for cell in cells]
            if twice := _twice(names):
                raise _BadHeader(Fault(first, twice, "is there twice"))
            for name in map(field_name, names):
                if name not in FIELDS and name not in used:
                    raise _BadHeader(Fault(first, name, _unknown(name)))
            continue
        if len(cells) > len(names):
            message = f"{len(cells)} cells, but there are {len(names)} columns"
            yield first, Fault(first, None, message)
            continue
        pairs = zip(names, (cell.strip() for cell in cells), strict=False)
        yield first, {name: cell for name, cell in pairs if cell}


def _twice(names: list[str]) -> str | None:
    seen = [field_name(name) for name in names]
    return next((name for name in seen if seen.count(name) > 1), None)


def field_name(name: str) -> str:
    """`Text-Precision` -> `text_precision`; a name that is no field stays."""
    plain = name.strip().replace("-", "_").lower()
    return plain if plain in FIELDS else name.strip()


def _row(number: int, values: dict[str, Any], used: Collection[str]) -> RowOrFault:
    given: dict[str, Any] = {}
    columns: dict[str, str] = {}
    for key, value in values.items():
        name = field_name(key)
        if name not in FIELDS and name not in used:
            return Fault(number, name, _unknown(name))
        if value is None:
            continue
        try:
            if name in FIELDS:
                given[name] = _convert(name, value)
            several = isinstance(value, list) and name in given
            columns[name] = _as_text(given[name] if several else value)
        except ValueError as error:
            return Fault(number, name, str(error))
    return Row(number, given, columns)


def _unknown(name: str) -> str:
    close = get_close_matches(name.lower(), FIELDS, n=1, cutoff=0.7)
    if close:
        return f"is no field; did you mean {close[0]}?"
    return "is no field, and neither --template nor the name of the picture uses it"


def _convert(name: str, value: Any) -> Any:
    if name == "seed":
        if isinstance(value, list) and value and all(_is_integer(item) for item in value):
            return ",".join(map(str, value))
        return _whole(_as_text(value))
    if name in REPEATED:
        values = value if isinstance(value, list) else _as_text(value).split(";")
        return tuple(_as_text(one) for one in values if _as_text(one))
    kind = KINDS.get(name, str)
    if kind is bool:
        truth = TRUTH.get(_as_text(value).lower())
        if truth is None:
            raise ValueError(f"{value!r} is neither true nor false")
        return truth
    if kind in (int, float):
        if isinstance(value, bool):
            raise ValueError(f"{_as_text(value)} is not a number")
        try:
            return kind(_whole(_as_text(value)))
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise ValueError(f"{value!r} is not {wanted}") from None
    if not isinstance(value, str) and not (name == "res" and _is_integer(value)):
        raise ValueError(f"{json.dumps(value)[:60]} is not text")
    return str(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(text: str) -> str:
    """`7.0` -> `7`: how tables that once held an empty cell write whole numbers."""
    return text[:-2] if re.fullmatch(r"\d+\.0", text) else text


def _as_text(value: Any) -> str:
    if isinstance(value, list | dict):
        raise ValueError(f"{json.dumps(value)[:60]} is not a single value")
    return value.strip() if isinstance(value, str) else json.dumps(value)


# --- where lines come from ---------------------------------------------------------------------


def read_file(path: str) -> list[bytes]:
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return file.read().splitlines(keepends=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"{path} cannot be read: {reason}", "give a file of jobs, or - for stdin"
        ) from None


class Pipe:
    """Rows of a pipe, in the rounds that they arrive in."""

    def __init__(self, descriptor: int, format: str, used: Collection[str]) -> None:
        self.found: queue.SimpleQueue[RowOrFault | None] = queue.SimpleQueue()
        work = (descriptor, format, used)
        threading.Thread(target=self._read, args=work, daemon=True).start()

    def _read(self, descriptor: int, format: str, used: Collection[str]) -> None:
        for found in parse(_lines(descriptor), format, used):
            self.found.put(found)
        self.found.put(None)

    def rounds(
        self, stopping: Callable[[], bool], whole: bool = False
    ) -> Iterator[list[RowOrFault]]:
        """Lists of rows: what comes within TOGETHER of the first, or with `whole` all there is."""
        ended = False
        while not ended and not stopping():
            batch: list[RowOrFault] = []
            until = None
            while not stopping():
                wait = POLL if until is None else max(0.0, min(POLL, until - time.monotonic()))
                try:
                    found = self.found.get(timeout=wait)
                except queue.Empty:
                    if until is not None and time.monotonic() >= until:
                        break
                    continue
                if found is None:
                    ended = True
                    break
                batch.append(found)
                if until is None and not whole:
                    until = time.monotonic() + TOGETHER
            if batch:
                yield batch


def _lines(descriptor: int) -> Iterator[bytes]:
    """Not by way of sys.stdin, whose lock a thread that waits for input would hold at exit."""
    rest = b""
    while chunk := os.read(descriptor, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest
