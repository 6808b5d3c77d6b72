"""Parse and format quantities."""

import re

from sana_cli.errors import UsageError

UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30}
MIN_MEMORY = 50_000_000


def gigabytes(count: int) -> str:
    """Format bytes: 1_249_001_100 -> "1.25 GB"; small counts in MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def rough_time(seconds: float) -> str:
    """Format a time to one unit: "40 s", "10 min", "1.2 h"."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def parse_memory(text: str) -> int | None:
    """Parse `6GB`, `512M` or `2.5GiB` to bytes; "auto" to None. UsageError for anything else."""
    word = text.strip().lower()
    if word == "auto":
        return None
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([kmgt]?i?)b?", word)
    unit = UNITS.get(match[2]) if match else None
    if match is None or unit is None:
        raise UsageError(f"--memory {text!r} is not an amount of memory", "write it as 6GB")
    count = int(float(match[1]) * unit)
    if count < MIN_MEMORY:
        raise UsageError(f"--memory {text!r} is too little for any model", "write it as 6GB")
    return count


def parse_duration(text: str, name: str) -> float:
    """Parse `5m`, `90s`, `1h` or `0` to seconds; "forever" to infinity. UsageError otherwise."""
    word = text.strip().lower()
    if word == "forever":
        return float("inf")
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)(s|m|h|)", word)
    if match is None or (not match[2] and float(match[1])):
        raise UsageError(f"{name} {text!r} is not a time", "write it as 5m, 90s, 1h, 0 or forever")
    return float(match[1]) * {"h": 3600, "m": 60}.get(match[2], 1)


def counted(number: int, noun: str) -> str:
    """ "1 job", "2 jobs"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
