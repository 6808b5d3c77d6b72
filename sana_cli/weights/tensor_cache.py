"""Tensors kept on disk between runs: found by what they depend on, written whole, bounded.

Names are hashes and folders are the user's own (mode 0700), so nothing of a prompt shows in them.
A store never fails a run: what is broken is dropped, what cannot be written is said in `fault`.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sana_cli.system.disk import sync

SUFFIX = ".safetensors"
ABANDONED = 3600  # seconds after which a half-written file belongs to nobody
READ_WHOLE = 2**24  # bytes
SAMPLE = 2**20


class TensorCache:
    """A folder of safetensors files of at most `limit` bytes; the least recently used go first.

    Everything in it depends on `facts`. With `checked`, contents carry their SHA-256 and are
    compared with it when read; without, only a file's structure is, which is all that gigabytes
    have time for.
    """

    def __init__(self, folder: Path, limit: int, facts: Iterable[Any], checked: bool = True):
        self.folder, self.limit, self.checked = folder, limit, checked
        self.facts = list(facts)
        self.fault: str | None = None  # why the last thing could not be kept
        self.size: int | None = None  # of the folder; counted at the first write

    def path(self, *what: Any) -> Path:
        """Return the path of what is described by JSON values."""
        key = hashlib.sha256(json.dumps([self.facts, what]).encode()).hexdigest()
        return self.folder / f"{key}{SUFFIX}"

    def read(self, *what: Any) -> dict[str, Tensor] | None:
        """Read what was written under a description, or None. Unchecked, it is memory-mapped."""
        path = self.path(*what)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if self.checked:
                    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
                whole = not self.checked or file.metadata() == {"sha256": _digest(tensors)}
            if whole:
                with contextlib.suppress(OSError):  # it may be on a disk that is only read
                    os.utime(path)
                return tensors
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError):
            pass
        self.drop(*what)
        return None

    def drop(self, *what: Any) -> None:
        _remove(self.path(*what))

    def write(self, tensors: dict[str, Tensor], *what: Any) -> None:
        """Keep contiguous tensors. Two processes may write the same thing: either file is right."""
        path = self.path(*what)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.chmod(self.folder, 0o700)
            if shutil.disk_usage(self.folder).free < 2 * sum(t.nbytes for t in tensors.values()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            descriptor, name = tempfile.mkstemp(suffix=".partial", dir=self.folder)
            os.close(descriptor)
            try:
                save_file(tensors, name, {"sha256": _digest(tensors)} if self.checked else None)
                if not self.checked:  # a power cut must not leave a file that only looks whole
                    with open(name, "rb+") as file:
                        sync(file.fileno())
                size = os.path.getsize(name)
                os.replace(name, path)
            finally:
                _remove(Path(name))
        except (OSError, SafetensorError) as error:
            self.fault = str(error)
            return
        self.size = size + (self._trim() if self.size is None else self.size)
        if self.size > self.limit:
            self.size = self._trim()

    def _trim(self) -> int:
        """Reduce the folder to three quarters of a limit it exceeds; return its bytes."""
        found = []
        for path in self.folder.iterdir():
            try:
                state = path.stat()
            except FileNotFoundError:  # another process was quicker
                continue
            if path.suffix == SUFFIX:
                found.append((state.st_mtime_ns, state.st_size, path))
            elif path.suffix == ".partial" and state.st_mtime < time.time() - ABANDONED:
                _remove(path)
        total = sum(size for _, size, _ in found)
        if total > self.limit:
            for _, size, path in sorted(found)[:-1]:  # what was just used stays
                if total > self.limit * 3 / 4:
                    _remove(path)
                    total -= size
        return total


def identity(paths: Iterable[Path]) -> str:
    """Hash files so that a change of contents shows, without reading gigabytes.

    Files up to 16 MiB are read. A larger one is known by its blob's name in the Hugging Face
    cache, which is a hash of its content; elsewhere by its size, the time of its last change, and
    its first and last MiB.
    """
    whole = hashlib.sha256()
    for path in paths:
        real = path.resolve()
        state = real.stat()
        whole.update(f"{path.name} {state.st_size} ".encode())
        if state.st_size <= READ_WHOLE:
            whole.update(real.read_bytes())
        elif real.parent.name == "blobs" and len(real.name) == 64:
            whole.update(real.name.encode())
        else:
            whole.update(str(state.st_mtime_ns).encode())
            with open(real, "rb") as file:
                whole.update(file.read(SAMPLE))
                file.seek(-SAMPLE, os.SEEK_END)
                whole.update(file.read(SAMPLE))
    return whole.hexdigest()


def _digest(tensors: dict[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # open elsewhere on Windows: it stays until the next time
        path.unlink(missing_ok=True)
