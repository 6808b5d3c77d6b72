"""What the refusals of a command have in common, and the ways to damage a model."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

FAST = ("--steps", "1", "--no-instruction", "-s", "7")
DIT = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
CONFIGS = (
    "model_index.json",
    "transformer/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer.json",
)
SANA = str(Path(sys.executable).with_name("sana"))
PARTS = pytest.mark.parametrize("part", [DIT, VAE, TEXT], ids=["transformer", "vae", "text"])

# Digits and brackets as well, or nearly every damaged file would be no JSON at all.
BYTES = st.sampled_from(b'0123456789-.eE"[]{},:tfnaIN') | st.integers(0, 255)
DAMAGE = st.lists(st.tuples(st.integers(0, 2**20), BYTES), min_size=1, max_size=4)


def linked(folder: Path, target: Path) -> Path:
    def copy(source, target):
        (os.link if source.endswith(".safetensors") else shutil.copyfile)(source, target)

    return Path(shutil.copytree(folder, target, copy_function=copy))


def assert_polite(err: str, says: tuple[str, ...] = (), hint: str = "") -> None:
    """One `error:` line that is no bare exception, at most one `hint:` line, no traceback."""
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    hints = [line for line in lines if line.startswith("hint:")]
    assert len(errors) == 1 and len(hints) <= 1, err
    assert "Traceback" not in err and "Exception ignored" not in err and "panicked" not in err, err
    assert not re.match(r"error: \w*(Error|Exception|Abort|Warning|Panic)\b", errors[0]), err
    for word in says:
        assert word in errors[0]
    assert hint in "".join(hints), err


def damaged(data: bytes, damage: list[tuple[int, int]], length: int) -> bytes:
    """Change some of the first `length` bytes."""
    content = bytearray(data)
    for place, value in damage:
        content[place % length] = value
    return bytes(content)


def replace(path: Path, content: bytes | str) -> None:
    path.unlink()
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def edit(path: Path, **changes) -> None:
    replace(path, json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def named(*cases: tuple[tuple[str, ...], str]) -> list:
    """Cases of (words, what the error says) under readable ids."""
    return [pytest.param(*case, id=brief(" ".join(case[0]))) for case in cases]


def brief(value: object) -> str:
    text = ascii(value).strip("'")
    return f"{text[:36]}..." if len(text) > 40 else text or "empty"
