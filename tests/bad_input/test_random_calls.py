"""Calls, rows, settings and names made at random: drawn or refused politely, and nothing is lost.

    pytest --hypothesis-profile fuzz tests/bad_input/test_random*.py tests/server/test_random*.py

runs the whole campaign, 750 inputs of each of 24 kinds, and prints how many ended in which way. It
takes about half an hour.
"""

import csv
import io
import json
import re
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from random_inputs import ANY, CELLS, FUZZ, JSON, NAMES, TEXT, values, words
from sana_cli.app import app


@pytest.mark.hypothesis
def test_a_random_call(survives):
    @FUZZ
    @given(words())
    def holds(given):
        # Behind `--` everything is a prompt, and -v adds a traceback on purpose.
        survives("generate", "-m", "demo", "--dry-run", *(w for w in given if w != "-v"))

    holds()


def options_of(*names: str) -> list[str]:
    """The options of a command, but those that ask for more output."""
    command = typer.main.get_command(app)
    for name in names:
        command = command.commands[name]
    found = [option for one in command.params for option in one.opts + one.secondary_opts]
    found = [one for one in found if one.startswith("-") and one not in ("-v", "--verbose")]
    return [*found, "--help"]


# Commands that neither draw nor measure.
OTHERS = [
    ("info",),
    ("models", "list"),
    ("models", "pull"),
    ("models", "rm"),
    ("models", "verify"),
    ("config", "show"),
    ("config", "set"),
    ("config", "path"),
    ("batch", "status"),
]


@st.composite
def other_calls(draw) -> list[str]:
    command = draw(st.sampled_from(OTHERS))
    options = st.sampled_from(options_of(*command))
    names = NAMES if command == ("config", "set") else st.nothing()
    return [*command, *draw(st.lists(options | names | st.one_of(ANY), max_size=4))]


@pytest.mark.hypothesis
def test_a_random_call_of_another_command(survives, no_weights, tmp_path, monkeypatch):
    user = tmp_path / "user" / "config.toml"
    monkeypatch.setenv("SANA_CONFIG", str(user))

    @FUZZ
    @given(other_calls())
    def holds(given):
        user.unlink(missing_ok=True)
        survives(*(w for w in given if w != "-v"), writes="--sheet" in given, reports=True)

    holds()


PIECES = [*("{seed}", "{slug}", "{index}", "{prompt}", "{width}", "{x}", "{", "}", "/", ".", "~")]
PIECES += [*("in", "new", "con", "mask.png", ".png", ".PNG", ".jpg", ".webp", ".txt", " ", "%s")]


@st.composite
def outputs(draw) -> str:
    """The name of an image, below the folder of the test."""
    name = "".join(draw(st.lists(st.sampled_from(PIECES) | TEXT, min_size=1, max_size=5)))
    return name.replace("..", ".").lstrip("/")


@pytest.mark.hypothesis
def test_a_random_name_of_an_image(survives, monkeypatch, files):
    monkeypatch.setenv("HOME", str(files))

    @FUZZ
    @given(outputs(), TEXT, st.integers(1, 2))
    def holds(name, prompt, count):
        words = ("-m", "demo", "-r", "256", "--steps", "1", "-s7", f"-n{count}", "--json")
        done, added = survives("generate", *words, f"-o{name}", "--", prompt, writes=True)
        if done.code == 0:
            told = {str(Path(one["path"]).absolute()) for one in json.loads(done.out)["images"]}
            assert told == added and len(told) == count
        else:
            assert not added

    holds()


FIELDS = NAMES | st.sampled_from(["prompt", "output", "count", "Prompt", "stpes", ""]) | TEXT
TABLE = st.lists(FIELDS, min_size=1, max_size=4, unique=True)


@st.composite
def rows(draw) -> tuple[str, bytes]:
    """The name of a file of rows, and its bytes, of which some may be damaged."""
    kind = draw(st.sampled_from(["jsonl", "csv", "tsv", "txt"]))
    pairs = st.lists(PAIRS, max_size=3).map(dict)
    if kind == "txt":
        text = "\n".join(draw(st.lists(TEXT, max_size=4)))
    elif kind == "jsonl":
        one = pairs | st.dictionaries(FIELDS, JSON, max_size=4)
        one = one.map(lambda row: {"prompt": "a star"} | row)
        text = "\n".join(map(json.dumps, draw(st.lists(one | JSON, max_size=4))))
    else:
        right = draw(pairs)
        head, file = list(right) or draw(TABLE), io.StringIO()
        writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
        writer.writerow(["prompt", *head])
        for _ in range(draw(st.integers(0, 3))):
            writer.writerow(["a star", *(right.get(name) or draw(CELLS) for name in head)])
        text = file.getvalue()
    code = draw(st.sampled_from(["utf-8", "utf-8", "utf-16", "cp1252"]))
    data = bytearray(text.encode(code, "replace"))
    places = st.tuples(st.integers(0, 500), st.integers(0, 255))
    for place, value in draw(st.just([]) | st.lists(places)):
        if place < len(data):
            data[place] = value
    return f"jobs.{kind}", bytes(data)


@pytest.mark.hypothesis
def test_random_rows(survives, files):
    @FUZZ
    @given(rows())
    def holds(made):
        name, data = made
        (files / name).write_bytes(data)
        survives("batch", name, "-m", "demo", "--check")

    holds()


PAIRS = NAMES.flatmap(lambda name: st.tuples(st.just(name), values(name)))


def as_toml(text: str) -> str:
    """A number or a switch as such, anything else in quotes."""
    return text if re.fullmatch(r"-?\d+(\.\d+)?|true|false", text) else json.dumps(text)


@st.composite
def settings_files(draw) -> bytes:
    pairs = dict(draw(st.lists(PAIRS, max_size=3)))
    lines = [f"{json.dumps(name)} = {as_toml(value)}" for name, value in pairs.items()]
    others = st.dictionaries(NAMES | TEXT, JSON.filter(lambda one: one is not None), max_size=1)
    if draw(st.booleans()):
        lines += [f"{json.dumps(k)} = {json.dumps(v)}" for k, v in draw(others).items()]
        lines += draw(st.lists(TEXT, max_size=1))
    return "\n".join(lines).encode()


@pytest.mark.hypothesis
def test_a_random_file_of_settings(survives, files):
    @FUZZ
    @given(settings_files(), st.sampled_from(["project", "user"]))
    def holds(data, level):
        user = files / "config.toml"
        for path in (files / "sana.toml", user):
            path.unlink(missing_ok=True)
        (files / "sana.toml" if level == "project" else user).write_bytes(data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SANA_CONFIG", str(user))
            survives("generate", "a star", "-m", "demo", "-r", "256", "--dry-run", "--no-verbose")
            survives("config", "show", reports=True)

    holds()


@pytest.mark.hypothesis
def test_a_random_variable(survives):
    @FUZZ
    @given(st.lists(PAIRS, min_size=1, max_size=3))
    def holds(given):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in given:
                patch.setenv(f"SANA_{name.upper()}", value)
            survives("generate", "a star", "--dry-run", "--no-verbose")
            survives("config", "show", reports=True)

    holds()
