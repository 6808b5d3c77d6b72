"""What pictures say of themselves: written, read back, and not trusted."""

import contextlib
import io
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from recipes import RECIPE
from sana_cli import __version__
from sana_cli.errors import SanaError, UsageError
from sana_cli.images import files as images
from sana_cli.images.a1111 import parameters
from sana_cli.images.metadata import Metadata, read, recipe_of
from sana_cli.recipe import Recipe

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
FORMATS = ("png", "jpeg", "webp", "avif")
MADE = {"sana": __version__, "torch": "2.9", "device": "cpu"}

# The form's published grammar, as A1111's own reader applies it, and nothing of ours.
A1111_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
# Words that the form itself uses, so that the search meets its ambiguities.
traps = st.sampled_from(
    [
        "\n",
        "Negative prompt: ",
        "Steps: 20, Seed: 1, Size: 8x8",
        '"',
        "\\",
        ", ",
        ": ",
        "🦊",
        "\r\n",
    ]
)
prompts = st.lists(texts | traps, min_size=1).map("".join).filter(str.strip)


def record(**changes) -> Metadata:
    return Metadata(Recipe(**(RECIPE.as_dict() | changes)), "cpu", "2.9")


def save(folder: Path, format: str, **changes) -> str:
    path = folder / f"picture.{format}"
    path.write_bytes(images.encode(PIXELS, format, None, record(**changes)))
    return str(path)


def save_png(folder: Path, **chunks: str) -> str:
    info = PngImagePlugin.PngInfo()
    for key, text in chunks.items():
        info.add_itxt(key, text)
    path = folder / "picture.png"
    Image.new("RGB", (64, 32)).save(path, pnginfo=info)
    return str(path)


def save_comment(folder: Path, comment: bytes, format: str = "jpeg") -> str:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    path = folder / f"picture.{format}"
    Image.new("RGB", (64, 32)).save(path, exif=exif.tobytes())
    return str(path)


def save_recipe(folder: Path, **changes) -> str:
    return save_png(folder, sana=json.dumps({"recipe": RECIPE.as_dict() | changes, "made": MADE}))


# --- our own text ------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_back_the_whole_recipe(tmp_path, format):
    changes = {"prompt": 'a fox,\n"火" 🦊: \\', "negative": "Negative prompt: x", "guidance": 4.123}
    found = read(save(tmp_path, format, **changes))
    assert Recipe(**found.recipe) == record(**changes).recipe
    assert (found.source, found.made, found.notes) == ("sana", MADE, [])
    assert (found.format, found.width, found.height) == (format, 64, 32)


@pytest.mark.parametrize("format", ["png", "jpeg"])
@given(prompt=prompts, negative=prompts | st.just(""))
def test_any_text_survives_exactly(tmp_path, format, prompt, negative):
    path = save(tmp_path, format, prompt=prompt, negative=negative)
    assert Recipe(**recipe_of(path)[0]) == record(prompt=prompt, negative=negative).recipe


def test_where_the_form_of_other_tools_is_ambiguous_ours_decides(tmp_path):
    prompt = "a fox\nNegative prompt: an owl"
    text = parameters(record(prompt=prompt).recipe)
    assert recipe_of(save_png(tmp_path, parameters=text))[0]["negative"] == "an owl"
    found, _ = recipe_of(save(tmp_path, "png", prompt=prompt))
    assert (found["prompt"], found["negative"]) == (prompt, "")


def test_a_recipe_too_long_for_a_jpeg_keeps_our_text_or_is_refused_before_it_is_drawn(tmp_path):
    long = "a fox, " * 3500
    path = save(tmp_path, "jpeg", prompt=long)  # 24 kB as JSON, 48 kB as UTF-16
    with Image.open(path) as image:
        assert 0x9286 not in image.getexif().get_ifd(0x8769)
    assert recipe_of(path)[0]["prompt"] == long
    with pytest.raises(UsageError, match="too long for a JPEG"):
        record(prompt="🦊" * 20_000).as_exif("jpeg")
    assert recipe_of(save(tmp_path, "webp", prompt="🦊" * 20_000))[0]["prompt"] == "🦊" * 20_000


