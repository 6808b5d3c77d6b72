"""A working folder with prompts, a broken model, and a command that starts at once."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
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


@pytest.fixture(scope="session")
def quick(tmp_path_factory) -> Iterator[Path]:
    """A folder with a `sana` that starts at once."""
    folder = tmp_path_factory.mktemp("quick")
    forks, socket = Path(__file__).with_name("forks.py"), folder / "socket"
    command = folder / "sana"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -SE {forks} {socket} "$@"\n')
    command.chmod(0o755)
    words = [sys.executable, str(forks), str(socket)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as server:
        assert server.stdout.readline() == b"ready\n"
        yield folder
        server.kill()


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
