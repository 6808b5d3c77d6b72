"""Places to write to that cannot be, and names that no disk would take."""

import os
import sys

import pytest

from faults import FAST, assert_polite, brief, edit, named
from sana_cli.errors import UsageError
from sana_cli.server.fields import read, request_model


@pytest.mark.parametrize(
    ("words", "says"),
    named(
        (("-o", ""), "--output"),
        (("-o", "fox.gif"), ".gif"),
        (("-o", "{slug}.gif"), ".gif"),
        (("--format", "gif"), "--format"),
        (("-o", "fox.png", "--format", "webp"), "--format"),
        (("-o", "{subject}.png"), "{subject}"),
        (("-o", "{}.png"), "{}"),
        (("-o", "{0}.png"), "{0}"),
        (("-o", "{slug.__class__}.png"), "{slug.__class__}"),
        (("-o", "{slug!r}.png"), "{slug}"),
        (("-o", "{seed:x}.png"), "{seed:x}"),
        (("-o", "{seed:999999999}.png"), "{seed:999999999}"),
        (("-o", "{seed:{width}}.png"), "{seed"),
        (("-o", "{guidance:.1f}.png"), "{guidance:.1f}"),
        (("-o", "{slug.png"), "template"),
        (("-o", "slug}.png"), "template"),
        (("-o", "{slug}/{subject}/x.png"), "{subject}"),
        (("-o", "x" * 300 + "/fox.png"), "--output"),
        (("-o", "x/" * 3000 + "fox.png"), "--output"),
        (("-o", "x" * 5000), "--output"),
        (("-o", "/proc/nope/x.png"), "/proc"),
        (("-o", "-", "-n", "2"), "-o -"),
        (("-o", "-", "--json"), "--json"),
        (("-o", "-", "--force"), "--force"),
        (("--quality", "90"), "PNG"),
        (("--quality", "90", "-o", "fox.png"), "PNG"),
        (("--quality", "0", "--format", "webp"), "--quality"),
        (("--quality", "101", "-o", "fox.jpg"), "--quality"),
        (("--quality", "best", "-o", "fox.jpg"), "--quality"),
    ),
)
def test_a_wrong_output_is_refused(refused, model, words, says):
    refused(2, "a fox", "-m", str(model), *FAST, *words, says=(says,))


@pytest.mark.parametrize("format", ["webp", "avif"])
def test_a_format_that_this_pillow_does_not_write_is_refused_before_drawing(
    refused, model, sana, monkeypatch, format
):
    monkeypatch.setitem(sys.modules, f"PIL._{format}", None)  # as in a build without it
    says = (f"Pillow does not write {format.upper()}",)
    for words in (("-o", f"fox.{format}"), ("-o", "-", "--format", format)):
        refused(2, "a fox", "-m", str(model), *FAST, *words, says=says)
    run = sana("info", str(model), "--sheet", f"sheet.{format}")
    assert (run.code, run.out) == (2, "") and says[0] in run.err
    with pytest.raises(UsageError, match=says[0]):
        read(request_model()(prompt="a fox", output_format=format))


@pytest.mark.parametrize("output", ["file/fox.png", "file/a/b/fox.png", "file/", "file/{seed}"])
def test_a_file_is_no_folder_to_write_in(refused, model, tmp_path, output):
    (tmp_path / "file").write_text("mine")
    refused(2, "a fox", "-m", str(model), *FAST, "-o", f"{tmp_path}/{output}", says=("file",))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(refused, model, tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o500)
    output = str(tmp_path / "theirs" / "fox.png")
    refused(2, "a fox", "-m", str(model), *FAST, "-o", output, says=("permission",))


@pytest.mark.parametrize(("suffix", "side"), [("webp", 16416), ("jpg", 65536)])
def test_a_picture_too_wide_for_its_format_is_refused_before_drawing(refused, model, suffix, side):
    edit(model / "transformer/config.json", sample_size=64)
    size = ("--res", f"{side}x32", "--fit", "exact", "-o", f"fox.{suffix}")
    refused(2, "a fox", "-m", str(model), *FAST, *size, says=(str(side),))


@pytest.mark.parametrize("name", ["birds", "birds.png"])
def test_the_name_of_a_folder_means_in_that_folder(sana, model, here, name):
    (here / name).mkdir()
    run = sana("generate", "a fox", "-m", str(model), *FAST, "-o", name)
    assert (run.code, run.out) == (0, f"{name}/a-fox-7.png\n")
    assert [path.name for path in here.rglob("*.png") if path.is_file()] == ["a-fox-7.png"]


def test_force_does_not_replace_a_folder(sana, model, here):
    (here / "a-fox.png" / "kept").mkdir(parents=True)
    run = sana("generate", "a fox", "-m", str(model), *FAST, "-o", "{slug}.png", "-f")
    assert (run.code, run.out) == (1, "")
    assert_polite(run.err, ("a-fox.png",))
    assert sorted(here.rglob("*")) == [here / "a-fox.png", here / "a-fox.png" / "kept"]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("birds/of\\prey", "birds-of-prey"),
        ("../../etc/passwd", "etc-passwd"),
        ("/", "image"),
        ("..", "image"),
        ("🦊🌊", "image"),
        ("a 🦊 fox", "a-fox"),
        ("red fox " * 37, "red-fox-" * 7 + "red"),
        ("x" * 300, "x" * 60),
        ("狐" * 300, "狐" * 60),
        ("a\nfox\t\x1b[31m", "a-fox-31m"),
        ("con", "_con"),
        ("{slug}", "slug"),
        ("'$(rm -rf ~)'", "rm-rf"),
    ],
    ids=brief,
)
def test_any_prompt_gives_one_safe_file_name(sana, model, here, prompt, name):
    run = sana("generate", prompt, "-m", str(model), *FAST, "-o", "{slug}.png")
    assert (run.code, run.out) == (0, f"{name}.png\n")
    assert list(here.rglob("*")) == [here / f"{name}.png"]


def test_a_long_file_name_keeps_its_suffix(sana, model, here):
    run = sana("generate", "a fox", "-m", str(model), *FAST, "-o", "é" * 120 + "{slug}.webp")
    assert run.code == 0, run.err
    (path,) = here.rglob("*")
    assert path.name.startswith("éé") and path.suffix == ".webp"


def test_a_file_name_too_long_for_the_disk_is_shortened_or_refused(sana, model, here):
    run = sana("generate", "a fox", "-m", str(model), *FAST, "-o", "x" * 300 + ".png")
    if run.code:
        assert (run.code, run.out, list(here.iterdir())) == (2, "", [])
        assert_polite(run.err, ("--output",))
    else:
        (path,) = here.iterdir()
        assert path.name.startswith("xxx") and path.suffix == ".png"
