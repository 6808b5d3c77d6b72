"""Terminals and file systems whose code page lacks a character of a path or a prompt."""

import io
import json
import os
import sys
from pathlib import Path

import pytest

from faults import FAST

PROMPTS = ("μια κόκκινη αλεπού", "рыжая лиса", "一只红狐狸", "zażółć 🦊", "a fox")
CODE_PAGES = ("cp1252", "cp437", "ascii", "latin-1", "cp932", "utf-8")


@pytest.fixture
def printed(sana, monkeypatch):
    """Run `sana` with a stdout of some encoding; gives the exit code and the bytes."""

    def run(encoding: str, *words: str) -> tuple[int, bytes]:
        stdout = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stdout, encoding=encoding))
        done = sana(*words)
        sys.stdout.flush()
        assert "Traceback" not in done.err, done.err
        return done.code, stdout.getvalue()

    return run


@pytest.mark.parametrize("page", CODE_PAGES)
def test_a_path_is_printed_with_what_the_code_page_has(printed, model, here, page):
    code, out = printed(page, "generate", "Füchse 🦊 λύκος", "-m", str(model), *FAST)
    (path,) = here.iterdir()
    assert path.name == "füchse-λύκος-7.png"
    assert (code, out) == (0, f"{path.name}{os.linesep}".encode(page, "replace"))


@pytest.mark.parametrize("page", ["cp437", "utf-8"])
def test_a_batch_goes_on_after_a_path_that_cannot_be_printed(printed, model, here, page):
    (here / "jobs.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    code, out = printed(page, "batch", "jobs.txt", "-m", str(model), *FAST, "-o", "out")
    assert code == 0
    assert len(out.decode(page).splitlines()) == len(list(here.glob("out/*.png"))) == len(PROMPTS)


@pytest.mark.parametrize("page", CODE_PAGES)
def test_json_is_ascii_and_holds_the_whole_path(printed, model, here, page):
    code, out = printed(page, "generate", "狐 λύκος", "-m", str(model), *FAST, "--json")
    assert (code, out.isascii()) == (0, True)
    assert Path(json.loads(out)["images"][0]["path"]).is_file()
    code, out = printed(page, "info", "--json", *map(str, here.glob("*.png")))
    assert (code, out.isascii()) == (0, True)
    assert json.loads(out)["images"][0]["recipe"]["prompt"] == "狐 λύκος"
    code, out = printed(page, "info", *map(str, here.glob("*.png")))
    assert (code, "狐 λύκος".encode(page, "replace") in out) == (0, True)


@pytest.mark.parametrize("words", [("--help",), ("generate", "--help"), ("models", "list"), ()])
@pytest.mark.parametrize("page", ["cp437", "ascii"])
def test_help_and_tables_are_printed_in_any_code_page(printed, page, words):
    code, out = printed(page, *words)
    assert code == (0 if words else 2)
    assert out.decode(page).strip()


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names there are Unicode")
def test_a_file_name_that_is_not_text_is_printed_as_its_bytes(printed, model, here):
    (here / os.fsdecode(b"caf\xe9.txt")).write_text("a fox")
    words = ("-m", str(model), *FAST)
    code, out = printed("utf-8", "batch", os.fsdecode(b"caf\xe9.txt"), *words)
    assert (code, out) == (0, b"caf\xe9-images/a-fox-7.png\n")
    assert os.path.isfile(out.strip())


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names there are Unicode")
def test_names_fit_the_code_page_of_the_file_system(new_interpreter, here):
    (here / "jobs.jsonl").write_text(
        json.dumps({"prompt": "red λύκος", "of": "ä"}) + '\n{"prompt": "x", "of": "\\ud83e"}\n'
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ("-m", "demo", "-r", "256", "--steps", "1", "-s", "7", "-o", "out/{slug}/{of}-{slug}")
    run = new_interpreter("batch", "jobs.jsonl", *words, env=os.environ | ascii_only)
    assert run.returncode == 0, run.stderr
    paths = run.stdout.decode("ascii").splitlines()
    assert paths == ["out/red------/--red------.png", "out/x/--x.png"]
    assert all(map(os.path.isfile, paths))
