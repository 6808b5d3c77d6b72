"""The folder of a batch on a disk: atomic files, and manifests that are locked and appended to."""

import hashlib
import os
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from sana_cli.batch.lines import Line, parse
from sana_cli.batch.shards import Shard
from sana_cli.batch.store import Taken
from sana_cli.errors import DiskFull, SanaError
from sana_cli.system.disk import FULL, PARTIAL, Lock, is_locked, save, sync


class DiskStore:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = str(folder.absolute())

    def __str__(self) -> str:
        return str(self.folder)

    def locate(self, path: str) -> Path:
        return self.folder / path

    def manifests(self) -> dict[str, list[bytes]]:
        return {
            path.name: [path.read_bytes()] for path in sorted(self.folder.glob("manifest*.jsonl"))
        }

    def exists(self, path: str) -> bool:
        return os.path.lexists(self.folder / path)

    def state(self, path: str) -> Line:
        state = (self.folder / path).stat()
        return {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns}

    def sha256(self, path: str) -> str:
        with (self.folder / path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def write(self, path: str, data: bytes, replaces: bool, mark: str) -> str:
        written = save(self.folder / path, data, replaces, f"-{mark}")
        return written.relative_to(self.folder).as_posix()

    def sweep(self, mark: str, folders: Iterable[Path]) -> None:
        for folder in set(folders):
            for path in (self.folder / folder).glob(f"{PARTIAL}-manifest*.partial"):
                if path.name.startswith(f"{PARTIAL}-{mark}"):
                    path.unlink(missing_ok=True)

    def open_log(self, stem: str, shard: Shard | None, alone: bool) -> "_FileLog":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return _FileLog(self.folder, stem, shard, alone)
        except OSError as error:
            raise _cannot_write(self.folder / f"{stem}.jsonl", error) from None

    def is_held(self, stem: str) -> bool:
        try:
            return is_locked(self.folder / f"{PARTIAL}-{stem}.lock")
        except OSError:  # of another user
            return False

    def remove_manifests(self, start: str) -> None:
        for path in self.folder.glob(f"{start}*.jsonl"):
            path.unlink(missing_ok=True)
            (self.folder / f"{PARTIAL}-{path.stem}.lock").unlink(missing_ok=True)


class _FileLog:
    """A manifest that is locked and only appended to; each append is synced to disk."""

    def __init__(self, folder: Path, stem: str, shard: Shard | None, alone: bool) -> None:
        """Taken if another process holds it, or one that may have the same jobs."""
        self.path = folder / f"{stem}.jsonl"
        with ExitStack() as stack:
            lock = stack.enter_context(_lock(folder, stem, shard, alone))
            self.unlocked = lock.missing
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            self.descriptor = os.open(self.path, flags, 0o666)
            stack.callback(os.close, self.descriptor)
            repair(self.path)
            self.stack = stack.pop_all()

    def append(self, text: bytes) -> None:
        before = os.fstat(self.descriptor).st_size
        try:
            written = os.write(self.descriptor, text)
            if written < len(text):
                os.write(self.descriptor, text[written:])  # says why it cannot
            sync(self.descriptor)
        except OSError as error:
            os.ftruncate(self.descriptor, before)
            raise _cannot_write(self.path, error) from None

    def close(self) -> None:
        self.stack.close()


def _lock(folder: Path, stem: str, shard: Shard | None, alone: bool) -> Lock:
    """Taken if another process holds this manifest, or one that may have the same jobs, unless
    there are several writers and so this one is not `alone`."""
    try:
        lock = Lock(folder / f"{PARTIAL}-{stem}.lock")
    except BlockingIOError:
        raise Taken(stem) from None
    with ExitStack() as stack:
        stack.push(lock)
        for path in folder.glob(f"{PARTIAL}-manifest*.lock") if alone else ():
            other = path.stem.removeprefix(f"{PARTIAL}-")
            brother = shard and re.search(rf"-of-{shard.count}(-|$)", other)
            if other != stem and not brother and is_locked(path):
                raise Taken(other)
        stack.pop_all()
    return lock


def repair(path: Path) -> None:
    """Remove an incomplete last line, or add the newline that a complete one lacks."""
    with path.open("rb+") as file:
        whole, newline, rest = file.read().rpartition(b"\n")
        if not rest:
            return
        if parse(rest):
            file.write(b"\n")
        else:
            file.truncate(len(whole) + len(newline))
        file.flush()
        sync(file.fileno())


def _cannot_write(path: Path, error: OSError) -> SanaError:
    if error.errno in FULL:
        return DiskFull(f"no space left to write {path}", "free some, or use -o elsewhere")
    return SanaError(f"{path} cannot be written: {error.strerror or error}", "use -o")
