"""Prompts from a pipe that are none."""

import io
import json
import sys

import pytest

from faults import FAST, assert_polite


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no prompt"),
        (b" \n\n\t\n", "no prompt"),
        (b"\x89PNG\r\n\x1a\n\0\0", "UTF-8"),
        ("a fox".encode("utf-16")[:-1], "UTF-16"),
        ("un café".encode("cp1252"), "byte 0xE9 after 'un caf'"),
        (b"\xef\xbb\xbf", "no prompt"),
        (b"\xef\xbb\xbf\n\xef\xbb\xbf \r\n", "no prompt"),
        ("\ufeff".encode("utf-16"), "no prompt"),
        (b"a fox\nan\0owl\n", "NUL"),
        (b"x" * 20_001, "20000"),
    ],
    ids=["empty", "blank", "binary", "half", "cp1252", "mark", "marks", "marks-16", "nul", "long"],
)
def test_stdin_without_prompts_is_refused(refused, model, monkeypatch, content, says):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    refused(2, "-", "-m", str(model), *FAST, says=(says,))


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfa fox\r\nan owl",
        b"\xef\xbb\xbfa fox\n\xef\xbb\xbfan owl\n",
        "a fox\nan owl\n".encode("utf-16"),
        "a fox\r\nan owl\r\n".encode("utf-16-le"),
        b"a fox\ran owl\r",
    ],
    ids=["powershell", "joined", "utf-16", "unmarked", "old-mac"],
)
def test_prompts_are_read_without_marks_in_every_encoding_of_a_pipe(
    sana, model, monkeypatch, content
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    run = sana("generate", "-", "\ufeffan elk", "-m", str(model), *FAST, "--dry-run")
    prompts = [recipe["prompt"] for recipe in json.loads(run.out)["recipes"]]
    assert prompts == ["a fox", "an owl", "an elk"], run.err


def test_a_closed_stdin_is_refused(refused, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    refused(2, "-", "-m", str(model), *FAST, says=("stdin",))


def test_binary_stdin_is_refused_in_a_real_process(process, here, model):
    run = process("generate", "-", "-m", str(model), *FAST, input=bytes(range(256)))
    assert (run.returncode, run.stdout) == (2, b"")
    assert_polite(run.stderr.decode(), ("UTF-8",))
