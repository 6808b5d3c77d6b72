"""Images to start from: what is read of any file, what is said about it, and what is refused."""

import io
import os
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageCms, PngImagePlugin
from PIL._util import DeferredError

from sana_cli.errors import UsageError
from sana_cli.images.files import MAX_PIXELS, load, read, read_with_notes
from sana_cli.images.masks import read_mask
from sana_cli.remote import upload
from sana_cli.resolve import Inputs

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
RED = (255, 0, 0)


def saved(folder: Path, image: Image.Image, name: str, **options) -> str:
    image.save(folder / name, **options)
    return str(folder / name)


def written(folder: Path, name: str, data: bytes) -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


# --- transparency ------------------------------------------------------------------------------


@given(arrays.arrays(np.uint8, (3, 5, 4)))
def test_transparent_pixels_show_white_whatever_they_hide(tmp_path, rgba):
    pixels, notes = read_with_notes(saved(tmp_path, Image.fromarray(rgba), "a.png"))
    alpha = rgba[..., 3:] / 255
    seen = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels - seen).max() <= 1
    changed = not np.array_equal(pixels, rgba[..., :3])
    assert notes == ["a.png is transparent in parts, which are taken as white"] * changed


def transparent(mode: str) -> tuple[Image.Image, dict]:
    """A red image whose left half is fully transparent, in one of the ways to say so."""
    image = Image.new("RGBA", (4, 2), RED)
    image.paste((0, 255, 0, 0), (0, 0, 2, 2))
    if mode == "key":  # a PNG whose one colour counts as none
        keyed = Image.new("RGB", (4, 2), RED)
        keyed.paste((0, 255, 0), (0, 0, 2, 2))
        return keyed, {"transparency": (0, 255, 0)}
    if mode == "P":
        palette = Image.new("P", (4, 2), 1)
        palette.putpalette([0, 255, 0, *RED])
        palette.paste(0, (0, 0, 2, 2))
        return palette, {"transparency": 0}
    return image.convert(mode), {}


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *(("RGBA", f"a.{name}") for name in ("png", "webp", "gif", "tiff", "avif")),
        *(("P", "a.png"), ("P", "a.gif"), ("key", "a.png"), ("LA", "a.png")),
    ],
)
def test_every_kind_of_transparency_is_seen(tmp_path, mode, name):
    image, options = transparent(mode)
    options |= {"lossless": True} if name == "a.webp" else {}
    pixels, notes = read_with_notes(saved(tmp_path, image, name, **options))
    assert (pixels[:, 0] >= 254).all()
    assert pixels[0, 3, 0] > pixels[0, 3, 1] or mode == "LA"
    assert notes == [f"{name} is transparent in parts, which are taken as white"]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3)], ids=["grey", "RGB"])
def test_a_transparent_colour_of_16_bits_is_seen(tmp_path, color, channels):
    """Pillow writes none: a PNG of two pixels, the first of them transparent."""
    row = b"\0" + b"\x12\x34" * channels + b"\x56\x78" * channels
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", 2, 1, 16, color, 0, 0, 0),
        b"tRNS": b"\x12\x34" * channels,
        b"IDAT": zlib.compress(row),
        b"IEND": b"",
    }
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks.items())
    path = written(tmp_path, "a.png", data)
    pixels, notes = read_with_notes(path)
    assert pixels[0].tolist() == [[255] * 3, [0x56] * 3]
    assert notes == ["a.png is transparent in parts, which are taken as white"]
    assert read_mask(path, alpha=True)[0].tolist() == [[255, 0]]


def test_an_opaque_alpha_channel_is_not_spoken_of(tmp_path):
    image = Image.fromarray(PIXELS).convert("RGBA")
    pixels, notes = read_with_notes(saved(tmp_path, image, "a.png"))
    np.testing.assert_array_equal(pixels, PIXELS)
    assert notes == []


