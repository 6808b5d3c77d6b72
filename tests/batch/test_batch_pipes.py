"""Rows from a pipe, drawn as they come."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from batches import DEMO, PROMPTS, pictures, started

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


def test_a_pipe_is_drawn_as_it_comes(program):
    with started(program, "-", *DEMO, "-o", "out", "-q") as process:
        process.stdin.write(f"{PROMPTS[0]}\n".encode())
        process.stdin.flush()
        first = process.stdout.readline()  # while the pipe is still open
        process.stdin.write(f"{PROMPTS[1]}\n{'x' * 20_001}\n{PROMPTS[2]}\n".encode())
        out, err = process.communicate(timeout=60)
    assert first.startswith(b"out/a-red-circle")
    assert len(out.splitlines()) == 2
    # What was drawn is not undone by a later row that is wrong.
    assert process.returncode == 3
    assert b"stdin, row 3: a prompt is longer" in err


def test_of_a_row_that_is_skipped_nothing_is_drawn_or_taken(program):
    twice = {"prompt": "a {red|blue} ring on grey", "output": "a.png"}
    once = twice | {"prompt": PROMPTS[2]}
    twins = {"prompt": PROMPTS[2], "output": "b.png", "count": 2}
    words = ("--expand", "--input-format", "jsonl", "-o", "out", "-q")
    with started(program, "-", *DEMO, *words) as process:
        process.stdin.write(json.dumps({"prompt": PROMPTS[0], "output": "first.png"}).encode())
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"out/first.png\n"
        process.stdin.write("\n".join(map(json.dumps, (twice, twins, once))).encode())
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (3, b"out/a.png\n")
    assert b"row 2" in err and b"row 3" in err and err.count(b"is the name twice") == 2
    assert sorted(pictures("out")) == ["a.png", "first.png"]


def test_no_mark_of_a_pipe_from_windows_reaches_a_prompt(process):
    words = ("batch", "-", *DEMO, "--check", "--json", "--input-format", "csv")
    table = "prompt;seed\na fox;7\n"
    for data in (table.encode("utf-8-sig"), table.encode("utf-16")):
        run = process(*words, input=data)
        assert run.returncode == 0, run.stderr
        assert b"semicolons" in run.stderr
        assert json.loads(run.stdout)["jobs"] == 1


def test_a_pipe_whose_first_rows_are_wrong_is_refused(process):
    run = process("batch", "-", *DEMO, "--input-format", "jsonl", input=b'{"promt": "x"}\n')
    assert (run.returncode, run.stdout) == (2, b"")
    assert b"stdin, row 1, column promt: is not a field; did you mean prompt?" in run.stderr


def test_a_pipe_that_cannot_be_read_is_refused_and_not_waited_for(program):
    words = ("batch", "-", *DEMO, "-o", "out")
    with open(os.devnull, "wb") as unreadable:  # as nohup leaves it
        run = subprocess.run([program, *words], stdin=unreadable, capture_output=True, timeout=60)
    assert (run.returncode, run.stdout) == (2, b"")
    assert run.stderr.startswith(b"error: stdin cannot be read: ") and b"Trace" not in run.stderr


def test_asked_to_stop_while_it_waits_for_a_pipe_it_goes(program, here):
    with started(program, "-", *DEMO, "-o", "out") as process:
        process.stdin.write(f"{PROMPTS[0]}\n".encode())
        process.stdin.flush()
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    assert process.returncode == 143
