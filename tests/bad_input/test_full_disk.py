"""A disk that fills up: exit code 6, and nothing lost."""

import errno
import os
import subprocess

import pytest

from examples import exhaustive
from faults import FAST, SANA, assert_polite


def fill_disk(monkeypatch, module, name: str, after: int = 0, code: int = errno.ENOSPC) -> None:
    real, calls = getattr(module, name), []

    def full(*args, **kwargs):
        # Other files are opened meanwhile, and not all of them on that disk.
        calls.append(name != "open" or str(args[0]).endswith(".partial"))
        if calls[-1] and sum(calls) > after:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, full)


@pytest.mark.parametrize(
    ("module", "name", "code"),
    [
        (os, "fsync", errno.ENOSPC),
        (os, "fsync", errno.EDQUOT),
        (os, "link", errno.ENOSPC),
        (os, "open", errno.ENOSPC),
    ],
    ids=["writing", "quota", "naming", "opening"],
)
@pytest.mark.parametrize("words", [(), ("--json",)], ids=["", "json"])
def test_a_full_disk_leaves_nothing_behind(refused, model, monkeypatch, module, name, code, words):
    fill_disk(monkeypatch, module, name, code=code)
    refused(6, "a fox", "-m", str(model), *FAST, *words, says=("space",), hint="-o")


def test_a_full_disk_leaves_what_stood_there(sana, model, here, monkeypatch):
    (here / "fox.png").write_text("mine")
    fill_disk(monkeypatch, os, "fsync")
    run = sana("generate", "a fox", "-m", str(model), *FAST, "-o", "fox.png", "--force")
    assert (run.code, run.out) == (6, "")
    assert [path.read_text() for path in here.iterdir()] == ["mine"]


def test_a_disk_that_fills_up_keeps_the_pictures_before(sana, model, here, monkeypatch):
    fill_disk(monkeypatch, os, "fsync", after=1)
    # Without the cache, only images are written.
    run = sana("generate", "a fox", "-m", str(model), *FAST, "-n", "3", "--no-cache")
    assert (run.code, run.out) == (6, "a-fox-7.png\n")
    assert_polite(run.err, ("a-fox-8.png",))
    assert [path.name for path in here.iterdir()] == ["a-fox-7.png"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("words", "code"),
    [(("generate", ""), 2), (("generate", "a", "-m", "a/b", "--offline", "-v"), 5)],
)
def test_an_error_that_cannot_be_printed_keeps_its_exit_code(program, words, code):
    with open("/dev/full", "w") as full:
        assert subprocess.run([program, *words], stderr=full).returncode == code


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    "words",
    [("-o", "-"), *exhaustive([], ["--json"], ["--dry-run"])],
    ids=["picture", "path", "json", "plan"],
)
def test_a_full_disk_behind_stdout_is_reported(model, words):
    command = [SANA, "generate", "a fox", "-m", str(model), *FAST, *words]
    with open("/dev/full", "w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert run.returncode == 6, run.stderr
    assert_polite(run.stderr, ("space",))
