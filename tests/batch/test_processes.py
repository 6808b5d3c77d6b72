"""Several processes draw what one would, whatever becomes of them."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from batches import DEMO, PROMPTS, SANA, events, lines, pictures, started
from examples import exhaustive
from sana_cli.batch import processes

WORKERS = ("--workers", "2", "--device", "cpu")
FACTS = ("id", "row", "seed", "sha256", "path", "bytes", "status")


@pytest.fixture
def deadly(monkeypatch):
    """Kill the process that is handed a job of this prompt, as often as told."""

    def kill(prompt: str, times: int) -> None:
        left = [times]
        take = processes._Process.take

        def taken(process, chunk):
            take(process, chunk)
            if left[0] and any(job.recipe.prompt == prompt for job in chunk.jobs):
                left[0] -= 1
                process.process.kill()

        monkeypatch.setattr(processes._Process, "take", taken)

    return kill


def test_a_job_that_kills_two_processes_is_named_and_costs_no_other(sana, deadly, here):
    prompts = [*PROMPTS, "a pink heart", "a grey cross"]
    Path("jobs.txt").write_text("\n".join(prompts))
    assert sana("batch", "jobs.txt", *DEMO, "-o", "one").code == 0
    deadly(PROMPTS[1], 2)
    run = sana("batch", "jobs.txt", *DEMO, *WORKERS, "-o", "two", "--json")
    assert run.code == 3, run.err
    found = events(run.out)
    (error,) = (event for event in found if event["event"] == "error")
    assert error["row"] == 2 and "two worker processes died" in error["message"]
    assert "killed by SIGKILL" in error["message"]
    assert run.err.count("is tried once more") == 1
    assert sorted(event["row"] for event in found if event["event"] == "image") == [1, 3, 4, 5]
    assert (found[-1]["drawn"], found[-1]["failed"], found[-1]["left"]) == (4, 1, 0)
    assert sana("batch", "status", "two").code == 3
    # The manifest has the same lines as that of one process, and so anyone can finish it.
    assert sana("batch", "jobs.txt", *DEMO, "-o", "two", "--retry-failed").code == 0
    assert pictures("two") == pictures("one")
    one, two = ({tuple(d[k] for k in FACTS) for d in lines(at, "done")} for at in ("one", "two"))
    assert one == two


@pytest.mark.exhaustive
def test_a_process_that_dies_once_costs_nothing(sana, deadly):
    assert sana("batch", "jobs.txt", *DEMO, "-o", "one").code == 0
    deadly(PROMPTS[0], 1)
    run = sana("batch", "jobs.txt", *DEMO, *WORKERS, "-o", "two")
    assert (run.code, len(run.out.split())) == (0, 3), run.err
    assert pictures("two") == pictures("one")


@pytest.mark.exhaustive
def test_too_little_memory_for_any_job_is_no_fault_of_the_jobs(sana):
    run = sana("batch", "jobs.txt", *DEMO, *WORKERS, "--memory", "120MB")
    assert (run.code, run.out) == (4, ""), run.err
    assert "more than the 60.0 MB" in run.err
    assert not lines("jobs-images", "failed")


@pytest.mark.exhaustive
def test_failures_of_jobs_are_those_of_one_process(sana, broken):
    rows = [{"prompt": "a fox", "model": str(broken), "instruction": False}]
    rows.append({"prompt": PROMPTS[0], "model": "demo"})
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = sana("batch", "jobs.jsonl", "--steps", "1", *WORKERS, "--json")
    assert run.code == 3
    (error,) = (event for event in events(run.out) if event["event"] == "error")
    assert (error["row"], error["exit_code"]) == (1, 7)


@pytest.mark.exhaustive
def test_a_pipe_is_drawn_as_it_comes(program):
    with started(program, "-", *DEMO, *WORKERS, "-q") as process:
        for prompt in PROMPTS[:2]:
            process.stdin.write(prompt.encode() + b"\n")
            process.stdin.flush()
            assert process.stdout.readline().startswith(b"sana-images/")
        process.stdin.close()
        assert process.wait(60) == 0


def workers_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(one) for one in found if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes()]


MOMENTS = (  # seconds after the first worker; they import then
    (0.2, signal.SIGINT),
    *exhaustive(
        *((0, signal.SIGINT), (0, signal.SIGTERM), (0.2, signal.SIGTERM)),
        *((0.6, signal.SIGINT), (0.6, signal.SIGTERM)),
    ),
)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("seconds", "number"), MOMENTS)
def test_stopped_while_its_workers_start_it_says_so_and_no_more(number, seconds):
    command = [SANA, "batch", "jobs.txt", *DEMO, *WORKERS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        while not workers_of(process.pid):
            assert process.poll() is None
        time.sleep(seconds)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"Traceback" not in err and b"error:" not in err


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_asked_to_stop_or_killed_it_leaves_no_process_and_goes_on_next_time(sana, number):
    Path("jobs.txt").write_text("\n".join(f"{text} {i}" for text in PROMPTS for i in range(4)))
    words = ("jobs.txt", "-m", "demo", "-r", "256", "--steps", "30")
    command = [SANA, "batch", *words, *WORKERS, "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        while (
            events(line := process.stdout.readline().decode(), heartbeats=True)[-1]["event"]
            != "image"
        ):
            assert line
        workers = workers_of(process.pid)
        assert len(workers) == 2
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.kill()
        out, err = process.communicate(timeout=120)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives the command"
        time.sleep(0.1)
    drawn = len(lines("jobs-images", "done"))
    assert 1 <= drawn < 12 and len(pictures("jobs-images")) == drawn
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert b"Traceback" not in err and b"error:" not in err
        last = events(out.decode())[-1]
        assert (last["event"], last["left"]) == ("summary", 12 - drawn)
    run = sana("batch", *words)
    assert (run.code, len(run.out.split())) == (0, 12 - drawn)