# --- colour profiles ---------------------------------------------------------------------------

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped() -> bytes:
    """A profile of sRGB with red and blue exchanged."""
    profile = bytearray(SRGB)
    at = {name: profile.index(name) + 4 for name in (b"rXYZ", b"bXYZ")}  # offset and size in it
    red, blue = (slice(start, start + 8) for start in at.values())
    profile[red], profile[blue] = profile[blue], profile[red]
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_converted_from_the_profile_of_an_image_only(tmp_path, mode):
    image = Image.new("RGB", (4, 4), RED).convert(mode)
    if mode == "RGBA":
        image.putalpha(128)
    path = saved(tmp_path, image, "a.png", icc_profile=swapped())
    loaded = load(path)
    color = loaded.image.getpixel((0, 0))
    assert loaded.notes == ["a.png was converted from its colour profile to sRGB"]
    assert color[2] >= 254 and max(color[:2]) <= 1 and color[3:] == (128,) * (mode == "RGBA")
    for option in ("--mask", "--control"):
        stored = load(path, option=option)
        assert (stored.image.getpixel((0, 0))[:3], stored.notes) == (RED, [])


@pytest.mark.parametrize(("option", "color"), [("image", (0, 0, 255)), ("mask", RED)])
def test_a_client_encodes_for_a_server_what_it_would_read_itself(tmp_path, option, color):
    path = saved(tmp_path, Image.new("RGB", (4, 4), RED), "a.tiff", icc_profile=swapped())
    sent = Image.open(io.BytesIO(upload(option, path)))
    assert sent.getpixel((0, 0)) == color


def test_a_profile_of_srgb_changes_nothing(tmp_path):
    path = saved(tmp_path, Image.fromarray(PIXELS), "a.png", icc_profile=SRGB)
    pixels, notes = read_with_notes(path)
    np.testing.assert_array_equal(pixels, PIXELS)
    assert notes == []


@pytest.mark.parametrize("why", ["damaged", "of other colours", "no LittleCMS"])
def test_of_a_profile_that_cannot_be_used_a_note_is_made(tmp_path, monkeypatch, why):
    if why == "no LittleCMS":
        monkeypatch.setattr(ImageCms, "core", DeferredError(ImportError("not built")))
    profile = {"damaged": b"x" * 200, "of other colours": SRGB.replace(b"RGB ", b"CMYK", 1)}
    path = saved(
        tmp_path, Image.fromarray(PIXELS), "a.png", icc_profile=profile.get(why, swapped())
    )
    pixels, (note,) = read_with_notes(path)
    np.testing.assert_array_equal(pixels, PIXELS)
    assert re.fullmatch(
        r"a.png has a colour profile that cannot be used \(.+\); sRGB is assumed", note
    )


