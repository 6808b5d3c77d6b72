"""The folder of a batch in an object store, by any URL that fsspec knows: s3://, gs://, az://, …

An object appears whole or not at all. A new image is put only if no object has its name, where the
store can do that (S3 and those like it, Google's); elsewhere fsspec looks first.

Nothing can be appended to an object, so every run writes manifests of its own, named like
`manifest-TIME-3f9a-0000.jsonl`: an object is put again with every line until it has SEGMENT of
them, and the next is begun. Those of all runs are read as one. There are no locks.
"""

import hashlib
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from sana_cli.batch.lines import Line
from sana_cli.batch.shards import Shard
from sana_cli.errors import SanaError, UsageError

MANIFEST = re.compile(r"(manifest(?:\.\d+-of-\d+)?)(?:-[^/]*)?\.jsonl")
SEGMENT = 500  # lines of an object: about 200 kB, which is put again with each
EXTRAS = {"s3": "sana-cli[s3]", "gs": "sana-cli[gcs]", "gcs": "sana-cli[gcs]"}


class ObjectStore:
    def __init__(self, url: str) -> None:
        """UsageError for a URL that cannot be used here. Nothing is connected yet."""
        self.address = url.rstrip("/")
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        try:
            from fsspec.core import url_to_fs

            self.files, self.root = url_to_fs(self.address, **options)
        except ImportError as error:
            scheme = url.partition("://")[0].lower()
            hint = f'install it: pip install "{EXTRAS[scheme]}"' if scheme in EXTRAS else None
            raise UsageError(f"-o {url[:200]} needs a package: {error}", hint) from None
        except ValueError as error:
            raise UsageError(f"-o {url[:200]} cannot be used: {error}") from None
        self._states: dict[str, Line] | None = None  # of the objects, as they were listed

    def __str__(self) -> str:
        return self.address

    def locate(self, path: str) -> str:
        return f"{self.address}/{path}"

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}"

    @contextmanager
    def _calling(self, path: str, *expected: type[OSError]) -> Iterator[None]:
        """SanaError for whatever a client raises that is not `expected`."""
        try:
            yield
        except Exception as error:  # of a client that is not known here
            if isinstance(error, (*expected, SanaError)):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            text = f"{self.locate(path)} cannot be reached: {reason}"
            raise SanaError(text, "see the credentials and the endpoint, or use -o") from None

    def _listed(self) -> dict[str, Line]:
        """The states of all objects: one request for a thousand of them."""
        if self._states is None:
            found: dict[str, dict[str, Any]] = {}
            with self._calling("", FileNotFoundError), suppress(FileNotFoundError):
                found = self.files.find(self.root, detail=True)
            start = len(self.root) + 1
            self._states = {path[start:]: _state(info) for path, info in found.items()}
        return self._states

    def manifests(self) -> dict[str, list[bytes]]:
        self._states = None
        found: dict[str, list[bytes]] = defaultdict(list)
        for path in sorted(self._listed()):
            manifest = MANIFEST.fullmatch(path)
            if manifest is not None:
                with self._calling(path):
                    found[f"{manifest[1]}.jsonl"].append(self.files.cat_file(self._full(path)))
        return found

    def exists(self, path: str) -> bool:
        return path in self._listed()

    def state(self, path: str) -> Line:
        if path not in self._listed():
            raise FileNotFoundError(path)
        return self._listed()[path]

    def sha256(self, path: str) -> str:
        with self._calling(path, FileNotFoundError):
            return hashlib.sha256(self.files.cat_file(self._full(path))).hexdigest()

    def write(self, path: str, data: bytes, replaces: bool, mark: str) -> str:
        number, name = 1, PurePosixPath(path)
        while True:
            try:
                with self._calling(path, FileExistsError):
                    mode = "overwrite" if replaces else "create"
                    self.files.pipe_file(self._full(path), data, mode=mode)
                    self._listed()[path] = _state(self.files.info(self._full(path)))
                    return path
            except FileExistsError:
                number += 1
                path = str(name.with_name(f"{name.stem}-{number}{name.suffix}"))

    def sweep(self, mark: str, folders: Iterable[Path]) -> None:
        """Nothing: there are no temporary objects."""

    def open_log(self, stem: str, shard: Shard | None, alone: bool) -> "_ObjectLog":
        return _ObjectLog(self, stem)

    def is_held(self, stem: str) -> bool:
        return False  # not known

    def remove_manifests(self, start: str) -> None:
        self._states = None
        for path in [path for path in self._listed() if path.startswith(start)]:
            with self._calling(path):
                self.files.rm_file(self._full(path))

    def put(self, path: str, data: bytes) -> None:
        """Put an object, replacing an earlier one. SanaError if that fails."""
        with self._calling(path):
            self.files.pipe_file(self._full(path), data)


def _state(info: dict[str, Any]) -> Line:
    """The size of an object, and the tag that changes with its content, if the store gives one."""
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("mtime")
    return {"bytes": info["size"]} | ({"etag": str(tag)} if tag is not None else {})


class _ObjectLog:
    """A manifest whose objects only this process writes."""

    unlocked: str | None = "an object store has no locks"

    def __init__(self, store: ObjectStore, stem: str) -> None:
        # Listed by name, which has the time: lines of a later run count for more.
        self.store, self.name = store, f"{stem}-{time.time_ns():020}-{secrets.token_hex(4)}"
        self.segment, self.lines = 0, b""

    def append(self, text: bytes) -> None:
        if self.lines.count(b"\n") >= SEGMENT:
            self.segment, self.lines = self.segment + 1, b""
        self.store.put(f"{self.name}-{self.segment:04}.jsonl", self.lines + text)
        self.lines += text

    def close(self) -> None:
        """Nothing is open."""
