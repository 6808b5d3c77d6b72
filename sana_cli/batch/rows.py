"""Rows of a batch: the fields of each line of a file or a pipe, and the faults in them.

txt          a prompt a line; blank lines and those that begin with # are skipped
jsonl        a JSON object a line
csv, tsv     the first row names the columns; an empty cell sets nothing

All of them in UTF-8, or in UTF-16 as Windows writes it.
"""

import csv
import json
import os
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from sana_cli.decoding import NotText, decode, lines, without_marks
from sana_cli.errors import UsageError
from sana_cli.settings import declared

FORMATS = ("txt", "jsonl", "csv", "tsv")
COLUMNS = {name: one for name, one in declared().items() if one.option.column}
KINDS = {name: one.kind for name, one in COLUMNS.items()}
REPEATED = {name for name, one in COLUMNS.items() if one.repeated}
FIELDS = ("prompt", *KINDS, "output")
TRUTH = {"true": True, "yes": True, "on": True, "1": True}
TRUTH |= {"false": False, "no": False, "off": False, "0": False}
ROUND_SECONDS = 1.0  # rows of a pipe that arrive within this are validated and drawn together
POLL_SECONDS = 0.2  # between checks of whether to keep waiting


@dataclass(frozen=True)
class Row:
    number: int  # of the line that it begins on, from 1
    fields: dict[str, Any]  # those of FIELDS that it sets
    columns: dict[str, str]  # all of its values as text, for templates and names


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row, and in which column if it is in one."""

    row: int
    column: str | None
    message: str
    hint: str | None = None


RowOrFault = Row | Fault
Note = Callable[[str], None]


def parse(
    chunks: Iterable[bytes],
    format: str,
    used: Collection[str] = (),
    note: Note = lambda text: None,
) -> Iterator[RowOrFault]:
    """Parse a text in one of FORMATS into rows and faults.

    `used` are columns allowed beside FIELDS; `note` receives the detected delimiter of a table.
    """
    text = _Text(chunks)
    parsers = {"txt": _prompts, "jsonl": _objects}
    try:
        if format in parsers:
            parsed = parsers[format](text)
        else:
            parsed = _Table(text, format, {*FIELDS, *used}, note).rows()
        for number, values in parsed:
            if isinstance(values, Fault):
                yield values
            else:
                yield from _checked(number, values, used)
    except NotText as error:
        yield Fault(text.number, None, str(error), error.hint)


class _Text:
    """Lines as text, counted; some can be put back."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.lines, self.number = lines(chunks), 0
        self.waiting: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if not self.waiting:
            line = next(self.lines)
            self.number += 1
            return decode(line)
        self.number += 1
        return self.waiting.pop()

    def put_back(self, some: Sequence[str]) -> None:
        self.number -= len(some)
        self.waiting += reversed(some)


Parsed = Iterator[tuple[int, dict[str, Any] | Fault]]


def _prompts(text: _Text) -> Parsed:
    for line in text:
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            yield text.number, {"prompt": prompt}


def _objects(text: _Text) -> Parsed:
    array = "this is one JSON array, and not an object a line", "jq -c '.[]' makes lines of it"
    for line in text:
        if not line.strip():
            continue
        if line.strip() == "[":
            yield text.number, Fault(text.number, None, *array)
            return
        try:
            found = json.loads(line, object_pairs_hook=_Object)
        except (ValueError, RecursionError) as error:
            reason = str(error).split(": line")[0]
            yield text.number, Fault(text.number, None, f"this is not JSON: {reason}")
            continue
        if isinstance(found, list):
            yield text.number, Fault(text.number, None, *array)
        elif not isinstance(found, _Object):
            message = 'this is not a JSON object, such as {"prompt": "a fox"}'
            yield text.number, Fault(text.number, None, message)
        elif twice := _twice(found.names):
            for name in twice:
                yield text.number, Fault(text.number, name, "is there twice")
        else:
            yield text.number, found