# --- frames, EXIF, size ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tiff"])
def test_of_several_frames_the_first_is_read_and_that_is_said(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
    pixels, notes = read_with_notes(path)
    assert pixels[4, 4, 0] > 240 and pixels[4, 4, 1:].max() < 15
    assert notes == [f"{name} has 3 frames, of which the first is used"]


def test_the_second_image_in_a_phones_file_is_no_frame(tmp_path):
    image = Image.fromarray(PIXELS)
    path = saved(tmp_path, image, "a.mpo", save_all=True, append_images=[image])
    assert read_with_notes(path)[1] == []


@pytest.mark.parametrize("format", ["png", "webp"])
def test_damaged_exif_costs_no_image(tmp_path, format):
    path = saved(tmp_path, Image.fromarray(PIXELS), f"a.{format}", exif=b"Exif\0\0MM?!", lossless=1)
    pixels, notes = read_with_notes(path)
    np.testing.assert_array_equal(pixels, PIXELS)
    assert notes == [f"a.{format} has damaged EXIF, so it may need to be turned"]


def test_a_photo_of_108_megapixels_is_read(tmp_path):
    path = saved(tmp_path, Image.new("L", (12_000, 9000), 200), "a.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(path).shape == (9000, 12_000, 3)


def claiming(path: str, width: int, height: int) -> None:
    """Change the size in the header of a JPEG or PNG."""
    data = bytearray(Path(path).read_bytes())
    if path.endswith(".png"):
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    else:
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    Path(path).write_bytes(data)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize(
    ("width", "height"), [(16_320, 12_240), (12_000, 12_000), (65_500, 65_500)]
)
def test_a_larger_one_is_refused_by_its_header_and_told_what_helps(tmp_path, name, width, height):
    path = saved(tmp_path, Image.new("L", (8, 8)), name)
    claiming(path, width, height)
    with pytest.raises(UsageError, match="134 million") as caught:
        read(path)
    assert "shrink" in caught.value.hint
    assert "attack" not in caught.value.message and width * height > MAX_PIXELS


# --- what is no image that can be read ---------------------------------------------------------

FOREIGN = {
    "a.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "HEIC", "JPEG or PNG"),
    "b.heic": (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic" + bytes(40), "HEIC", "JPEG or PNG"),
    "a.jxl": (b"\xff\x0a\xfa\x7f\x01", "JPEG XL", "JPEG or PNG"),
    "b.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20), "JPEG XL", "JPEG or PNG"),
    "a.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG", "export it as a PNG"),
    "b.svg": (
        b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- Inkscape -->\n<svg\n width="8"/>',
        *("SVG", "export it as a PNG"),
    ),
    "a.pdf": (b"%PDF-1.7\n", "PDF", "export it as a PNG"),
    "a.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript", "export it as a PNG"),
    "a.cr3": (b"\0\0\0\x18ftypcrx \0\0\0\0", "raw", "develop"),
    "a.cr2": (b"II*\0\x10\0\0\0CR\x02\0" + bytes(40), "raw", "develop"),
    "a.raf": (b"FUJIFILMCCD-RAW 0201", "raw", "develop"),
    "a.mp4": (b"\0\0\0\x20ftypisom\0\0\2\0", "video", "frames"),
    "a.mov": (b"\0\0\0\x14ftypqt  \0\0\2\0", "video", "frames"),
    "a.webm": (b"\x1aE\xdf\xa3\x9fB\x86\x81", "video", "frames"),
    "a.html": (
        b"<!DOCTYPE html>\n<html><svg width=3></svg></html>",
        "web page",
        "the image itself",
    ),
    "a.lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
        "Git LFS",
        "git lfs pull",
    ),
    "a.zip": (b"PK\x03\x04\x14\0", "archive", "unpack"),
    "a.svgz": (b"\x1f\x8b\x08\0", "compressed", "unpack"),
    "a.xcf": (b"gimp xcf v011\0", "GIMP", "JPEG or PNG"),
    "a.exr": (b"v/1\x01\x02\0\0\0", "OpenEXR", "JPEG or PNG"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("named", ["as it is", "photo.jpg"])
def test_a_format_that_is_not_read_is_named_with_what_to_do(tmp_path, name, named):
    data, what, hint = FOREIGN[name]
    path = written(tmp_path, name if named == "as it is" else named, data)
    with pytest.raises(UsageError, match=what) as caught:
        read(path)
    assert caught.value.message.startswith(f"--image {path}")
    assert hint in caught.value.hint


def test_the_preview_in_a_cameras_raw_file_is_not_taken_for_the_photo(tmp_path):
    path = saved(tmp_path, Image.fromarray(PIXELS), "a.dng", format="TIFF", tiffinfo={254: 1})
    with pytest.raises(UsageError, match="raw file, of which only a small preview"):
        read(path)


def test_a_damaged_image_is_called_damaged(tmp_path):
    path = Path(saved(tmp_path, Image.fromarray(PIXELS), "a.jpg"))
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UsageError, match="it is damaged"):
        read(str(path))


def test_nothing_and_a_pipe_are_no_image(tmp_path):
    with pytest.raises(UsageError, match="it is empty"):
        read(written(tmp_path, "a.png", b""))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a regular file"):
        read(str(tmp_path / "pipe"))


@given(st.sampled_from([data for data, _, _ in FOREIGN.values()]) | st.just(b""), st.binary())
def test_no_bytes_are_too_strange(tmp_path, head, rest):
    try:
        assert read(written(tmp_path, "a", head + rest)).dtype == np.uint8
    except UsageError as error:
        assert "--image" in error.message


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGB"])
def test_no_note_is_made_of_what_needs_none(tmp_path, mode):
    path = saved(tmp_path, Image.fromarray(PIXELS).convert(mode), "a.tiff")
    assert read_with_notes(path)[1] == []


# --- masks and control images, as the image itself ---------------------------------------------

ROLES = [("mask", "--mask"), ("control", "--control"), ("alpha", "--mask"), ("init", "--image")]
UNREADABLE = {
    "a.heic": (b"\0\0\0\x18ftypheic", "it is a HEIC image"),
    "a.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is an SVG image"),
    "a.jxl": (b"\xff\x0a\0\0", "it is a JPEG XL image"),
    "a.txt": (b"a mask", "it is not an image, or a damaged one"),
    "empty.png": (b"", "it is empty"),
}


@pytest.mark.parametrize(("role", "option"), ROLES)
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_named_with_its_option(tmp_path, role, option, name):
    data, says = UNREADABLE[name]
    with pytest.raises(UsageError) as caught:
        Inputs().add(written(tmp_path, name, data), role)
    assert caught.value.message == f"{option} {tmp_path / name} cannot be read: {says}"


