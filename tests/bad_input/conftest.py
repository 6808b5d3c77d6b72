"""A copy of a model to damage, and a command that must refuse."""

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from faults import FAST, assert_polite, linked

DOCUMENTED = (0, 1, 2, 4, 5, 6, 7)  # exit codes


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, no_hang) -> Path:
    """An empty working folder, and no time to hang in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model; its weights are links, so replace them, never write into them."""
    return linked(tiny_model, tmp_path / "model")


@pytest.fixture
def sprint(tiny_sprint, tmp_path) -> Path:
    return linked(tiny_sprint, tmp_path / "sprint")


@pytest.fixture
def refused(sana, here):
    """Run `sana generate` and check that it refuses politely; gives stderr for a closer look."""

    def run(code: int, *words: str, says: tuple[str, ...] = (), hint: str = "") -> str:
        run = sana("generate", *words)
        assert (run.code, run.out) == (code, ""), run.err
        assert_polite(run.err, says, hint)
        assert not list(here.rglob("*"))
        return run.err

    return run


@pytest.fixture
def broken(refused, model):
    """Draw with the copied model and check that its fault is reported with exit code 1."""

    def run(*says: str) -> str:
        return refused(1, "a fox", "-m", str(model), *FAST, says=says)

    return run


@pytest.fixture
def no_weights(tmp_path, monkeypatch) -> Path:
    """A Hugging Face cache without a single model."""
    import huggingface_hub.constants

    folder = tmp_path / "hf"
    folder.mkdir()
    monkeypatch.setenv("HF_HOME", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    return folder


@pytest.fixture
def files(here) -> Path:
    """Images to begin from, and what only looks like one."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(here / "in.png")
    Image.fromarray(pixels[..., 0]).save(here / "mask.png")
    (here / "cut.png").write_bytes((here / "in.png").read_bytes()[:500])
    (here / "text.png").write_text("no image")
    module = "transformer.transformer_blocks.0.attn1.to_q"
    ones = {f"{module}.lora_{one}.weight": np.ones((2, 2), np.float32) for one in "AB"}
    save_file(ones, here / "lora.safetensors")
    return here


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def survives(sana, files, no_hang, tmp_path, monkeypatch, count_ending):
    """Run a command; check how it ends, that no file has changed or gone, and none was left behind.

    With `writes` it may add files, whose paths come back; they are removed. With `reports` it says
    of each thing whether it is right.
    """
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def run(*words: str, writes: bool = False, reports: bool = False) -> tuple:
        no_hang()
        before = contents(files)
        done = sana(*words)
        count_ending(f"exit code {done.code}")
        said = f"{words}: {done.err}"
        assert done.code in DOCUMENTED, said
        assert "Traceback" not in done.err and "panicked" not in done.err, said
        if done.code and not reports:
            assert done.out == "" or "--json" in words, said
            assert_polite(done.err)
        assert not re.search(r"error: \w*(Error|Exception|Panic)\b", done.err), said
        assert reports or ("error:" in done.err) == bool(done.code), said
        after = contents(files)
        added = after.keys() - before.keys() if writes else set()
        assert {path: after[path] for path in after.keys() - added} == before
        for path in added:
            Path(path).unlink()
        assert not contents(scratch)
        return done, added

    return run
