"""Files: formats, metadata, safe and unused names, whole or not at all."""

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recipes import RECIPE
from sana_cli import __version__
from sana_cli.errors import UsageError
from sana_cli.images import files as images
from sana_cli.images.a1111 import parameters
from sana_cli.images.metadata import Metadata
from sana_cli.images.names import parse_output, safe_name, slug
from sana_cli.recipe import Recipe

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)


def record(**changes) -> Metadata:
    return Metadata(Recipe(**(RECIPE.as_dict() | changes)), "cpu", "2.9")


def test_png_keeps_every_pixel_and_the_recipe():
    image = Image.open(io.BytesIO(images.encode(PIXELS, "png", None, record())))
    np.testing.assert_array_equal(np.asarray(image), PIXELS)
    stored = json.loads(image.text["sana"])
    assert Recipe(**stored["recipe"]) == RECIPE
    assert stored["made"] == {"sana": __version__, "torch": "2.9", "device": "cpu"}
    assert image.text["parameters"].splitlines()[0] == "a red circle"
    assert "Seed: 7" in image.text["parameters"].splitlines()[-1]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_any_prompt_survives_in_a_png(prompt):
    data = images.encode(PIXELS[:4, :4], "png", None, record(prompt=prompt))
    stored = json.loads(Image.open(io.BytesIO(data)).text["sana"])
    assert stored["recipe"]["prompt"] == prompt


@pytest.mark.parametrize("format", ["jpeg", "webp", "avif"])
def test_other_formats_carry_both_texts_in_exif(format):
    fox = record(prompt="a fox, “火” 🦊")
    image = Image.open(io.BytesIO(images.encode(PIXELS, format, 90, fox)))
    assert image.size == (64, 32)
    assert image.getexif()[0x010E] == fox.as_json()
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    assert comment[8:].decode("utf-16-be") == parameters(fox.recipe)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "avif"])
def test_no_metadata_means_none(format):
    data = images.encode(PIXELS, format, None, None)
    image = Image.open(io.BytesIO(data))
    assert not dict(image.getexif())
    assert not [key for key in ("parameters", "sana", "exif", "xmp") if image.info.get(key)]
    assert b"red circle" not in data


def test_lower_quality_is_smaller():
    big, small = (images.encode(PIXELS, "webp", q, None) for q in (95, 20))
    assert len(small) < len(big)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (None, "a-red-circle-7.png"),
        ("out.jpg", "out.jpg"),
        ("{index:03}-{seed}.webp", "004-7.webp"),
        ("{model}/{width}x{height}-{slug}", "demo/64x32-a-red-circle.png"),
        ("fox/", "fox/a-red-circle-7.png"),
        ("v1.5-{seed}.png", "v1.5-7.png"),
    ],
)
def test_output_names(output, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(parse_output(output, None).path(RECIPE, 4)) == expected


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_name_is_a_single_safe_file(text):
    name = safe_name(f"{slug(text)}-{text}.png")
    assert name.endswith(".png")
    assert not set('<>:"/\\|?*\0') & set(name)
    assert len(name.encode()) <= 250
    assert name[0] not in " ." or name == ".png"


@pytest.mark.parametrize("name", ["CON", "aux", "com1", "..", "", "..."])
def test_names_that_systems_reserve_are_changed(name):
    stem, _, suffix = safe_name(f"{name}.png").rpartition(".")
    assert suffix == "png"
    assert stem.lower() not in {"con", "aux", "com1", "", ".", ".."}


# --- pictures to start from --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["x.png", "x.bmp", "x.tiff", "x.webp", "x.gif", "x.ppm", "x.tga", "x.jp2"]
)
def test_pixels_are_read_from_any_format(tmp_path, name):
    gray = np.repeat(PIXELS[..., :1], 3, axis=2)  # which a palette of 256 holds as well
    Image.fromarray(gray).save(tmp_path / name, lossless=True)
    np.testing.assert_array_equal(images.read(str(tmp_path / name)), gray)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_its_exif_says(tmp_path, orientation):
    turned = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.swapaxes(0, 1),
        6: np.rot90(PIXELS, -1),
        7: PIXELS[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(PIXELS),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(images.read(str(tmp_path / "x.png")), turned[orientation])


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    Image.fromarray(np.array([[0, 300, 40_000, 65_535]], np.uint16)).save(tmp_path / "x.png")
    assert images.read(str(tmp_path / "x.png"))[0, :, 0].tolist() == [0, 1, 156, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_colours_of_any_kind_become_rgb(tmp_path, mode):
    picture = Image.fromarray(PIXELS).convert("LAB" if mode == "LAB" else "RGB")
    picture.convert(mode).save(tmp_path / "x.tiff")
    pixels = images.read(str(tmp_path / "x.tiff"))
    assert (pixels.shape, pixels.dtype) == (PIXELS.shape, np.uint8)
    assert pixels.std() > 20


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_known_range_are_refused(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "x.tiff")
    with pytest.raises(UsageError, match=mode):
        images.read(str(tmp_path / "x.tiff"))
