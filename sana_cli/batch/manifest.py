"""The state of the jobs of a batch folder: `manifest.jsonl`, which is only appended to.

Each line is a JSON object with a `status`:

    run       a process started: its pid and host, its jobs and how many are to be drawn
    writing   the file at `path` is about to be written, with this sha256
    done      the file is written: id, row, seed, path, sha256, bytes, mtime_ns, seconds, peak_bytes
    failed    no image was written: id, row, seed, error, exit_code
    again     earlier lines of this id no longer count (--restart)

The last line of an id counts. Each line is synced to disk before the next operation, so after a
kill every file is either listed with its hash or absent. Each shard writes its own manifest,
`manifest.2-of-3.jsonl`; all manifests of a folder are read as one.
"""

import hashlib
import json
import os
import re
import socket
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from sana_cli.batch.shards import Shard
from sana_cli.errors import DiskFull, SanaError
from sana_cli.images.names import natural_order
from sana_cli.system.disk import FULL, PARTIAL, Lock, sync

Line = dict[str, Any]
STATUSES = ("run", "writing", "done", "failed", "again")


class Ledger:
    """The state of each job, read from the manifests of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last: dict[str, Line] = {}  # the last line of each id
        self.runs: dict[str, list[Line]] = {}  # by manifest: its last `run` line and all after it
        self.hashes: dict[
            tuple[str, str], set[str]
        ] = {}  # by id and path: hashes of what was written
        self.damaged = 0  # lines that do not parse
        lines: list[Line] = []
        for path in sorted(folder.glob("manifest*.jsonl")):
            found, damaged = read_lines(path.read_bytes())
            self.damaged += damaged
            time = ""
            for line in found:
                # Times never decrease within a file, even if the clock did.
                time = line["time"] = max(time, str(line.get("time", "")))
                if line["status"] == "run":
                    self.runs[path.name] = []
                if path.name in self.runs:
                    self.runs[path.name].append(line)
            lines += found
        for line in sorted(lines, key=lambda line: line["time"]):
            self.note(line)

    def note(self, line: Line) -> None:
        if line["status"] == "run" or "id" not in line:
            return
        self.last[line["id"]] = line
        if line["status"] in ("writing", "done"):
            self.hashes.setdefault((line["id"], line["path"]), set()).add(line["sha256"])

    def status(self, id: str) -> str:
        """ "done" if the image is on disk as it was written, "failed", or "open"."""
        line = self.last.get(id)
        if line is None or line["status"] == "again":
            return "open"
        if line["status"] == "failed":
            return "failed"
        return "done" if self._is_whole(line) else "open"

    def images(self) -> list[Path]:
        """The files of all jobs that are done, in the order of their rows."""
        done = [line for id, line in self.last.items() if self.status(id) == "done"]
        rows = [line["row"] if isinstance(line.get("row"), int) else 0 for line in done]
        keys = zip(rows, (natural_order(line["path"]) for line in done), strict=True)
        return [self.folder / path for _, (_, path) in sorted(keys)]

    def _is_whole(self, line: Line) -> bool:
        """Compare size and modification time, as make does; where the time differs, the hash."""
        path = self.folder / line["path"]
        try:
            state = path.stat()
            if line["status"] == "done" and state.st_size != line.get("bytes"):
                return False
            if line["status"] == "done" and state.st_mtime_ns == line.get("mtime_ns"):
                return True
            return sha256(path) == line["sha256"]
        except (OSError, ValueError):  # the file is gone, or the path is invalid
            return False

    def is_of(self, id: str, path: Path) -> bool:
        """Whether the file at a path inside the folder was written as the image of `id`.

        An empty file was left by a killed writer on a disk without hard links.
        """
        known, file = self.hashes.get((id, path.as_posix())), self.folder / path
        try:
            return known is not None and (file.stat().st_size == 0 or sha256(file) in known)
        except (OSError, ValueError):  # a folder, or not readable
            return False


def read_lines(data: bytes) -> tuple[list[Line], int]:
    """Return the lines of a manifest and the count of damaged ones, less an incomplete last one."""
    found, damaged = [], 0
    whole, _, rest = data.rpartition(b"\n")
    for text in [*whole.split(b"\n"), *([rest] if _line(rest) else [])]:
        line = _line(text)
        if line is not None:
            found.append(line)
        elif text:
            damaged += 1
    return found, damaged


def _line(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or line.get("status") not in STATUSES:
        return None
    if line["status"] == "run":
        shard = re.fullmatch(r"\d{1,6}/\d{1,6}", str(line.get("shard") or "1/1"))
        return line if shard and isinstance(line.get("todo", 0), int) else None
    needed = {"writing": ("id", "path", "sha256"), "done": ("id", "path", "sha256")}
    wanted = needed.get(line["status"], ("id",))
    return line if all(isinstance(line.get(name), str) for name in wanted) else None


def repair(path: Path) -> None:
    """Remove an incomplete last line, or add the newline that a complete one lacks."""
    with path.open("rb+") as file:
        whole, newline, rest = file.read().rpartition(b"\n")
        if not rest:
            return
        if _line(rest):
            file.write(b"\n")
        else:
            file.truncate(len(whole) + len(newline))
        file.flush()
        sync(file.fileno())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Manifest(Ledger):
    """The locked manifest of a folder, or of a shard of it, open for appending."""

    def __init__(self, folder: Path, shard: Shard | None = None) -> None:
        self.shard = shard
        self.stem = f"manifest.{shard.number}-of-{shard.count}" if shard else "manifest"
        self.path = folder / f"{self.stem}.jsonl"
        with ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.lock = stack.enter_context(self._lock(folder))
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
                self.descriptor = os.open(self.path, flags, 0o666)
                stack.callback(os.close, self.descriptor)
                repair(self.path)
            except OSError as error:
                raise _cannot_write(self.path, error) from None
            super().__init__(folder)
            self.stack = stack.pop_all()

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stack.close()

    def _lock(self, folder: Path) -> Lock:
        """SanaError if another process holds this manifest, or one that may have the same jobs."""
        taken = self.stem
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(Lock(folder / f"{PARTIAL}-{self.stem}.lock"))
                for path in folder.glob(f"{PARTIAL}-manifest*.lock"):
                    taken = path.stem.removeprefix(f"{PARTIAL}-")
                    brother = self.shard and taken.endswith(f"-of-{self.shard.count}")
                    if taken != self.stem and not brother:
                        Lock(path).release()
            except BlockingIOError:
                run = (Ledger(folder).runs.get(f"{taken}.jsonl") or [{}])[0]
                holder = "another process"
                if "pid" in run:
                    since = f"{run['time'][:19]} UTC"
                    holder = f"process {run['pid']} on {run.get('host')}, since {since}"
                raise SanaError(
                    f"{folder} is in use by {holder}",
                    "wait for it or stop it, use another -o, or split the work with --shard",
                ) from None
            stack.pop_all()
            return lock

    def begin(self, **facts: Any) -> None:
        """Append the `run` line: process, host and job counts."""
        self.append(status="run", pid=os.getpid(), host=socket.gethostname(), **facts)

    def append(self, **facts: Any) -> None:
        """Append a line and sync it to disk. DiskFull or SanaError if that fails."""
        self.append_all([facts])

    def append_all(self, lines: Iterable[Line]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        stamped = [{"time": now} | line for line in lines]
        text = b"".join(json.dumps(line).encode() + b"\n" for line in stamped)
        before = os.fstat(self.descriptor).st_size
        try:
            written = os.write(self.descriptor, text)
            if written < len(text):
                os.write(self.descriptor, text[written:])  # says why it cannot
            sync(self.descriptor)
        except OSError as error:
            os.ftruncate(self.descriptor, before)
            raise _cannot_write(self.path, error) from None
        for line in stamped:
            self.note(line)

    def adopt(self, id: str) -> None:
        """Add the `done` line of an image whose file was written before its line could be."""
        line = self.last[id]
        if line["status"] == "writing":
            self.append(**line | {"status": "done"} | self._file_state(line["path"]))

    def place(self, id: str, name: Path, force: bool) -> tuple[Path, bool]:
        """Return the path for a job's image, and whether it may replace an existing file.

        An earlier image of the same job is replaced, any other file only with `force`.
        """
        number, path = 1, name
        while os.path.lexists(self.folder / path):
            if force or self.is_of(id, path):
                return path, True
            number += 1
            path = name.with_name(f"{name.stem}-{number}{name.suffix}")
        return path, False

    def done(self, path: Path, **facts: Any) -> Line:
        """Append the `done` line of the image at `path` inside the folder."""
        line = {"status": "done", **facts, "path": path.as_posix(), **self._file_state(path)}
        self.append(**line)
        return line

    def _file_state(self, path: str | Path) -> Line:
        state = (self.folder / path).stat()
        return {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns}

    def sweep(self, folders: Iterable[Path]) -> None:
        """Remove temporary files that killed runs of this manifest left in some folders."""
        mark = f"{PARTIAL}-{self.stem}" + ("-" if self.shard else "")
        for folder in set(folders):
            for path in (self.folder / folder).glob(f"{PARTIAL}-manifest*.partial"):
                if path.name.startswith(mark):
                    path.unlink(missing_ok=True)


def is_held(folder: Path, stem: str) -> bool:
    """Whether a process holds the lock of that manifest."""
    path = folder / f"{PARTIAL}-{stem}.lock"
    try:
        if path.exists():
            Lock(path).release()
    except BlockingIOError:
        return True
    except OSError:  # a read-only disk
        pass
    return False


def _cannot_write(path: Path, error: OSError) -> SanaError:
    if error.errno in FULL:
        return DiskFull(f"no space left to write {path}", "free some, or use -o elsewhere")
    return SanaError(f"{path} cannot be written: {error.strerror or error}", "use -o")
