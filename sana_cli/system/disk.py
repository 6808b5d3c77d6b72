"""Atomic writes and locks, also on disks without all POSIX features.

Network shares, FUSE mounts and exFAT may lack hard links, fsync or locks, and drivers differ in
the error number that they return. So an operation that only adds safety is skipped on any number
that can mean "not supported"; an error for lost data or a full disk always ends the write.
"""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sana_cli.errors import DiskFull, SanaError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
LOST = FULL | {errno.EIO}
UNSUPPORTED = frozenset(
    {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
    | {errno.EPERM, errno.EACCES}
)
PARTIAL = ".sana"  # prefix of temporary file names
LOOK_SECONDS = 0.3  # far more than `is_locked` takes
POLL_SECONDS = 0.02


def sync(descriptor: int) -> None:
    """Sync a file to disk, where its file system supports that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def write_new(path: Path, data: bytes, mark: str = "") -> Path:
    """Write `data` to `path`, or to `path` with -2, -3 … if it exists. Returns the path written.

    The file appears complete or not at all. OSError if it cannot be written; then no file is left.
    `mark` becomes part of the temporary file's name, so that files of a killed process can be
    found and removed.
    """
    with _partial(path.parent, data, mark) as partial:
        number, target = 1, path
        while not _take_name(partial, target):
            number += 1
            target = path.with_name(f"{path.stem}-{number}{path.suffix}")
        return target


def replace(path: Path, data: bytes, mark: str = "", keep_mode: bool = False) -> None:
    """Write `data` to `path` atomically, replacing an existing file.

    With `keep_mode` the new file gets the old one's permissions, where the disk can set them.
    """
    with _partial(path.parent, data, mark) as partial:
        if keep_mode:
            with suppress(OSError):
                os.chmod(partial, path.stat().st_mode)
        os.replace(partial, path)


def save(path: Path, data: bytes, force: bool, mark: str = "") -> Path:
    """Write `data` to `path`, or to `path` with -2, -3 … if that exists and `force` is not set.

    The write is atomic. Returns the path written. DiskFull or SanaError if it fails. `mark`
    becomes part of the temporary file's name, so that files of a killed process can be found.
    """
    try:
        if not force:
            return write_new(path, data, mark)
        replace(path, data, mark)
        return path
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(
                f"no space left to write {path}", "free some, or use -o elsewhere"
            ) from None
        raise SanaError(f"{path} cannot be written: {error.strerror or error}", "use -o") from None


@contextmanager
def _partial(folder: Path, data: bytes, mark: str) -> Iterator[Path]:
    """Yield a temporary file with `data`, synced to disk; remove it unless it was renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    flags |= getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    partial = folder / f"{PARTIAL}{mark}-{os.urandom(8).hex()}.partial"
    # Created with the mode that the umask leaves: some disks cannot change it afterwards.
    descriptor = os.open(partial, flags, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            sync(file.fileno())
        yield partial
    finally:
        with suppress(OSError):  # the data is already in place, or another error is being raised
            partial.unlink(missing_ok=True)


def _take_name(partial: Path, target: Path) -> bool:
    """Give a temporary file its final name; False if that exists."""
    try:
        os.link(partial, target)  # fails if the name is taken, unlike a rename
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in LOST:
            raise
    # Without hard links: claim the name with an empty file, then move over the claim.
    try:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    try:
        os.replace(partial, target)
    except BaseException:
        with suppress(OSError):
            target.unlink()
        raise
    return True


class Lock:
    """An advisory lock on a file, held until it is released or the process ends.

    `missing` is the reason why nothing is locked, where the file system does not support locks.
    """

    def __init__(self, path: Path, wait: bool = False) -> None:
        """BlockingIOError if another process holds it, not only for a look by `is_locked`, and
        `wait` is not set; OSError if the file cannot be opened."""
        from filelock import lock_descriptor

        self.missing: str | None = None
        self.held = False
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        until = time.monotonic() + LOOK_SECONDS
        try:
            self.held = lock_descriptor(self.descriptor, blocking=wait)
            while not self.held and time.monotonic() < until:
                time.sleep(POLL_SECONDS)
                self.held = lock_descriptor(self.descriptor, blocking=False)
        except OSError as error:  # drivers without locks return various numbers
            self.missing = error.strerror or str(error)
        except BaseException:
            os.close(self.descriptor)
            raise
        if not self.held and self.missing is None:
            os.close(self.descriptor)
            raise BlockingIOError(errno.EAGAIN, f"{path} is locked by another process")

    def release(self) -> None:
        from filelock import unlock_descriptor

        if self.held:
            unlock_descriptor(self.descriptor)
        os.close(self.descriptor)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock on a file. OSError if the file cannot be read.

    The look takes a shared lock, so that processes that look at the same time do not see each
    other.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where the lock itself is tried
        try:
            Lock(path).release()
        except BlockingIOError:
            return True
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # with any other number there are no locks
        return error.errno in (errno.EAGAIN, errno.EACCES)
    finally:
        os.close(descriptor)
    return False