@pytest.mark.parametrize(("role", "option"), ROLES)
def test_what_is_too_large_or_no_file_is_refused_with_its_option(tmp_path, role, option):
    large = saved(tmp_path, Image.new("L", (8, 8)), "a.png")
    claiming(large, 12_000, 12_000)
    for path, says in ((large, "12000x12000 pixels"), (str(tmp_path), "is not a regular file")):
        with pytest.raises(UsageError, match=f"^{option} .*{says}"):
            Inputs().add(path, role)


@pytest.mark.parametrize("role", ["init", "mask", "control"])
def test_odd_images_that_pillow_reads_are_inputs_as_others_are(tmp_path, role):
    white = Image.new("RGB", (8, 8), "white")
    text = PngImagePlugin.PngInfo()
    text.add_text("transparency", "x")
    for path in (
        saved(tmp_path, white, "a.png", pnginfo=text),
        saved(tmp_path, white.convert("LAB"), "a.tiff"),
    ):
        inputs = Inputs()
        assert inputs[inputs.add(path, role).sha256].min() > 250
        uploads = Inputs()
        if path.endswith("png"):
            uploads.add_bytes("image", Path(path).read_bytes())
            assert uploads[uploads.add("image", role).sha256].min() > 250


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_as_its_image_is(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.zeros((16, 32), np.uint8)
    stored[:4, :8] = 255
    path = saved(tmp_path, Image.fromarray(stored), "a.png", exif=exif)
    inputs = Inputs()
    image, mask = inputs.add(path), inputs.add(path, "mask")
    assert (image.width, image.height) == (mask.width, mask.height)
    assert image.turned == mask.turned == (orientation > 1)
    np.testing.assert_array_equal(inputs[image.sha256][..., 0], inputs[mask.sha256])


def test_a_mask_of_16_bits_is_scaled_and_one_of_floats_refused(tmp_path):
    values = np.array([[0, 200, 30_000, 40_000]], np.uint16)
    mask, _ = read_mask(saved(tmp_path, Image.fromarray(values), "a.png"))
    assert mask.tolist() == [[0, 0, 0, 255]]
    floats = Image.fromarray(np.ones((2, 2), np.float32))
    with pytest.raises(UsageError, match=r"^--mask .* do not say what is white"):
        read_mask(saved(tmp_path, floats, "a.tiff"))


@pytest.mark.parametrize("role", ["image", "mask"])
def test_what_is_not_used_of_an_input_is_said_once(sana, tmp_path, role):
    frames = [Image.new("RGBA", (64, 64), (255, 255, 255, a)) for a in (0, 255)]
    moving = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[274] = 6
    still = saved(tmp_path, Image.new("RGB", (64, 64), RED), "b.png", exif=exif)
    words = {
        "image": ("-m", "demo", "--image", moving),
        "mask": ("-m", "demo", "--image", still, "--mask", moving),
    }[role]
    run = sana("generate", "a circle", *words, "--dry-run", "--device", "cpu")
    assert run.code == 0, run.err
    assert run.err.count("warning: a.gif has 2 frames, of which the first is used") == 1
    assert ("(64x64, turned by its EXIF)" in run.err) == (role == "mask")


def test_a_file_that_was_replaced_is_read_again_though_it_kept_size_and_time(tmp_path):
    inputs, hashes = Inputs(), set()
    for number, color in enumerate(("red", "lime")):
        path = saved(tmp_path, Image.new("RGB", (8, 8), color), f"{number}.bmp")
        os.utime(path, (1, 1))
        hashes.add(inputs.add(str(Path(path).replace(tmp_path / "a.bmp"))).sha256)
    assert len(hashes) == 2


def test_images_of_equal_bytes_in_two_shapes_are_not_confused(tmp_path):
    inputs = Inputs()
    wide = inputs.add(saved(tmp_path, Image.new("RGB", (64, 32), "white"), "wide.png"))
    same = inputs.add(saved(tmp_path, Image.new("RGB", (64, 32), "white"), "same.png"))
    assert wide.sha256 == same.sha256
    with pytest.raises(UsageError, match="tall.png has the same bytes as .*same.png, in another"):
        inputs.add(saved(tmp_path, Image.new("RGB", (32, 64), "white"), "tall.png"))
    assert inputs[wide.sha256].shape == (32, 64, 3)
