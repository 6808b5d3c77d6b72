"""Files and locks on disks that lack what POSIX promises, whatever error number says so."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sana_cli.errors import SanaError
from sana_cli.system import disk

# What Linux, the BSDs, macOS and FUSE drivers say where they lack an operation.
NOT_HERE = sorted(
    {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES}
)
LOST = [errno.ENOSPC, errno.EDQUOT, errno.EIO]
ODD = [errno.EMLINK, errno.EXDEV, errno.ENOLCK, errno.ENOTTY, errno.ESTALE, errno.EBUSY]
NUMBERS = [*NOT_HERE, *LOST, *ODD, errno.EAGAIN]
each = pytest.mark.parametrize("number", NUMBERS, ids=lambda number: errno.errorcode[number])


@pytest.fixture
def refuse(monkeypatch):
    """Make a function of the operating system raise."""

    def replaced(module, name: str, number: int) -> None:
        def raising(*args, **kwargs):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(module, name, raising)

    return replaced


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@each
def test_mode_bits_are_best_effort(tmp_path, refuse, number):
    refuse(os, "chmod", number)
    disk.write_new(tmp_path / "a.png", b"new")
    disk.replace(tmp_path / "a.png", b"newer", keep_mode=True)
    assert files(tmp_path) == {"a.png": b"newer"}


@each
def test_without_hard_links_nothing_is_overwritten_and_nothing_left(tmp_path, refuse, number):
    (tmp_path / "a.png").write_bytes(b"mine")
    refuse(os, "link", number)
    if number in LOST:
        with pytest.raises(OSError):
            disk.write_new(tmp_path / "a.png", b"new")
        assert files(tmp_path) == {"a.png": b"mine"}
    else:
        assert disk.write_new(tmp_path / "a.png", b"new") == tmp_path / "a-2.png"
        assert disk.write_new(tmp_path / "a.png", b"other") == tmp_path / "a-3.png"
        assert files(tmp_path) == {"a.png": b"mine", "a-2.png": b"new", "a-3.png": b"other"}


@each
@pytest.mark.parametrize("kind", ["new", "replaced"])
def test_a_missing_fsync_is_ignored_and_a_failing_one_leaves_nothing(
    tmp_path, refuse, number, kind
):
    path = tmp_path / "a.png"
    path.write_bytes(b"mine")
    refuse(os, "fsync", number)
    write = disk.write_new if kind == "new" else disk.replace
    try:
        write(path, b"new")
    except OSError as error:
        assert error.errno == number and number not in [*NOT_HERE, errno.ENOTTY]
        assert files(tmp_path) == {"a.png": b"mine"}
    else:
        assert number not in LOST
        expected = {"a.png": b"mine", "a-2.png": b"new"} if kind == "new" else {"a.png": b"new"}
        assert files(tmp_path) == expected


@each
@pytest.mark.parametrize("linked", [True, False])
def test_a_rename_that_fails_leaves_what_was_there(tmp_path, refuse, number, linked):
    if not linked:
        refuse(os, "link", errno.ENOTSUP)
    refuse(os, "replace", number)
    (tmp_path / "a.png").write_bytes(b"mine")
    with pytest.raises(OSError):
        disk.replace(tmp_path / "a.png", b"new")
    if not linked:
        with pytest.raises(OSError):
            disk.write_new(tmp_path / "a.png", b"new")
    assert files(tmp_path) == {"a.png": b"mine"}


@each
def test_a_temporary_file_that_cannot_be_removed_costs_no_picture(tmp_path, refuse, number):
    refuse(os, "unlink", number)
    disk.write_new(tmp_path / "a.png", b"new")
    assert (tmp_path / "a.png").read_bytes() == b"new"


@given(
    st.sampled_from(NOT_HERE), st.sampled_from(NOT_HERE), st.sampled_from(NOT_HERE), st.integers(0)
)
def test_a_disk_may_lack_everything_at_once(tmp_path_factory, link, sync, mode, umask):
    folder = tmp_path_factory.mktemp("poor")

    def lacks(number):
        def raising(*args, **kwargs):
            raise OSError(number, os.strerror(number))

        return raising

    before = os.umask(umask & 0o077)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "link", lacks(link))
            patch.setattr(os, "fsync", lacks(sync))
            patch.setattr(os, "chmod", lacks(mode))
            written = [disk.write_new(folder / "a.png", bytes([i])) for i in range(3)]
    finally:
        os.umask(before)
    assert files(folder) == {path.name: bytes([i]) for i, path in enumerate(written)}
    assert {path.stat().st_mode & 0o777 for path in written} == {0o666 & ~(umask & 0o077)}


@each
def test_where_there_are_no_locks_the_reason_is_told(tmp_path, refuse, number):
    refuse(fcntl, "flock", number)
    if number in (errno.EAGAIN, errno.EACCES):  # what it means that another process holds it
        with pytest.raises(BlockingIOError):
            disk.Lock(tmp_path / "lock")
        return
    with disk.Lock(tmp_path / "lock") as one, disk.Lock(tmp_path / "lock") as two:
        assert one.missing == two.missing == os.strerror(number)
        assert not one.held


def test_a_lock_keeps_others_out_until_its_process_ends(tmp_path):
    code = "import sys; from pathlib import Path; from sana_cli.system.disk import Lock\n"
    code += "lock = Lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    path = tmp_path / "lock"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(path)], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError):
            disk.Lock(path)
        other.kill()
    with disk.Lock(path, wait=True) as lock:
        assert lock.held and lock.missing is None


def test_a_look_at_a_lock_keeps_nobody_out(tmp_path):
    path = tmp_path / "lock"
    assert not disk.is_locked(path) and not path.exists()
    with disk.Lock(path):
        assert disk.is_locked(path)
    with open(path, "rb") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        assert not disk.is_locked(path)
        threading.Timer(0.05, fcntl.flock, (look, fcntl.LOCK_UN)).start()
        with disk.Lock(path) as lock:
            assert lock.held


def test_the_hub_clients_own_lock_is_the_same_one(tmp_path):
    from filelock import FileLock, Timeout

    with disk.Lock(tmp_path / "lock"), pytest.raises(Timeout):
        FileLock(tmp_path / "lock").acquire(timeout=0)


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    path = tmp_path / "a.png"
    assert disk.save(path, b"one", force=False) == path
    assert disk.save(path, b"two", force=False) == tmp_path / "a-2.png"
    assert disk.save(path, b"three", force=False) == tmp_path / "a-3.png"
    assert path.read_bytes() == b"one"
    assert disk.save(path, b"four", force=True) == path
    assert path.read_bytes() == b"four"
    assert sorted(os.listdir(tmp_path)) == ["a-2.png", "a-3.png", "a.png"]


def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def broken(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(SanaError):
        disk.save(path, b"new", force=True)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_file_is_saved_without_hard_links_too(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "a.png"
    assert disk.save(path, b"one", force=False) == path
    assert disk.save(path, b"two", force=False) == tmp_path / "a-2.png"
    assert path.read_bytes() == b"one"
