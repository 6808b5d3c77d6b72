"""The state of the jobs of a batch folder: `manifest.jsonl`, which is only appended to.

Each line is a JSON object with a `status`:

    run       a process started: its pid and host, its jobs and how many are to be drawn
    writing   the file at `path` is about to be written, with this sha256
    done      the file is written: id, row, seed, path, sha256, bytes, mtime_ns, seconds, peak_bytes
    failed    no image was written: id, row, seed, error, exit_code
    again     earlier lines of this id no longer count (--restart)

The last line of an id counts. Each line is synced to disk before the next operation, so after a
kill every file is either listed with its hash or absent. Each shard writes its own manifest,
`manifest.2-of-3.jsonl`, and so does each of several writers, `manifest-3f9a.jsonl`; all manifests
of a folder are read as one.
"""

import os
import socket
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from sana_cli.batch.disk_store import DiskStore
from sana_cli.batch.lines import Line, as_bytes, read_lines
from sana_cli.batch.shards import Shard
from sana_cli.batch.store import Store, Taken
from sana_cli.errors import SanaError
from sana_cli.images.names import URL, natural_order


def open_store(place: Path | str) -> Store:
    """Open a folder or a URL that fsspec knows. UsageError for any other."""
    if isinstance(place, str) and URL.match(place):
        from sana_cli.batch.object_store import ObjectStore  # imports fsspec

        return ObjectStore(place)
    return DiskStore(Path(place))


def clock() -> datetime:
    return datetime.now(UTC)


def as_time(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def just_after(time: str) -> str:
    """Return the next time that a line can have; "" if `time` is not one."""
    try:
        return as_time(datetime.fromisoformat(time) + timedelta(milliseconds=1))
    except (ValueError, OverflowError):
        return ""


class Ledger:
    """The state of each job, read from the manifests of a folder."""

    def __init__(self, folder: Path | str) -> None:
        """`folder` is a path, or the URL of one in an object store."""
        self.folder = folder
        self.store = open_store(folder)
        self.last: dict[str, Line] = {}  # the last line of each id
        self.runs: dict[str, list[Line]] = {}  # by manifest: its last `run` line and all after it
        self.hashes: dict[
            tuple[str, str], set[str]
        ] = {}  # by id and path: hashes of what was written
        self.damaged = 0  # lines that do not parse
        lines: list[Line] = []
        for name, files in self.store.manifests().items():
            mine: list[Line] = []
            for data in files:
                found, damaged = read_lines(data)
                self.damaged += damaged
                time = ""
                for line in found:
                    # Times never decrease within a file, even if the clock did.
                    time = line["time"] = max(time, str(line.get("time", "")))
                mine += found
            for line in sorted(mine, key=lambda line: line["time"]):
                if line["status"] == "run":
                    self.runs[name] = []
                if name in self.runs:
                    self.runs[name].append(line)
            lines += mine
        lines.sort(key=lambda line: line["time"])
        for line in lines:
            self.note(line)
        self.latest: str = lines[-1]["time"] if lines else ""

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

    def images(self) -> list[Path | str]:
        """The files of all jobs that are done, in the order of their rows."""
        done = [line for id, line in self.last.items() if self.status(id) == "done"]
        rows = [line["row"] if isinstance(line.get("row"), int) else 0 for line in done]
        keys = zip(rows, (natural_order(line["path"]) for line in done), strict=True)
        return [self.store.locate(path) for _, (_, path) in sorted(keys)]

    def _is_whole(self, line: Line) -> bool:
        """Compare size and modification time, as make does; where the time differs, the hash."""
        path = line["path"]
        try:
            state = self.store.state(path)
            if line["status"] == "done" and state["bytes"] != line.get("bytes"):
                return False
            if line["status"] == "done" and state.items() <= line.items():
                return True
            return self.store.sha256(path) == line["sha256"]
        except (OSError, ValueError):  # the file is gone, or the path is invalid
            return False

    def is_of(self, id: str, path: str) -> bool:
        """Whether the file at a path inside the folder was written as the image of `id`.

        An empty file was left by a killed writer on a disk without hard links.
        """
        known = self.hashes.get((id, path))
        try:
            return known is not None and (
                self.store.state(path)["bytes"] == 0 or self.store.sha256(path) in known
            )
        except (OSError, ValueError):  # a folder, or not readable
            return False


class Manifest(Ledger):
    """The locked manifest of a folder, or of a shard of it, open for appending."""

    def __init__(
        self, folder: Path | str, shard: Shard | None = None, writer: str | None = None
    ) -> None:
        """`writer` names one of several processes that write for the one that holds the folder.

        SanaError if another process holds it, or it cannot be written.
        """
        self.shard = shard
        self.stem = f"manifest.{shard.number}-of-{shard.count}" if shard else "manifest"
        self.stem += f"-{writer}" if writer else ""
        try:
            self.log = open_store(folder).open_log(self.stem, shard, alone=writer is None)
        except Taken as taken:
            raise _in_use(folder, str(taken)) from None
        super().__init__(folder)
        # Lines of this run count for more than all that were there, even if another machine's clock
        # is ahead, or both are of one millisecond.
        self.earliest = just_after(self.latest)

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.log.close()

    def begin(self, **facts: Any) -> None:
        """Append the `run` line: process, host and job counts."""
        self.append(status="run", pid=os.getpid(), host=socket.gethostname(), **facts)

    def append(self, **facts: Any) -> None:
        """Append a line and sync it to disk. DiskFull or SanaError if that fails."""
        self.append_all([facts])

    def append_all(self, lines: Iterable[Line]) -> None:
        now = max(as_time(clock()), self.earliest)
        stamped = [{"time": now} | line for line in lines]
        self.log.append(as_bytes(stamped))
        for line in stamped:
            self.note(line)

    def adopt(self, id: str) -> None:
        """Add the `done` line of an image whose file was written before its line could be."""
        line = {name: value for name, value in self.last[id].items() if name != "time"}
        if line["status"] == "writing":
            self.append(**line | {"status": "done"} | self.store.state(line["path"]))

    def place(self, id: str, name: Path, force: bool) -> tuple[Path, bool]:
        """Return the path for a job's image, and whether it may replace an existing file.

        An earlier image of the same job is replaced, any other file only with `force`.
        """
        number, path = 1, name
        while self.store.exists(path.as_posix()):
            if force or self.is_of(id, path.as_posix()):
                return path, True
            number += 1
            path = name.with_name(f"{name.stem}-{number}{name.suffix}")
        return path, False

    def done(self, path: str, **facts: Any) -> Line:
        """Append the `done` line of the image at `path` inside the folder."""
        line = {"status": "done", **facts, "path": path, **self.store.state(path)}
        self.append(**line)
        return line

    def sweep(self, folders: Iterable[Path]) -> None:
        """Remove temporary files that killed runs of this manifest left in some folders."""
        self.store.sweep(self.stem + ("-" if self.shard else ""), folders)


def _in_use(folder: Path | str, taken: str) -> SanaError:
    run = (Ledger(folder).runs.get(f"{taken}.jsonl") or [{}])[0]
    holder = "another process"
    if "pid" in run:
        since = f"{run['time'][:19]} UTC"
        holder = f"process {run['pid']} on {run.get('host')}, since {since}"
    return SanaError(
        f"{folder} is in use by {holder}",
        "wait for it or stop it, use another -o, or split the work with --shard",
    )
