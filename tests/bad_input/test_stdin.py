"""Prompts from a pipe that are none."""

import io
import sys

import pytest

from faults import FAST, assert_polite


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no prompt"),
        (b" \n\n\t\n", "no prompt"),
        (b"\x89PNG\r\n\x1a\n\0\0", "UTF-8"),
        ("a fox".encode("utf-16"), "UTF-8"),
        (b"a fox\nan\0owl\n", "NUL"),
        (b"x" * 20_001, "20000"),
    ],
    ids=["empty", "blank", "binary", "utf-16", "nul", "long"],
)
def test_stdin_without_prompts_is_refused(refused, model, monkeypatch, content, says):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    refused(2, "-", "-m", str(model), *FAST, says=(says,))


def test_a_closed_stdin_is_refused(refused, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    refused(2, "-", "-m", str(model), *FAST, says=("stdin",))


def test_binary_stdin_is_refused_in_a_real_process(process, here, model):
    run = process("generate", "-", "-m", str(model), *FAST, input=bytes(range(256)))
    assert (run.returncode, run.stdout) == (2, b"")
    assert_polite(run.stderr.decode(), ("UTF-8",))
