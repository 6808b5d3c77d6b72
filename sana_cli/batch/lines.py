"""The lines of a manifest, as text and back; what is damaged is counted and left out."""

import json
import re
from collections.abc import Iterable
from typing import Any

Line = dict[str, Any]
SHARD = re.compile(r"\d{1,6}/\d{1,6}", re.ASCII)
STATUSES = ("run", "writing", "done", "failed", "again")


def as_bytes(lines: Iterable[Line]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def read_lines(data: bytes) -> tuple[list[Line], int]:
    """Return the lines of a manifest and the count of damaged ones, less an incomplete last one."""
    found, damaged = [], 0
    whole, _, rest = data.rpartition(b"\n")
    for text in [*whole.split(b"\n"), *([rest] if parse(rest) else [])]:
        line = parse(text)
        if line is not None:
            found.append(line)
        elif text:
            damaged += 1
    return found, damaged


def parse(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or line.get("status") not in STATUSES:
        return None
    if line["status"] == "run":
        shard = line.get("shard")
        is_whole = shard is None or (isinstance(shard, str) and SHARD.fullmatch(shard))
        return line if is_whole and isinstance(line.get("todo", 0), int) else None
    needed = {"writing": ("id", "path", "sha256"), "done": ("id", "path", "sha256")}
    wanted = needed.get(line["status"], ("id",))
    return line if all(isinstance(line.get(name), str) for name in wanted) else None
