"""What tells weights in a folder from others: a hash of their contents that reads no gigabytes."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

READ_WHOLE = 2**22  # bytes
SAMPLES, SAMPLE = 256, 2**12  # of a larger file: how many, and bytes of each
KEPT = 64  # fingerprints in memory


def fingerprint(files: Iterable[tuple[str, Path]]) -> str:
    """Return 16 hex digits of files and what each is: the same for a copy, wherever it lies.

    A file of more than 4 MiB is known by its size and 256 samples of 4 KiB from all over it, as
    training changes weights everywhere; a change between two samples is not seen. Times do not
    count, except that a file is not read again until its size or its time has changed. OSError if
    one cannot be read.
    """
    states = [(what, path, path.stat()) for what, path in files]
    return _hash(tuple((what, path, s.st_size, s.st_mtime_ns) for what, path, s in states))


@lru_cache(maxsize=KEPT)
def _hash(files: tuple[tuple[str, Path, int, int], ...]) -> str:
    whole = hashlib.sha256()
    for what, path, size, _ in files:
        whole.update(f"{what} {size} ".encode())
        with path.open("rb", buffering=0) as file:
            if size <= READ_WHOLE:
                whole.update(file.read())
                continue
            for i in range(SAMPLES):
                file.seek(i * (size - SAMPLE) // (SAMPLES - 1))
                whole.update(file.read(SAMPLE))
    return whole.hexdigest()[:16]