# --- the form of other tools -------------------------------------------------------------------


def as_a1111_reads(text: str) -> tuple[str, str, dict[str, str]]:
    *lines, last = text.strip().split("\n")
    assert len(A1111_PAIR.findall(last)) >= 3
    prompt, negative, in_negative = [], [], False
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            in_negative, line = True, line[16:].strip()
        (negative if in_negative else prompt).append(line)
    pairs = {
        name: json.loads(value) if value[:1] == '"' == value[-1:] else value
        for name, value in A1111_PAIR.findall(last)
    }
    return "\n".join(prompt), "\n".join(negative), pairs


def says_negative(text: str) -> bool:
    return any(line.strip().startswith("Negative prompt:") for line in text.split("\n"))


@given(prompt=prompts, negative=prompts | st.just(""), model=texts.filter(str.strip))
@example("Steps: 20, Seed: 1, Size: 8x8", "Steps: 9, Seed: 9, CFG scale: 9", "a, b: c")
@example('"quoted", (a:1.2), [b], <lora:c:1>\n\n', "火 🦊 \\ \r", 'quo"te\\d')
def test_a1111_reads_what_we_wrote(prompt, negative, model):
    """Its reader strips lines, and takes one that begins with "Negative prompt:" for just that."""
    text = parameters(record(prompt=prompt, negative=negative, model=model).recipe)
    got_prompt, got_negative, pairs = as_a1111_reads(text)
    if not says_negative(prompt) and not says_negative(negative):
        assert got_prompt == "\n".join(map(str.strip, prompt.lstrip().split("\n")))
        assert got_negative == "\n".join(map(str.strip, negative.lstrip(" ").split("\n")))
    assert pairs == {
        "Steps": "20",
        "Sampler": "flow-dpm",
        "CFG scale": "4.5",
        "Seed": "7",
        "Size": "64x32",
        "Model": model,
        "Flow shift": "3.0",
        "Version": f"sana {__version__}",
    }


@given(
    # "\r" at the end of a line is taken for that of a file from Windows.
    prompt=prompts.filter(lambda text: "Negative prompt:" not in text and "\r" not in text),
    negative=prompts.filter(lambda text: "\r" not in text) | st.just(""),
    guidance=st.floats(1, 100),
    seed=st.integers(0, 2**32 - 1),
)
def test_we_read_what_we_wrote_there_too(tmp_path, prompt, negative, guidance, seed):
    wanted = {"prompt": prompt, "negative": negative, "guidance": guidance, "seed": seed}
    text = parameters(record(**wanted).recipe)
    found = read(save_png(tmp_path, parameters=text))
    assert (found.source, found.made) == ("a1111", {"sana": __version__})
    known = {"steps", "solver", "flow_shift", "model", "width", "height", *wanted}
    expected = {k: v for k, v in record(**wanted).recipe.as_dict().items() if k in known}
    assert found.recipe == expected
    assert not found.not_understood


FOREIGN = (
    "masterpiece, (best quality:1.2),\nfox in snow <lora:more:0.8>\n"
    "Negative prompt: lowres, bad hands,\nblurry\n"
    "Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1234567890123,"
    ' Size: 512x768, Model hash: 31e35c80fc, Model: sd_xl, Lora hashes: "more: 1, less: 2",'
    " Version: v1.9.4"
)


