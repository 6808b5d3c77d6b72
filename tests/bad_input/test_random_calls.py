"""Calls, rows, settings and images made at random: drawn or refused politely, and nothing is lost.

    pytest -m exhaustive --hypothesis-profile fuzz --hypothesis-show-statistics FILE

with this file makes 1,750 of each kind, which takes about half an hour.
"""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

from faults import DAMAGE, assert_polite, damaged
from recipes import RECIPE
from sana_cli.images.files import encode
from sana_cli.images.metadata import Metadata
from sana_cli.recipe import Recipe
from sana_cli.settings import FileOptions, RunOptions, Seeds, Settings, declared, flag

FUZZ = settings(max_examples=max(1, settings.default.max_examples // 4), database=None)
DOCUMENTED = (0, 1, 2, 4, 5, 6, 7)
OPTIONS = declared(Settings, Seeds, FileOptions, RunOptions)
# Nothing that a terminal could not pass: no NUL.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
NUMBERS = st.sampled_from(["0", "-1", "1", "2", "3.5", "1e3", "nan", "inf", "4294967296", "٣", ""])
FILES = st.sampled_from(["in.png", "mask.png", "cut.png", "text.png", "lora.safetensors", ".", "x"])
SIZES = st.sampled_from(["256", "512", "200x180", "256x256", "0", "1x1", "1k", "4096", "-512"])
SHAPES = st.sampled_from(["16:9", "1:1", "0:1", "9:16", "1:1000"])
MODELS = st.sampled_from(["demo", "sana-0.6b-512", "sana-sprint-0.6b", "dmeo", "a/b", "lora:2"])


@st.composite
def values(draw, name: str) -> str:
    """What might be typed after an option: what it takes, what another takes, and anything."""
    option = OPTIONS[name].option
    pools = [NUMBERS, FILES, SIZES, SHAPES, MODELS, TEXT]
    if option.choices:
        pools += [st.sampled_from(option.choices)] * len(pools)
    if option.bounds:
        low, high = option.bounds
        edges = [low, high, low - 1, high + 1, (low + high) / 2]
        pools += [st.sampled_from([f"{edge:g}" for edge in edges])] * len(pools)
    own = {"res": SIZES, "ar": SHAPES, "model": MODELS, "image": FILES, "mask": FILES}
    pools += [own[name]] * len(pools) if name in own else []
    return draw(st.one_of(pools))


# `count` is tested in `test_call.py`: a hundred thousand recipes take their time.
NAMES = st.sampled_from([name for name in OPTIONS if name != "count"])


@st.composite
def words(draw) -> list[str]:
    """The words of a call."""
    given = list(draw(st.lists(TEXT, max_size=2)))
    for name in draw(st.lists(NAMES, max_size=4)):
        if OPTIONS[name].kind is bool:
            given.append(draw(st.sampled_from([flag(name), f"--no-{flag(name)[2:]}"])))
        else:
            given += [flag(name), draw(values(name))]
    given += draw(st.lists(st.sampled_from(["--json", "-q", "-v", "--", "-n2", "--force"])))
    return draw(st.permutations(given)) if draw(st.booleans()) else given


@pytest.fixture
def files(here) -> Path:
    """Images to begin from, and what only looks like one."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(here / "in.png")
    Image.fromarray(pixels[..., 0]).save(here / "mask.png")
    (here / "cut.png").write_bytes((here / "in.png").read_bytes()[:500])
    (here / "text.png").write_text("no image")
    module = "transformer.transformer_blocks.0.attn1.to_q"
    ones = {f"{module}.lora_{one}.weight": np.ones((2, 2), np.float32) for one in "AB"}
    save_file(ones, here / "lora.safetensors")
    return here


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def survives(sana, files, no_hang):
    """Run a command that writes nothing; check how it ends, and that no file has changed."""

    def run(*words: str) -> None:
        no_hang()
        before = contents(files)
        done = sana(*words)
        assert done.code in DOCUMENTED, done.err
        assert "Traceback" not in done.err
        assert ("error:" in done.err) == bool(done.code), done.err
        if done.code and words[0] != "config":  # which shows what is right, and every fault
            assert done.out == "" or "--json" in words
            assert_polite(done.err)
        assert contents(files) == before

    return run


@pytest.mark.hypothesis
def test_a_random_call(survives):
    @FUZZ
    @given(words())
    def holds(given):
        # Behind `--` everything is a prompt, and -v adds a traceback on purpose.
        survives("generate", "-m", "demo", "--dry-run", *(w for w in given if w != "-v"))

    holds()


FIELDS = NAMES | st.sampled_from(["prompt", "output", "count", "Prompt", "stpes", ""]) | TEXT
CELLS = NAMES.flatmap(values) | TEXT
JSON = CELLS | st.none() | st.booleans() | st.integers() | st.floats() | st.lists(st.integers())
TABLE = st.lists(FIELDS, min_size=1, max_size=4, unique=True)


@st.composite
def rows(draw) -> tuple[str, bytes]:
    """The name of a file of rows, and its bytes, of which some may be damaged."""
    kind = draw(st.sampled_from(["jsonl", "csv", "tsv", "txt"]))
    if kind == "txt":
        text = "\n".join(draw(st.lists(TEXT, max_size=4)))
    elif kind == "jsonl":
        one = st.dictionaries(FIELDS, JSON, max_size=4).map(lambda row: row | {"prompt": "a star"})
        text = "\n".join(map(json.dumps, draw(st.lists(one | JSON, max_size=4))))
    else:
        head, file = draw(TABLE), io.StringIO()
        writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
        writer.writerow(["prompt", *head])
        for _ in range(draw(st.integers(0, 3))):
            writer.writerow(["a star", *(draw(CELLS) for _ in head)])
        text = file.getvalue()
    code = draw(st.sampled_from(["utf-8", "utf-8", "utf-16", "cp1252"]))
    data = bytearray(text.encode(code, "replace"))
    for place, value in draw(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)))):
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


TOML = st.dictionaries(NAMES | TEXT, JSON.filter(lambda one: one is not None), max_size=4)


@st.composite
def settings_files(draw) -> bytes:
    lines = [f"{json.dumps(k)} = {json.dumps(v)}" for k, v in draw(TOML).items()]
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
            survives("config", "show")

    holds()


@st.composite
def records(draw) -> str:
    """What an image may say of itself: a recipe with other values, or no recipe at all."""
    recipe = RECIPE.as_dict()
    for name in draw(st.lists(st.sampled_from(sorted(recipe)) | TEXT, max_size=3)):
        recipe[name] = draw(JSON)
    record = {"version": draw(st.integers(0, 3) | JSON), "recipe": draw(st.just(recipe) | JSON)}
    text = json.dumps(record | {"sana": "0.1.0", "torch": "2.9", "device": "cpu"})
    return draw(st.sampled_from([text, text[: len(text) // 2]]) | TEXT)


@pytest.mark.hypothesis
def test_random_metadata(survives, files):
    from PIL.PngImagePlugin import PngInfo

    pixels = np.zeros((8, 8, 3), np.uint8)
    true = encode(pixels, "png", None, Metadata(Recipe(**RECIPE.as_dict()), "cpu", "2.9"))

    @FUZZ
    @given(records(), st.sampled_from(["sana", "parameters", "prompt", "Comment"]))
    def holds(text, name):
        info = PngInfo()
        info.add_itxt(name, text)
        Image.fromarray(pixels).save(files / "made.png", pnginfo=info)
        survives("info", "made.png")
        survives("generate", "--from", "made.png", "--dry-run")

    @FUZZ
    @given(DAMAGE)
    def holds_damaged(damage):
        (files / "made.png").write_bytes(damaged(true, damage, len(true)))
        survives("info", "made.png")

    holds()
    holds_damaged()


@pytest.mark.hypothesis
def test_a_random_header_of_a_lora(survives, files):
    original = (files / "lora.safetensors").read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")

    @FUZZ
    @given(DAMAGE)
    def holds(damage):
        (files / "lora.safetensors").write_bytes(damaged(original, damage, header))
        survives("info", "lora.safetensors")
        survives("generate", "a star", "-m", "demo", "--lora", "lora.safetensors", "--dry-run")

    holds()
