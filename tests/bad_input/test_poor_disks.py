"""Shares and mounts that lack what a disk has: the command keeps its pictures there."""

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from faults import FAST


@pytest.fixture
def without(monkeypatch):
    """Take functions away from the operating system: they raise an error of that name."""

    def take(number: str, *functions: str) -> None:
        def raising(*args, **kwargs):
            code = getattr(errno, number)
            raise OSError(code, os.strerror(code))

        for function in functions:
            module, name = function.split(".")
            monkeypatch.setattr({"os": os, "fcntl": fcntl}[module], name, raising)

    return take


@pytest.mark.parametrize("number", ["ENOSYS", "EINVAL", "ENOTSUP", "EPERM"])
def test_a_drawn_picture_is_kept_on_a_disk_that_lacks_everything(
    sana, without, model, here, number
):
    (here / "a-fox-7.png").write_bytes(b"mine")
    without(number, "os.chmod", "os.fchmod", "os.link", "os.fsync")
    run = sana("generate", "a fox", "-m", str(model), *FAST)
    assert (run.code, run.out) == (0, "a-fox-7-2.png\n"), run.err
    assert (here / "a-fox-7.png").read_bytes() == b"mine"
    assert sorted(path.name for path in here.iterdir()) == ["a-fox-7-2.png", "a-fox-7.png"]


def test_a_disk_that_fails_leaves_nothing(refused, without, model):
    without("EIO", "os.fsync")
    refused(1, "a fox", "-m", str(model), *FAST, says=(os.strerror(errno.EIO),))


@pytest.mark.parametrize("number", ["ENOLCK", "EOPNOTSUPP", "ENOSYS", "EINVAL"])
def test_a_batch_goes_on_without_locks_and_says_so_once(sana, without, model, here, number):
    (here / "jobs.txt").write_text("a fox\nan owl\n")
    without(number, "fcntl.flock")
    without("EINVAL", "os.link", "os.fsync")
    words = ("batch", "jobs.txt", "-m", str(model), *FAST)
    run = sana(*words)
    assert run.code == 0, run.err
    assert run.out.splitlines() == ["jobs-images/a-fox-7.png", "jobs-images/an-owl-7.png"]
    said = [line for line in run.err.splitlines() if "lock" in line]
    assert len(said) == 1 and os.strerror(getattr(errno, number)) in said[0]
    again = sana(*words)
    assert (again.code, again.out) == (0, ""), again.err
    assert json.loads(sana("batch", "status", "jobs-images", "--json").out)["done"] == 2
    assert len(list(Path("jobs-images").glob("*.png"))) == 2


def test_settings_are_kept_on_a_disk_that_lacks_everything(sana, without, here, monkeypatch):
    monkeypatch.setenv("SANA_CONFIG", str(here / "config.toml"))
    (here / "config.toml").write_text("steps = 3\n")
    without("EPERM", "os.chmod", "os.fchmod", "os.fsync")
    assert sana("config", "set", "steps", "4").code == 0
    assert (here / "config.toml").read_text() == "steps = 4\n"
    assert [path.name for path in here.iterdir()] == ["config.toml"]


def test_a_real_process_without_links_locks_and_modes_keeps_its_pictures(
    new_interpreter, tmp_path, here
):
    (tmp_path / "sitecustomize.py").write_text(
        "import errno, fcntl, os\n"
        "def raising(*args, **kwargs): raise OSError(errno.EOPNOTSUPP, 'not supported')\n"
        "os.link = os.chmod = os.fsync = fcntl.flock = raising\n"
    )
    (here / "jobs.txt").write_text("a red circle\n")
    words = ("batch", "jobs.txt", "-m", "demo", "-r", "256", "--steps", "1", "-s", "7")
    run = new_interpreter(*words, env=os.environ | {"PYTHONPATH": str(tmp_path)}, text=True)
    assert (run.returncode, run.stdout) == (0, "jobs-images/a-red-circle-7.png\n"), run.stderr
    assert run.stderr.count("cannot be locked (not supported)") == 1
    assert "Warning" not in run.stderr
