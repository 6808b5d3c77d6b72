"""Text from files and pipes, in the encodings that it comes in.

UTF-8, and UTF-16 as Windows writes it: after a byte order mark, or known by the zero byte in each
of its first letters. Marks are dropped wherever they stand: files that were joined hold several.
"""

import codecs
from collections.abc import Iterable, Iterator

MARK = "\ufeff"
PLAIN = frozenset(b"\t\r\n") | frozenset(range(0x20, 0x7F))


class NotText(ValueError):
    """Bytes in none of the encodings: `str()` says where, and `hint` what may help."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def text(data: bytes) -> str:
    """The whole of a file. NotText if it is none."""
    return "".join(map(decode, lines([data])))


def lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    r"""Lines of UTF-8 with their ends (\n, \r\n or \r), each as soon as it is complete.

    NotText for UTF-16 that breaks off; whether a line is UTF-8 only `decode` finds out.
    """
    rest = b""
    for chunk in _in_utf8(chunks):
        # "\r" at the end may be half of "\r\n".
        whole = (rest + chunk).splitlines(keepends=True)
        rest = whole.pop() if whole and not whole[-1].endswith(b"\n") else b""
        yield from whole
    if rest:
        yield rest


def decode(line: bytes) -> str:
    """A line of UTF-8 as text, without marks. NotText if it is not UTF-8."""
    try:
        return without_marks(line.decode())
    except UnicodeDecodeError as error:
        before = line[: error.start].decode()[-20:]
        byte = f"byte 0x{line[error.start]:02X}"
        place = f"{byte} after {before!r}" if before else byte
        raise NotText(f"this is not UTF-8 text: {place}", _guess(line)) from None


def without_marks(text: str) -> str:
    return text.replace(MARK, "")


def _in_utf8(chunks: Iterable[bytes]) -> Iterator[bytes]:
    chunks, head = iter(chunks), b""
    while len(head) < 2 and (chunk := next(chunks, b"")):
        head += chunk
    encoding = _utf_16(head)
    if encoding is None:
        yield head
        yield from chunks
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        yield decoder.decode(head).encode()
        for chunk in chunks:
            yield decoder.decode(chunk).encode()
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise NotText(
            f"the text begins as UTF-16 but is not valid UTF-16: {error.reason}", "save it as UTF-8"
        ) from None


def _utf_16(head: bytes) -> str | None:
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    if len(head) > 1 and head[1] == 0 and head[0] in PLAIN:
        return "utf-16-le"
    if len(head) > 1 and head[0] == 0 and head[1] in PLAIN:
        return "utf-16-be"
    return None


def _guess(line: bytes) -> str:
    """What to do about bytes that are not UTF-8, most often text of Windows' western code page."""
    try:
        read = line.decode("cp1252")
    except UnicodeDecodeError:
        read = ""
    word = next((word for word in read.split() if not word.isascii()), "")
    if word.isprintable() and any(map(str.isalpha, word)):
        return (
            f"save it as UTF-8; where {word[:30]!r} is right it is Windows-1252:"
            " iconv -f WINDOWS-1252 -t UTF-8"
        )
    return "save it as UTF-8"
