"""Files that appear whole or not at all, also on disks that lack what POSIX promises.

Network shares, FUSE mounts and exFAT have no hard links, no fsync or no locks, and each driver
answers with an error number of its own choice. So an operation that only makes things safer is
given up on any number that can mean "not here"; one that says that data is lost, or that there is
no room for it, always ends the write.
"""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
LOST = FULL | {errno.EIO}
UNSUPPORTED = frozenset(
    {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
    | {errno.EPERM, errno.EACCES}
)
PARTIAL = ".sana"  # what names of temporary files begin with


def sync(descriptor: int) -> None:
    """Wait until a file's bytes are on the disk, where its file system can tell."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def write_new(path: Path, data: bytes, mark: str = "") -> Path:
    """Put `data` at `path`, or at `path` with -2, -3 … if that is taken. Returns the path written.

    The file appears complete or not at all. OSError if it cannot be written, and nothing is left.
    `mark` is put into the name of the temporary file, for whoever cleans up after a process that
    was killed.
    """
    with _partial(path.parent, data, mark) as partial:
        number, target = 1, path
        while not _take_name(partial, target):
            number += 1
            target = path.with_name(f"{path.stem}-{number}{path.suffix}")
        return target


def replace(path: Path, data: bytes, mark: str = "", keep_mode: bool = False) -> None:
    """Put `data` at `path`, in the place of a file that is there, which is never lost half-way.

    With `keep_mode` the new file has the old one's permissions, where the disk can set them.
    """
    with _partial(path.parent, data, mark) as partial:
        if keep_mode:
            with suppress(OSError):
                os.chmod(partial, path.stat().st_mode)
        os.replace(partial, path)


@contextmanager
def _partial(folder: Path, data: bytes, mark: str) -> Iterator[Path]:
    """A temporary file with `data`, on the disk; removed afterwards unless it was renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    flags |= getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    partial = folder / f"{PARTIAL}{mark}-{secrets.token_hex(8)}.partial"
    # Created with the mode that the umask leaves: some disks cannot change it afterwards.
    descriptor = os.open(partial, flags, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            sync(file.fileno())
        yield partial
    finally:
        with suppress(OSError):  # the data is where it belongs, or a better error is under way
            partial.unlink(missing_ok=True)


def _take_name(partial: Path, target: Path) -> bool:
    """Give a temporary file its name; False if that is taken."""
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

    `missing` says why there is none, where the file system has no locks: then nothing is held, and
    nothing keeps another process out.
    """

    def __init__(self, path: Path, wait: bool = False) -> None:
        """BlockingIOError if another process holds it and `wait` is not set; OSError if the file
        cannot be opened."""
        from filelock import lock_descriptor

        self.missing: str | None = None
        self.held = False
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            self.held = lock_descriptor(self.descriptor, blocking=wait)
        except OSError as error:  # an odd number means no more here than an expected one
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
