"""A working folder with prompts, and a broken model."""

import shutil
from pathlib import Path

import pytest

from batches import PROMPTS


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with a file of three prompts."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "jobs.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture
def broken(tiny_model, tmp_path) -> Path:
    """A copy of a model whose pictures are all NaN."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("decoder.conv_out"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, path)
    return folder
