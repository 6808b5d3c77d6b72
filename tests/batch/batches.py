"""What the tests of `sana batch` start from, and what they find in its folder."""

import json
import re
import subprocess
import sys
from pathlib import Path

SANA = str(Path(sys.executable).with_name("sana"))
ANY_SIZE = ("-m", "demo", "--steps", "1")
DEMO = (*ANY_SIZE, "-r", "256")
PROMPTS = ("a red circle on white", "a green star on black", "a blue ring on grey")


def pictures(folder: str | Path) -> dict[str, bytes]:
    """All files but the manifest and its lock, by name."""
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in found}
    return {
        name: path.read_bytes()
        for name, path in names.items()
        if not re.fullmatch(r"manifest.*\.jsonl|\.sana-manifest.*\.lock", name)
    }


def lines(folder: str | Path, status: str | None = None) -> list[dict]:
    found = []
    for path in sorted(Path(folder).glob("manifest*.jsonl")):
        found += [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in found if status in (None, line["status"])]


def events(out: str, heartbeats: bool = False) -> list[dict]:
    found = [json.loads(line) for line in out.splitlines()]
    return [event for event in found if heartbeats or event["event"] != "heartbeat"]


def started(program: str | Path, *words: str, **options) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([program, "batch", *words], **pipes, **options)
