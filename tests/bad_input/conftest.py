"""A copy of a model to damage, and a command that must refuse."""

from pathlib import Path

import pytest

from faults import FAST, assert_polite, linked


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
