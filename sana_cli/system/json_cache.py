"""Small values kept on disk between runs, as one JSON file in the cache folder."""

import contextlib
import json
from pathlib import Path
from typing import Any

from sana_cli.system import disk


class JsonCache:
    """A JSON file of at most `limit` values by key; the one that was put in first is dropped first.

    A file that is missing or broken holds nothing, and one that cannot be written stays as it is:
    all that is lost is the time to find a value again. Of two processes that write at once, one may
    lose its value.
    """

    def __init__(self, path: Path | None, limit: int) -> None:
        """Without a path, nothing is found and nothing is kept."""
        self.path, self.limit = path, limit

    def get(self, *key: Any) -> Any:
        """Return the value of a key, which is made of JSON values; None if there is none."""
        return self._read().get(json.dumps(key))

    def put(self, value: Any, *key: Any) -> None:
        if self.path is None:
            return
        values = self._read()
        values.pop(json.dumps(key), None)
        values[json.dumps(key)] = value
        kept = dict(list(values.items())[-self.limit :])
        with contextlib.suppress(OSError):
            disk.replace(self.path, json.dumps(kept, indent=1).encode())

    def _read(self) -> dict[str, Any]:
        if self.path is None:
            return {}
        try:
            values = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}
