"""A batch that is asked to stop, and readers that leave."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batches import DEMO, PROMPTS, events, lines, pictures, started
from examples import exhaustive

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), *exhaustive((signal.SIGTERM, 143))],
    ids=["ctrl-c", "sigterm"],
)
def test_asked_to_stop_it_sums_up_and_goes_on_next_time(sana, program, number, code):
    Path("jobs.txt").write_text("\n".join(f"{text} {i}" for text in PROMPTS for i in range(2)))
    with started(
        program, "jobs.txt", "-m", "demo", "-r", "256", "--steps", "20", "--json"
    ) as process:
        head: list[bytes] = []
        while len(events(b"".join(head).decode())) < 2:
            head.append(process.stdout.readline())
            assert head[-1], process.stderr.read()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code
    found = events((b"".join(head) + out).decode())
    drawn = [event for event in found if event["event"] == "image"]
    assert found[-1]["event"] == "summary" and found[-1]["exit_code"] == code
    assert found[-1]["drawn"] == len(drawn) < 6 and found[-1]["left"] == 6 - len(drawn)
    assert len(lines("jobs-images", "done")) == len(pictures("jobs-images")) == len(drawn)
    assert b"Traceback" not in err and b"error:" not in err
    run = sana("batch", "jobs.txt", "-m", "demo", "-r", "256", "--steps", "20")
    assert (run.code, len(run.out.split())) == (0, 6 - len(drawn))


def test_asked_twice_it_stops_at_once(program, here):
    Path("one.txt").write_text(PROMPTS[0])
    with started(program, "one.txt", "-m", "demo", "--steps", "1000") as process:
        for line in process.stderr:
            if b"to draw" in line:
                break
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err
    assert pictures("one-images") == {}


def test_a_reader_that_leaves_ends_it_quietly(program, here):
    command = f"{program} batch jobs.txt {' '.join(DEMO)} -n 20 -q | head -n 1"
    run = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60)
    assert (run.stderr, len(run.stdout.splitlines())) == (b"", 1)
    assert 1 <= len(lines("jobs-images", "done")) < 60


@pytest.mark.parametrize("words", ["models list", "models list --json", "--help", "generate -h"])
def test_whatever_is_printed_a_reader_that_left_is_one_exit_code(program, words):
    """The pipe has no reader from the beginning, so that no race decides."""
    command = f"exec 3> >(exec true); wait $!; {program} {words} >&3"
    run = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60)
    assert (run.returncode, run.stderr) == (141, b"")
