"""Text from anywhere: the same lines in every encoding, however it comes in pieces."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sana_cli.decoding import MARK, NotText, decode, lines, text

# Lines end in three ways, and "\r" before a "\n" of its own would be one.
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n\ufeff"))
TEXT = st.lists(LINE, max_size=5)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def read(chunks: list[bytes]) -> list[str]:
    return [decode(line) for line in lines(chunks)]


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"]


@given(TEXT, ENDS, st.lists(st.integers(0, 1000), max_size=6), st.sampled_from(ENCODINGS))
def test_lines_are_the_same_in_every_encoding_and_in_any_pieces(found, end, cuts, encoding):
    found = ["prompt", *found]  # unmarked UTF-16 is known by a letter that it begins with
    whole = "".join(line + end for line in found)
    encoded = whole.encode(encoding)
    assert read(pieces(encoded, cuts)) == [line + end for line in found]
    assert text(encoded) == whole


@given(TEXT, st.lists(st.integers(0, 1000), max_size=5))
def test_no_mark_is_left_wherever_files_were_joined(found, places):
    whole = "a" + "\n".join(found)
    marked = whole
    for place in places:
        at = place % (len(marked) + 1)
        marked = marked[:at] + MARK + marked[at:]
    assert text(marked.encode()) == whole
    assert text(marked.encode("utf-16")) == whole


def test_a_line_comes_as_soon_as_it_is_complete():
    def typed():
        yield b"a fox\nan"
        yield b" owl\r"
        raise AssertionError("asked for more than it needs")

    found = lines(typed())
    assert next(found) == b"a fox\n"


@pytest.mark.parametrize(
    ("data", "says", "hint"),
    [
        ("a café".encode("cp1252"), "byte 0xE9 after 'a caf'", "'café'"),
        ("Grüße, “x”".encode("cp1252"), "byte 0xFC after 'Gr'", "WINDOWS-1252"),
        (b"\x89PNG\r\n\x1a\n\0\0", "not UTF-8 text: byte 0x89", "save it as UTF-8"),
        (b"a\xff\xfe\xfd\x81", "byte 0xFF after 'a'", "save it as UTF-8"),
        ("a fox".encode("utf-16")[:-1], "begins as UTF-16", "save it as UTF-8"),
        (b"\xff\xfe\x00\xd8a\0", "begins as UTF-16", "save it as UTF-8"),
    ],
    ids=["cp1252", "quotes", "png", "binary", "half-a-letter", "half-a-pair"],
)
def test_what_is_no_text_is_told_with_its_first_wrong_byte(data, says, hint):
    with pytest.raises(NotText, match=says) as caught:
        text(data)
    assert hint in caught.value.hint


@given(st.binary(max_size=60), st.lists(st.integers(0, 100), max_size=4))
def test_no_bytes_are_too_strange(data, cuts):
    try:
        found = text(data)
    except NotText as error:
        assert str(error) and error.hint
    else:
        assert MARK not in found
        assert "".join(read(pieces(data, cuts))) == found
