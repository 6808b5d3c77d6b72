"""What a folder of a batch knows of its jobs: `manifest.jsonl`, which only ever grows.

Each line is a JSON object with a `status`:

    run       a process took the folder: its pid and host, how many jobs it had and has to do
    writing   the file at `path` is about to appear, with this sha256
    done      it has: id, row, seed, path, sha256, bytes, mtime_ns, seconds, peak_bytes
    failed    there is no picture: id, row, seed, error, exit_code
    again     what was said of this id no longer counts (--restart)

Of an id the last line counts, and a line is on disk before the next thing is done. So whenever the
process is killed, a file is either claimed by a line that has its hash, or not there. Shards keep
manifests of their own, `manifest.2-of-3.jsonl`; all those of a folder are read as one.
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
from sana_cli.system.disk import FULL, PARTIAL, Lock, sync

Line = dict[str, Any]
STATUSES = ("run", "writing", "done", "failed", "again")


class Ledger:
    """The manifests of a folder, read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last: dict[str, Line] = {}  # of each id
        self.runs: dict[str, list[Line]] = {}  # of each manifest: its last run, and all since
        self.hashes: dict[tuple[str, str], set[str]] = {}  # of an id at a path: what was written
        self.damaged = 0  # lines that are none
        lines: list[Line] = []
        for path in sorted(folder.glob("manifest*.jsonl")):
            found, damaged = read_lines(path.read_bytes())
            self.damaged += damaged
            time = ""
            for line in found:
                # Never back in time within a file, whatever the clock did.
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
        """ "done" if the picture is on disk as it was written, "failed", or "open"."""
        line = self.last.get(id)
        if line is None or line["status"] == "again":
            return "open"
        if line["status"] == "failed":
            return "failed"
        return "done" if self._is_whole(line) else "open"

    def _is_whole(self, line: Line) -> bool:
        """Size and time of the last change settle it where they fit, as for make; else the hash."""
        path = self.folder / line["path"]
        try:
            state = path.stat()
            if line["status"] == "done" and state.st_size != line.get("bytes"):
                return False
            if line["status"] == "done" and state.st_mtime_ns == line.get("mtime_ns"):
                return True
            return sha256(path) == line["sha256"]
        except (OSError, ValueError):  # it is gone, or its name is no name
            return False

    def is_of(self, id: str, path: Path) -> bool:
        """Whether what lies at a path inside the folder was written there as the picture of `id`.

        An empty file is the claim of a writer that was killed, where there are no hard links.
        """
        known, file = self.hashes.get((id, path.as_posix())), self.folder / path
        try:
            return known is not None and (file.stat().st_size == 0 or sha256(file) in known)
        except (OSError, ValueError):  # a folder, or not for us to read
            return False


def read_lines(data: bytes) -> tuple[list[Line], int]:
    """The lines of a manifest and how many are damaged; a last one that is torn is neither."""
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
    """Take off a last line that is torn, or end one that only lacks its end."""
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
    """The one process that works in a folder, or on a shard of it, and writes its manifest."""

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
        """SanaError if another process has this manifest, or one that may hold the same jobs."""
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
        """Say who works here, and on how much."""
        self.append(status="run", pid=os.getpid(), host=socket.gethostname(), **facts)

    def append(self, **facts: Any) -> None:
        """Add a line, on disk when this returns. DiskFull or SanaError if it cannot be."""
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
        """Count a picture as done whose file appeared before its line could be written."""
        line = self.last[id]
        if line["status"] == "writing":
            self.append(**line | {"status": "done"} | self._file_state(line["path"]))

    def place(self, id: str, name: Path, force: bool) -> tuple[Path, bool]:
        """Where the picture of a job goes, and whether it may replace what is there.

        An earlier picture of the same job is replaced, any other file only with `force`.
        """
        number, path = 1, name
        while os.path.lexists(self.folder / path):
            if force or self.is_of(id, path):
                return path, True
            number += 1
            path = name.with_name(f"{name.stem}-{number}{name.suffix}")
        return path, False

    def done(self, path: Path, **facts: Any) -> Line:
        """Add the line of a picture that is at `path` inside the folder."""
        line = {"status": "done", **facts, "path": path.as_posix(), **self._file_state(path)}
        self.append(**line)
        return line

    def _file_state(self, path: str | Path) -> Line:
        state = (self.folder / path).stat()
        return {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns}

    def sweep(self, folders: Iterable[Path]) -> None:
        """Remove temporary files that killed runs of this manifest have left in some folders."""
        mark = f"{PARTIAL}-{self.stem}" + ("-" if self.shard else "")
        for folder in set(folders):
            for path in (self.folder / folder).glob(f"{PARTIAL}-manifest*.partial"):
                if path.name.startswith(mark):
                    path.unlink(missing_ok=True)


def is_held(folder: Path, stem: str) -> bool:
    """Whether a process works on that manifest, as far as a lock can tell."""
    path = folder / f"{PARTIAL}-{stem}.lock"
    try:
        if path.exists():
            Lock(path).release()
    except BlockingIOError:
        return True
    except OSError:  # a disk that is only read
        pass
    return False


def _cannot_write(path: Path, error: OSError) -> SanaError:
    if error.errno in FULL:
        return DiskFull(f"no space left to write {path}", "free some, or use -o elsewhere")
    return SanaError(f"{path} cannot be written: {error.strerror or error}", "use -o")