def test_the_picture_of_another_tool_is_read_as_far_as_it_maps(tmp_path):
    found = read(save_png(tmp_path, parameters=FOREIGN))
    assert (found.source, found.made) == ("a1111", {})
    assert found.recipe == {
        "prompt": "masterpiece, (best quality:1.2),\nfox in snow <lora:more:0.8>",
        "negative": "lowres, bad hands,\nblurry",
        "steps": 28,
        "solver": "flow-dpm",
        "guidance": 7.0,
        "width": 512,
        "height": 768,
    }
    assert found.not_understood == {
        "Schedule type": "Karras",
        "Seed": "1234567890123",  # more than ours can be
        "Model hash": "31e35c80fc",
        "Model": "sd_xl",
        "Lora hashes": "more: 1, less: 2",
        "Version": "v1.9.4",
    }
    assert "not understood: Schedule type Karras, Seed 1234567890123" in found.notes[1]


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + FOREIGN.encode("utf-16-be"),
        b"UNICODE\0" + FOREIGN.encode("utf-16-le"),
        b"UNICODE\0" + FOREIGN.encode("utf-16"),  # with a mark
        b"UNICODE\0" + FOREIGN.encode(),  # as some tools do
        b"ASCII\0\0\0" + FOREIGN.encode(),
        bytes(8) + FOREIGN.encode(),
        FOREIGN.encode(),
    ],
    ids=["big-endian", "little-endian", "marked", "utf-8", "ascii", "undefined", "bare"],
)
@pytest.mark.parametrize("format", ["jpeg", "webp", "avif", "png"])
def test_user_comments_are_read_however_they_are_encoded(tmp_path, format, comment):
    path = save_comment(tmp_path, comment, format)
    assert read(path).recipe == read(save_png(tmp_path, parameters=FOREIGN)).recipe


@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
def test_a_prompt_that_looks_like_letters_the_wrong_way_round_is_read_the_right_way(
    tmp_path, order
):
    text = parameters(record(prompt="一" * 300).recipe)  # U+4E00; U+004E is an N
    found = read(save_comment(tmp_path, b"UNICODE\0" + text.encode(order)))
    assert found.recipe["prompt"] == "一" * 300


def test_the_comment_of_a_jpeg_is_read(tmp_path):
    Image.new("RGB", (64, 32)).save(tmp_path / "a.jpg", comment=FOREIGN.encode())
    assert read(str(tmp_path / "a.jpg")).recipe["steps"] == 28


# --- nothing in it is trusted ------------------------------------------------------------------


def test_fields_of_a_later_version_are_named(tmp_path):
    found = read(save_recipe(tmp_path, wobble=3, solver="flow-magic"))
    assert found.not_understood == {"wobble": "3", "solver": "flow-magic"}
    assert found.recipe["seed"] == 7
    assert found.notes == ["not understood: solver flow-magic, wobble 3"]


def test_fields_that_an_earlier_version_lacked_are_named(tmp_path):
    old = {k: v for k, v in RECIPE.as_dict().items() if k not in ("fit", "flow_shift")}
    fields, notes = recipe_of(save_png(tmp_path, sana=json.dumps({"recipe": old})))
    assert fields == old
    assert notes == ["its recipe does not say flow_shift, fit"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", 7),
        ("prompt", ""),
        ("prompt", "a\0b"),
        ("prompt", "\ud800"),
        ("seed", "7"),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", True),
        ("seed", 7.5),
        ("steps", 10**400),
        ("steps", 0),
        ("guidance", 10**400),
        ("guidance", float("nan")),
        ("guidance", float("inf")),
        ("guidance", None),
        ("width", 10**9),
        ("width", [64]),
        ("height", -32),
        ("model", {"a": [[]]}),
        ("fit", "stretched"),
        ("dit_dtype", "__import__('os')"),
    ],
)
def test_wrong_and_absurd_values_are_left_out_and_named(tmp_path, name, value):
    found = read(save_recipe(tmp_path, **{name: value}))
    assert name not in found.recipe
    assert list(found.not_understood) == [name]
    assert len(found.recipe) == len(RECIPE.as_dict()) - 1
    assert found.notes[0].startswith(f"not understood: {name}")
    assert all(len(note) < 1000 and note.isprintable() for note in found.notes)


@pytest.mark.parametrize(
    "text",
    ["{", "{}", '{"recipe": 5}', '{"recipe": {}}', '{"recipe": {"x": 1}}', '{"a":' * 5000, "{\xff"],
)
def test_a_damaged_recipe_falls_back_on_the_other_text_and_says_so(tmp_path, text):
    with pytest.raises(SanaError, match="is damaged"):
        read(save_png(tmp_path, sana=text))
    found = read(save_png(tmp_path, sana=text, parameters=FOREIGN))
    assert found.source == "a1111"
    assert found.notes[0].startswith("its own recipe is damaged")


