"""Where the images and manifests of a batch are: a folder on a disk, or one in an object store."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from sana_cli.batch.lines import Line
from sana_cli.batch.shards import Shard


class Taken(Exception):
    """Another process holds the manifest that `str()` names."""


class Log(Protocol):
    """A manifest of one writer, open for appending."""

    unlocked: str | None  # why no other process is kept out, if none is

    def append(self, text: bytes) -> None:
        """Add lines, durably. DiskFull or SanaError if that fails; then none is added."""

    def close(self) -> None: ...


class Store(Protocol):
    """Paths are relative to the folder, with slashes."""

    address: str  # an absolute path or a URL

    def locate(self, path: str) -> Path | str:
        """The path or URL of a file, as the user would write it."""

    def manifests(self) -> dict[str, list[bytes]]:
        """The manifests by name, each as one or more files."""

    def exists(self, path: str) -> bool: ...

    def state(self, path: str) -> Line:
        """The size of a file in bytes, and what changes whenever it is written. OSError."""

    def sha256(self, path: str) -> str:
        """OSError if it cannot be read."""

    def write(self, path: str, data: bytes, replaces: bool, mark: str) -> str:
        """Write a file atomically, under a name with -2, -3 … if it exists and is not to be
        replaced. Returns its path. DiskFull or SanaError if it fails. `mark` names temporary files.
        """

    def sweep(self, mark: str, folders: Iterable[Path]) -> None:
        """Remove the temporary files of killed writers."""

    def open_log(self, stem: str, shard: Shard | None, alone: bool) -> Log:
        """Open a manifest. Taken if another process holds it, or with `alone` any that may have the
        same jobs; SanaError if it cannot be written."""

    def is_held(self, stem: str) -> bool:
        """Whether a process holds that manifest."""

    def remove_manifests(self, start: str) -> None:
        """Remove the manifests whose names begin like that."""
