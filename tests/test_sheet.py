"""Contact sheets: every image once, as it is on disk, as pixels or as a page."""

import html
import json
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from recipes import RECIPE
from sana_cli.images.contact_sheet import MAX_PIXELS, _grid
from sana_cli.images.files import encode
from sana_cli.images.metadata import Metadata

COLOURS = {"red-2": (200, 0, 0), "green-10": (0, 160, 0), "blüe <b>-11": (0, 0, 220)}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Three images of three shapes, one of them in a folder below, and files that are none."""
    monkeypatch.chdir(tmp_path)
    inner = tmp_path / "out/in ner"
    inner.mkdir(parents=True)
    for number, (name, colour) in enumerate(COLOURS.items()):
        pixels = np.full((64 + 64 * number, 128, 3), colour, np.uint8)
        place = inner if number == 2 else tmp_path / "out"
        record = Metadata(RECIPE, "cpu", "2") if number != 1 else None
        (place / f"{name}.png").write_bytes(encode(pixels, "png", None, record))
    (tmp_path / "out/.sana-x.png").write_text("a killed writer's")
    (tmp_path / "out/notes.txt").write_text("x")
    return tmp_path / "out"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_an_image_shows_every_image_once(sana, folder, suffix):
    run = sana("info", "--sheet", f"sheet{suffix}", "out")
    assert (run.code, run.out, run.err) == (0, f"sheet{suffix}\n", "")
    with Image.open(f"sheet{suffix}") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    for colour in COLOURS.values():
        near = np.abs(pixels - colour).max(-1) < 30
        rows, columns = np.nonzero(near)
        assert near.sum() > 0.9 * np.ptp(rows) * np.ptp(columns)  # one rectangle


def test_a_page_links_every_image_and_shows_its_recipe(sana, folder):
    assert sana("info", "--sheet", "page.html", "out").code == 0
    page = Path("page.html").read_text(encoding="utf-8")
    links = [unquote(html.unescape(link)) for link in re.findall(r'<img src="([^"]*)"', page)]
    assert [Path(link).stem for link in links] == ["green-10", "blüe <b>-11", "red-2"]
    assert all(Path(link).is_file() for link in links)
    assert "<b>" not in page and "<script" not in page
    assert page.count("<dt>steps</dt>") == 2 and page.count("no recipe") == 1
    assert html.escape("sana generate") in page


def test_numbers_in_names_are_in_order(sana, folder):
    for number in (10, 9):
        shutil.copy(folder / "red-2.png", folder / f"red-{number}.png")
    assert sana("info", "--sheet", "page.html", "out").code == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert re.findall(r"<summary>red-(\d+)", page) == ["2", "9", "10"]


def test_an_image_that_cannot_be_read_is_left_out_and_named(sana, folder):
    (folder / "cut.png").write_bytes((folder / "red-2.png").read_bytes()[:60])
    with Image.open(folder / "red-2.png") as image:
        image.save(folder / "cut.avif")
    data = bytearray((folder / "cut.avif").read_bytes())
    data[-len(data) // 2 :] = bytes(len(data) - len(data) // 2)  # its decoder raises RuntimeError
    (folder / "cut.avif").write_bytes(data)
    run = sana("info", "--sheet", "sheet.png", "out")
    assert run.code == 0 and "cut.png is not on the sheet" in run.err
    run = sana("info", "--sheet", "sheet.png", "out/cut.png")
    assert (run.code, run.out) == (1, "") and "error: no image is there" in run.err


@pytest.mark.skipif(sys.platform != "linux", reason="needs names that are not UTF-8")
def test_a_name_that_is_not_utf_8_is_on_the_page(sana, folder):
    os.rename(folder / "red-2.png", os.fsencode(folder) + b"/caf\xe9.png")
    assert sana("info", "--sheet", "page.html", "out").code == 0
    assert r"caf\udce9.png" in Path("page.html").read_text(encoding="utf-8")


def test_a_sheet_is_never_overwritten_and_never_on_itself(sana, folder):
    first = sana("info", "--sheet", "out/sheet.png", "out").out
    second = sana("info", "--sheet", "out/sheet.png", "out").out
    third = sana("info", "--sheet", "out/sheet.png", "out").out
    assert [first, second, third] == [f"out/sheet{n}.png\n" for n in ("", "-2", "-3")]
    assert len({Path(made.strip()).read_bytes() for made in (first, second, third)}) == 1


def test_images_are_shown_as_other_programs_show_them(sana, tmp_path, monkeypatch):
    """Upright, on white where they are transparent, and 16 bits as their upper eight."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the left edge is the top
    half = Image.new("RGB", (64, 32), "black")
    half.paste("white", (0, 0, 32, 32))
    half.save("out/a.png", exif=exif)
    Image.new("RGBA", (32, 64), (0, 0, 0, 0)).save("out/b.png")
    Image.fromarray(np.full((64, 32), 0x8000, np.uint16)).save("out/c.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo("out/d.png")
    assert sana("info", "--sheet", "sheet.png", "out").code == 0
    with Image.open("sheet.png") as sheet:
        grey = np.asarray(sheet.convert("L"))[:-30]  # above the names
    middle = (grey.shape[0] + 30 - 16) // 2
    below, across = np.nonzero(grey < 10)
    assert (len(below), np.ptp(below), np.ptp(across)) == (32 * 32, 31, 31)
    assert abs(below.min() - middle) < 8, "the left half was white, and so is the upper one"
    assert np.count_nonzero(grey == 0x80) == 32 * 64
    assert np.count_nonzero(grey > 250) == grey.size - 32 * 32 - 32 * 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("info", "--sheet", "sheet.gif", "out"), "ends in no known suffix"),
        (("info", "--sheet", "nowhere/x/sheet.png", "out/notes.txt"), "notes.txt is not on"),
        (("info", "--sheet", "sheet.png", "empty"), "holds no image"),
        (("info", "--sheet", "sheet.png", "--json", "out"), "--json has no effect"),
        (("batch", "out/notes.txt", "--sheet", "sheet.png", "--check"), "no effect with --check"),
        (("batch", "out/notes.txt", "--sheet", "sheet"), "ends in no known suffix"),
    ],
)
def test_a_sheet_that_cannot_be_is_refused_in_one_line(sana, folder, words, message):
    Path("empty").mkdir()
    run = sana(*words)
    assert run.code in (1, 2) and run.out == "" and message in run.err
    assert not list(Path().glob("sheet*"))


@pytest.mark.parametrize("count", [1, 7, 1000, 100_000])
@pytest.mark.parametrize("size", [(1024, 1024), (512, 2048), (4096, 1024)])
def test_any_number_of_images_fits_on_a_sheet(count, size):
    width, height = _grid([size] * count).size(count)
    assert width * height <= 1.2 * MAX_PIXELS and max(width, height) < 16383


def test_a_batch_ends_with_the_sheet_of_its_folder(sana, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("jobs.txt").write_text("a red circle\na green star")
    words = ("batch", "jobs.txt", "-m", "demo", "-r", "256", "--steps", "1")
    assert sana(*words, "-q").code == 0
    run = sana(*words, "--sheet", "sheet.html", "--json")  # of images that are there already
    found = [json.loads(line) for line in run.out.splitlines()]
    assert [event["event"] for event in found][-2:] == ["sheet", "summary"]
    assert (found[-2]["path"], found[-2]["images"]) == ("sheet.html", 2)
    page = Path("sheet.html").read_text(encoding="utf-8")
    assert page.index("a red circle") < page.index("a green star")