def test_a_picture_that_was_resized_says_so(tmp_path):
    found = read(save_recipe(tmp_path, width=128, height=64))
    assert found.notes == ["it was drawn at 128x64 and is 64x32 now"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(
    recipe=st.dictionaries(st.sampled_from(list(RECIPE.as_dict())) | st.text(), json_values),
    made=json_values,
)
def test_any_json_gives_valid_fields_or_one_error(tmp_path, recipe, made):
    path = save_png(tmp_path, sana=json.dumps({"recipe": recipe, "made": made}))
    try:
        found = read(path)
    except SanaError:
        return
    assert set(found.recipe) | set(found.not_understood) <= set(recipe)
    json.dumps(vars(found), allow_nan=False)
    for value in found.recipe.values():
        str(value).encode()


@given(st.lists(texts | traps).map("".join))
def test_any_parameters_text_gives_valid_fields_or_one_error(tmp_path, text):
    try:
        found = read(save_png(tmp_path, parameters=text))
    except SanaError:
        return
    json.dumps(vars(found), allow_nan=False)


@given(
    format=st.sampled_from(FORMATS),
    cuts=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8)), max_size=4),
    length=st.floats(0, 1),
)
def test_damaged_files_are_one_error(tmp_path, format, cuts, length):
    data = bytearray(Path(save(tmp_path, format)).read_bytes())
    for place, garbage in cuts:
        start = int(place * len(data))
        data[start : start + len(garbage)] = garbage
    path = tmp_path / "damaged"
    path.write_bytes(data[: 1 + int(length * len(data))])
    try:
        found = read(str(path))
    except SanaError as error:
        assert error.message
    else:
        json.dumps(vars(found), allow_nan=False)


@pytest.mark.parametrize(
    "line",
    [
        "a" * 15_000,
        'ab: "' * 3_900,
        " " * 19_000,
        "ab:" + " " * 19_000,
        "ab: " * 4_900,
        "a-" * 9_000,
    ],
)
def test_hostile_lines_do_not_hang_it(tmp_path, no_hang, line):
    """A grammar without bounds takes seconds for one such picture; a gallery has many."""
    path = save_png(tmp_path, parameters=f"a fox\n{line}, Steps: 20, Seed: 1, Size: 8x8")
    for _ in range(20):
        with contextlib.suppress(SanaError):
            read(path)


@pytest.mark.parametrize("other", ["{}", '{"seed": 1, "steps": 2}', "a comment", "ab: c, d: e"])
def test_what_is_not_a_recipe_is_not_taken_for_one(tmp_path, other):
    with pytest.raises(SanaError, match="holds no recipe"):
        read(save_png(tmp_path, parameters=other))
    with pytest.raises(SanaError, match="holds no recipe"):
        read(save_comment(tmp_path, b"ASCII\0\0\0" + other.encode()))


# --- no pixel is decoded -----------------------------------------------------------------------


def test_a_picture_beyond_pillows_limit_is_read_without_its_pixels(tmp_path):
    limit = Image.MAX_IMAGE_PIXELS
    small = Path(save(tmp_path, "png", width=65_536, height=65_536)).read_bytes()
    header = b"IHDR" + struct.pack(">II", 65_536, 65_536) + small[24:29]
    body = small.index(b"IDAT") + 4  # and what the pixels are is missing altogether
    path = tmp_path / "large.png"
    path.write_bytes(small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:body])
    found = read(str(path))
    assert (found.width, found.height, found.notes) == (65_536, 65_536, [])
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("format", FORMATS)
def test_no_format_is_decoded_to_be_read(tmp_path, monkeypatch, format):
    path = save(tmp_path, format)
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image))
    found = read(path)
    assert (found.width, found.height, found.recipe["seed"]) == (64, 32, 7)
    assert not decoded
    with Image.open(path) as image:  # decoding would have been noticed
        image.load()
    assert decoded


def test_a_damaged_picture_after_an_intact_recipe_is_read(tmp_path):
    data = Path(save(tmp_path, "png")).read_bytes()
    path = tmp_path / "cut.png"
    path.write_bytes(data[: data.index(b"IDAT") + 8])
    with pytest.raises(OSError), Image.open(io.BytesIO(path.read_bytes())) as image:
        image.load()
    assert recipe_of(str(path))[0] == RECIPE.as_dict()
