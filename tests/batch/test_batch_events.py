"""What a batch says while it runs: events, paths, a bar."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from batches import ANY_SIZE, DEMO, PROMPTS, SANA, events
from terminal import at_terminal

SCHEMAS = {
    "plan": "jobs done failed todo folder shard device expected_time models",
    "image": "id row path seed width height model sha256 bytes seconds peak_bytes recipe",
    "error": "id row column message hint exit_code",
    "sheet": "path images",
    "heartbeat": "stage done total",
    "summary": "drawn done failed left seconds exit_code",
}


def assert_schemas(found: list[dict]) -> None:
    import sana_cli.batch.events

    for event in found:
        assert set(event) == {"event", *SCHEMAS[event["event"]].split()}
    for name, facts in SCHEMAS.items():
        section = re.search(rf"\n{name} .*?(?=\n\w|$)", sana_cli.batch.events.__doc__, re.DOTALL)[0]
        assert all(fact in section for fact in facts.split()), name


@pytest.mark.parametrize("closed", ["", " 2>&-"], ids=["stderr", "no stderr"])
def test_events_are_json_lines_with_warnings_going_on(program, here, monkeypatch, broken, closed):
    # A cache that cannot be written is a warning.
    monkeypatch.setenv("SANA_CACHE_DIR", str(here / "jobs.txt"))
    rows = [{"prompt": PROMPTS[0]}, {"prompt": "x", "model": str(broken), "instruction": False}]
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # What forks passes all three streams on.
    command = f"{SANA if closed else program} batch jobs.jsonl {' '.join(ANY_SIZE)} --json{closed}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60)
    assert run.returncode == 3
    found = events(run.stdout.decode())
    assert [event["event"] for event in found] == ["plan", "image", "error", "summary"]
    assert_schemas(found)
    assert (b"warning" in run.stderr) == (not closed)
    digest = found[1]["sha256"]
    assert shutil.which("sha256sum") is None or digest.encode() in subprocess.check_output(
        ["sha256sum", found[1]["path"]]
    )


def test_long_work_is_heard_of(sana, monkeypatch):
    monkeypatch.setattr("sana_cli.batch.events.HEARTBEAT", 0.05)
    run = sana("batch", "jobs.txt", "-m", "demo", "-r", "256", "--steps", "20", "--json")
    found = events(run.out, heartbeats=True)
    assert_schemas(found)
    beats = [event for event in found if event["event"] == "heartbeat"]
    assert {beat["stage"] for beat in beats} >= {"denoise"}
    assert found[-1]["event"] == "summary"


def test_quiet_says_nothing_but_paths(sana):
    run = sana("batch", "jobs.txt", *DEMO, "-q")
    assert (run.err, len(run.out.splitlines())) == ("", 3)


def test_a_bar_moves_on_a_terminal_and_stdout_holds_the_paths(program, here):
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
    command = [program, "batch", "jobs.txt", *DEMO]
    code, shown, results = at_terminal(command, results=False, env=environment)
    assert code == 0
    assert [line.split(b"-")[0] for line in results.splitlines()] == [b"jobs"] * 3
    assert b"3/3" in shown or b"2/3" in shown
