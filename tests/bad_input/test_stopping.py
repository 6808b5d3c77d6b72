"""Ctrl-C and SIGTERM: exit codes 130 and 143, and whole pictures only."""

import contextlib
import signal
import subprocess
import sys
import time

import pytest

from examples import exhaustive
from faults import SANA

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


SIGNALS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
ONE_OF_THEM = pytest.mark.parametrize(
    ("number", "code"),
    [*exhaustive((signal.SIGINT, 130)), (signal.SIGTERM, 143)],
    ids=["ctrl-c", "sigterm"],
)


@contextlib.contextmanager
def started(program, *words: str):
    """A real process; killed if the test fails while it runs."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([program, "generate", *words], stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def stopped(process: subprocess.Popen, number: int, says: bytes = b"") -> tuple[int, bytes]:
    """Exit code and stdout after the signal; what stderr `says` includes no error."""
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert b"Traceback" not in err and b"Exception ignored" not in err, err.decode()
    assert b"error:" not in err, err.decode()
    assert says in err, err.decode()
    return process.returncode, out


@SIGNALS
@pytest.mark.parametrize("wait", [None, 0, 0.2, 0.8], ids=["stdin", "0 s", "0.2 s", "0.8 s"])
def test_stopped_while_it_starts_it_goes_quietly(here, model, number, code, wait):
    with started(SANA, "-", "-m", str(model), "--steps", "1000", "-n", "50") as process:
        # More than a pipe holds: once it is all written, the command is reading.
        process.stdin.write(b"\n" * 200_000 + b"a fox\n")
        process.stdin.flush()
        if wait is not None:
            process.stdin.close()
            process.stdin = None
            time.sleep(wait)
        assert stopped(process, number) == (code, b"")
    assert not list(here.rglob("*"))


@SIGNALS
@pytest.mark.parametrize("marker", [b"encode:", *exhaustive(b"model ", b"512x512")])
def test_stopped_while_it_draws_it_leaves_nothing(program, here, model, number, code, marker):
    with started(program, "a fox", "-m", str(model), "--steps", "1000", "-n", "50") as process:
        assert any(line.startswith(marker) for line in process.stderr)
        time.sleep(0.1)
        says = b"interrupted; saved 0 of 50 images" if marker == b"encode:" else b""
        assert stopped(process, number, says) == (code, b"")
    assert not list(here.rglob("*"))


@ONE_OF_THEM
def test_stopped_while_it_saves_it_leaves_whole_pictures(program, here, model, number, code):
    from PIL import Image

    with started(
        program, "a fox", "-m", str(model), "--steps", "1", "-n", "20", "-s", "0"
    ) as process:
        first = process.stdout.readline()
        ended, more = stopped(process, number, b" of 20 images, the last in a-fox-")
    assert ended == code
    printed = (first + more).decode().splitlines()
    found = sorted(path.name for path in here.rglob("*"))
    # The signal may fall between the file and its line.
    assert set(printed) <= set(found) and len(printed) + 1 >= len(found)
    assert 1 <= len(found) < 20
    for name in found:
        with Image.open(name) as picture:
            picture.load()