class _Object(dict[str, Any]):
    """A JSON object with the names that occurred twice in it."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.names = [name for name, _ in pairs]


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(map(field_name, names)).items() if count > 1]


# --- tables ------------------------------------------------------------------------------------

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# Messages of the csv module, and what each means for the author of the file.
CSV_ERRORS = {
    "expected after": "a quoted cell has text after its closing quote; double a quote inside it",
    "unexpected end of data": "a quote is opened here and never closed",
}


class _Table:
    """Rows of cells under a header row; the delimiter is detected from the header.

    Excel writes semicolons where a comma is the decimal sign, and can put a line `sep=;` first.
    A .tsv cell that only begins with a quote is plain text, as most programs that write .tsv
    do not quote.
    """

    def __init__(self, text: _Text, format: str, known: Collection[str], note: Note) -> None:
        self.text, self.format, self.known, self.note = text, format, known, note
        self.delimiter = "," if format == "csv" else "\t"
        self.names: list[str] = []
        self.faulty_columns: set[int] = set()  # indices of columns already reported
        self.taken: list[str] = []  # lines of the row under way

    def rows(self) -> Parsed:
        header = next((line for line in self.text if line.strip()), None)
        if header is None:
            return
        if declared := re.fullmatch(r'"?sep=(.)"?', header.rstrip("\r\n"), re.IGNORECASE):
            self.delimiter = declared[1]
        else:
            self.text.put_back([header])
            self._find_delimiter(header)
        for first, cells in self._records():
            if isinstance(cells, Fault):
                yield first, cells
                if not self.names:
                    return
            elif not any(cells):
                continue
            elif not self.names:
                self.names = cells
                yield from ((first, fault) for fault in self._faults_of_names(first))
            else:
                yield from self._row(first, cells)

    def _find_delimiter(self, header: str) -> None:
        """Choose the delimiter that gives the most known column names, else the most names."""

        def score(delimiter: str) -> tuple[int, int, bool]:
            names = [name.strip(' "\r\n') for name in header.split(delimiter)]
            known = sum(field_name(name) in self.known for name in names)
            return known, 0 if known else len(names), delimiter == self.delimiter

        best = max(DELIMITERS, key=score)
        if best != self.delimiter:
            self.note(f"its columns are separated by {DELIMITERS[best]}")
            self.delimiter = best

    def _records(self) -> Iterator[tuple[int, list[str] | Fault]]:
        """Yield the number of the first line and the cells of each row."""
        reader = self._reader()
        while True:
            first, self.taken = self.text.number + 1, []
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                # Only the first line is at fault; the lines read into its cell may be valid.
                self.text.put_back(self.taken[1:])
                reader = self._reader()
                if self.format == "csv":
                    why = next((w for k, w in CSV_ERRORS.items() if k in str(error)), str(error))
                    yield first, Fault(first, None, f"this is not CSV: {why}")
                    continue
                cells = [
                    _unquoted_cell(c) for c in self.taken[0].rstrip("\r\n").split(self.delimiter)
                ]
            yield first, [cell.strip() for cell in cells]

    def _reader(self) -> Iterator[list[str]]:
        def lines() -> Iterator[str]:
            for line in self.text:
                self.taken.append(line)
                yield line

        return csv.reader(lines(), delimiter=self.delimiter, strict=True)

    def _faults_of_names(self, first: int) -> Iterator[Fault]:
        for name in _twice(filter(None, self.names)):
            yield Fault(first, name, "is there twice")
        for place, name in enumerate(self.names):
            if name and field_name(name) not in self.known:
                self.faulty_columns.add(place)
                yield Fault(first, name, *_unknown(name, self.known))

    def _row(self, first: int, cells: list[str]) -> Parsed:
        while len(cells) > len(self.names) and not cells[-1]:
            cells.pop()
        if len(cells) > len(self.names):
            message = f"{len(cells)} cells, but there are {len(self.names)} columns"
            hint = f"a cell that holds {DELIMITERS.get(self.delimiter, 'the delimiter')} needs"
            yield first, Fault(first, None, message, f"{hint} quotes around it")
            return
        for place, cell in enumerate(cells):
            if cell and not self.names[place] and place not in self.faulty_columns:
                self.faulty_columns.add(place)
                message = f"holds {cell[:40]!r}, but its column has no name"
                yield first, Fault(first, str(place + 1), message, NAMELESS)
        named = {
            name: cell
            for place, (name, cell) in enumerate(zip(self.names, cells, strict=False))
            if cell and name and place not in self.faulty_columns
        }
        yield first, named


NAMELESS = "name it, or leave it out; pandas writes its index with to_csv unless index=False"


def _unquoted_cell(cell: str) -> str:
    """Return a cell of a malformed line, without its quotes if they are balanced."""
    whole = re.fullmatch(r'\s*"((?:[^"]|"")*)"\s*', cell)
    return whole[1].replace('""', '"') if whole else cell


def field_name(name: str) -> str:
    """`Text-Precision` -> `text_precision`; a name that is not a field is returned as it is."""
    plain = name.strip().replace("-", "_").lower()
    return plain if plain in FIELDS else name.strip()


def _checked(number: int, values: dict[str, Any], used: Collection[str]) -> Iterator[RowOrFault]:
    """Yield the row, or each of its faults."""
    given: dict[str, Any] = {}
    columns: dict[str, str] = {}
    faults = []
    for key, value in values.items():
        name = field_name(without_marks(key))
        if name not in FIELDS and name not in used:
            faults.append(Fault(number, name, *_unknown(name, {*FIELDS, *used})))
            continue
        if value is None:
            continue
        value = without_marks(value) if isinstance(value, str) else value
        try:
            if name in FIELDS:
                given[name] = _convert(name, value)
            several = isinstance(value, list) and name in given
            columns[name] = _as_text(given[name] if several else value)
        except ValueError as error:
            faults.append(Fault(number, name, str(error)))
        except RecursionError:
            faults.append(Fault(number, name, "has lists in lists, too deep"))
    yield from faults
    if not faults:
        yield Row(number, given, columns)


# Names of the fields in other tools and data sets.
ELSEWHERE = {
    **dict.fromkeys(("text", "caption", "description"), "prompt"),
    **dict.fromkeys(("negative_prompt", "neg_prompt", "uc"), "negative"),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance_scale", "scale"), "guidance"),
    **dict.fromkeys(("sampler", "scheduler", "sampler_name"), "solver"),
    **dict.fromkeys(("num_inference_steps", "sampling_steps"), "steps"),
    **dict.fromkeys(("width", "height", "size", "resolution"), "res"),
    **dict.fromkeys(("aspect", "aspect_ratio"), "ar"),
    **dict.fromkeys(("n", "num_images", "batch_size"), "count"),
    **dict.fromkeys(("file", "file_name", "filename", "path"), "output"),
    **dict.fromkeys(("init_image", "init_img"), "image"),
    **dict.fromkeys(("denoise", "denoising_strength"), "strength"),
}


def _unknown(name: str, known: Collection[str]) -> tuple[str, str | None]:
    """Return a message and a hint for a name that is not a field."""
    plain = re.sub(r"\W+", "_", name.strip().lower())
    close = get_close_matches(plain, sorted(known), n=1, cutoff=0.7)
    meant = ELSEWHERE.get(plain) or (close[0] if close else None)
    if meant:
        return f"is not a field; did you mean {meant}?", None
    hint = NAMELESS if re.fullmatch(r"unnamed_\d+", plain) else None
    return "is not a field, and neither --template nor the name of the image uses it", hint


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
            point = isinstance(value, str) and re.fullmatch(r"-?\d+,\d+", value)
            hint = f"; write it with a point: {value.replace(',', '.')}" if point else ""
            raise ValueError(f"{value!r} is not {wanted}{hint}") from None
    if not isinstance(value, str) and not (name == "res" and _is_integer(value)):
        raise ValueError(f"{json.dumps(value)[:60]} is not text")
    return str(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(text: str) -> str:
    """`7.0` -> `7`: pandas writes integers as floats in a column with an empty cell."""
    return text[:-2] if re.fullmatch(r"\d+\.0", text) else text


def _as_text(value: Any) -> str:
    if isinstance(value, list | dict):
        raise ValueError(f"{json.dumps(value)[:60]} is not a single value")
    return value.strip() if isinstance(value, str) else json.dumps(value)


# --- where lines come from ---------------------------------------------------------------------


def read_file(path: str) -> list[bytes]:
    """Return the bytes of a file, in one chunk."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return [file.read()]
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"{path} cannot be read: {reason}", "give a file of jobs, or - for stdin"
        ) from None


