"""Images made at random: what they say of themselves, and their bytes."""

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from faults import DAMAGE, damaged
from random_inputs import FUZZ, JSON, TEXT
from recipes import RECIPE
from sana_cli.images.files import encode
from sana_cli.images.metadata import Metadata

PIXELS = np.zeros((8, 8, 3), np.uint8)
FORMATS = st.sampled_from(["png", "jpeg", "webp"])
KEYS = ["parameters", "prompt", "workflow", "Comment", "Title", "XML:com.adobe.xmp"]
PLACES = st.just("sana") | st.sampled_from(KEYS)
NESTED = st.sampled_from([f"{opening * 100_000}" for opening in ("[", '{"a":', "<a>", "(", "{")])


@st.composite
def records(draw) -> str:
    """What an image may say of itself: a recipe with other values, or no recipe at all."""
    recipe = RECIPE.as_dict()
    for name in draw(st.lists(st.sampled_from(sorted(recipe)) | TEXT, max_size=2)):
        recipe[name] = draw(JSON)
    record = {"version": draw(st.just(1) | JSON), "recipe": recipe}
    text = json.dumps(record | {"sana": "0.1.0", "torch": "2.9", "device": "cpu"})
    return draw(st.sampled_from([text, text[: len(text) // 2]]) | TEXT)


@st.composite
def settings_of_others(draw) -> str:
    """Settings as A1111 writes them, and a graph as ComfyUI does, with any values."""
    value = TEXT | st.integers().map(str) | st.sampled_from(["nan", "1e999", "20", "512x", '"a'])
    if draw(st.booleans()):
        names = ["Steps", "Seed", "CFG scale", "Size", "Model", "Lora hashes", "Version", "x"]
        pairs = draw(st.lists(st.tuples(st.sampled_from(names), value), max_size=5))
        return f"{draw(TEXT)}\nNegative prompt: {draw(TEXT)}\n" + ", ".join(
            f"{name}: {text}" for name, text in pairs
        )
    classes = ["KSampler", "CLIPTextEncode", "EmptyLatentImage", "SaveImage", "x"]
    inputs = st.dictionaries(
        st.sampled_from(["seed", "steps", "cfg", "positive", "negative", "text", "width", "model"]),
        JSON | st.lists(st.sampled_from(["1", "2"]) | st.integers(0, 2), min_size=2, max_size=2),
    )
    node = st.fixed_dictionaries({"class_type": st.sampled_from(classes), "inputs": inputs})
    return json.dumps(draw(st.dictionaries(st.sampled_from("123"), node | JSON, max_size=3)))


def image_saying(text: str, place: str, format: str) -> bytes:
    file, image = io.BytesIO(), Image.fromarray(PIXELS)
    if format == "png":
        info = PngInfo()
        info.add_itxt(place, text)
        image.save(file, "png", pnginfo=info)
        return file.getvalue()
    exif = Image.Exif()
    if place in ("prompt", "workflow"):  # as ComfyUI writes WebP
        exif[0x010F if place == "workflow" else 0x0110] = f"{place}:{text}"
    else:
        codes = {"sana": b"ASCII\0\0\0", "parameters": b"UNICODE\0"}
        code = codes.get(place, b"")
        encoding = "utf-16-be" if place == "parameters" else "utf-8"
        exif.get_ifd(0x8769)[0x9286] = code + text.encode(encoding)
    image.save(file, format, exif=exif.tobytes()[:65000])
    return file.getvalue()


@pytest.mark.hypothesis
def test_random_metadata(survives, files):
    @FUZZ
    @given(
        records() | settings_of_others() | NESTED,
        PLACES,
        FORMATS,
    )
    def holds(text, place, format):
        (files / f"made.{format}").write_bytes(image_saying(text, place, format))
        survives("info", f"made.{format}")
        survives("generate", "--from", f"made.{format}", "--dry-run")

    holds()


@pytest.mark.hypothesis
def test_a_random_damage_to_an_image(survives, files):
    metadata = Metadata(RECIPE, "cpu", "2.9")
    whole = {one: encode(PIXELS, one, None, metadata) for one in ("png", "jpeg", "webp")}

    @FUZZ
    @given(FORMATS, DAMAGE, st.floats(0, 1) | st.just(1.0))
    def holds(format, damage, left):
        data = damaged(whole[format], damage, len(whole[format]))
        (files / "made.png").write_bytes(data[: round(left * len(data))])
        survives("info", "made.png")
        survives("generate", "a star", "-m", "demo", "--image", "made.png", "--dry-run")

    holds()