class Pipe:
    """Rows of a pipe, in rounds as they arrive."""

    def __init__(self, descriptor: int, format: str, used: Collection[str], note: Note) -> None:
        # What is read, then None or the error that ended the reading.
        self.found: queue.SimpleQueue[RowOrFault | Exception | None] = queue.SimpleQueue()
        work = (descriptor, format, used, note)
        threading.Thread(target=self._read, args=work, daemon=True).start()

    def _read(self, descriptor: int, format: str, used: Collection[str], note: Note) -> None:
        end: Exception | None = None
        try:
            for found in parse(_chunks(descriptor), format, used, note):
                self.found.put(found)
        except Exception as error:
            end = error
        self.found.put(end)

    def rounds(
        self, stopping: Callable[[], bool], whole: bool = False
    ) -> Iterator[list[RowOrFault]]:
        """Yield lists of rows: those within ROUND_SECONDS of the first; with `whole`, all.

        An error that ended the reading is raised after the rows before it.
        """
        ended = False
        error: Exception | None = None
        while not ended and not stopping():
            batch: list[RowOrFault] = []
            until = None
            while not stopping():
                wait = (
                    POLL_SECONDS
                    if until is None
                    else max(0.0, min(POLL_SECONDS, until - time.monotonic()))
                )
                try:
                    found = self.found.get(timeout=wait)
                except queue.Empty:
                    if until is not None and time.monotonic() >= until:
                        break
                    continue
                if found is None or isinstance(found, Exception):
                    ended, error = True, found
                    break
                batch.append(found)
                if until is None and not whole:
                    until = time.monotonic() + ROUND_SECONDS
            if batch:
                yield batch
        if error is not None:
            raise error


def _chunks(descriptor: int) -> Iterator[bytes]:
    """Read without sys.stdin, whose lock a thread that waits for input would hold at exit.

    UsageError if that fails.
    """
    try:
        while chunk := os.read(descriptor, 1 << 16):
            yield chunk
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"stdin cannot be read: {reason}", "give a file of jobs, or a pipe"
        ) from None
