"""Weights fetched from a hub on loopback by the real client, through everything that goes wrong."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from examples import exhaustive
from hub import Fault
from laptop import NAME, NEEDED, OWN, TRANSFORMER, assert_whole, polite
from sana_cli.units import gigabytes
from sana_cli.weights import download
from sana_cli.weights.catalogue import known_models
from terminal import at_terminal

# --- what is fetched ---------------------------------------------------------------------------


def test_generate_fetches_what_the_model_needs_and_draws(laptop):
    run = laptop.sana(
        *("generate", "a fox", "-r", "512", "--steps", "1", "--no-instruction", "-o", "fox.png")
    )
    assert run.stdout == "fox.png\n"
    assert (laptop.home / "fox.png").stat().st_size > 1000
    assert f"fetching {NAME} from {OWN.repo}, licence NVIDIA" in run.stderr
    for repo, names in NEEDED.items():
        assert laptop.files(repo) == names
    assert_whole(laptop)


@pytest.mark.parametrize(
    ("typed", "words", "code"),
    [(b"n\n", (), 5), (b"\x04", (), 5), (b"\n", (), 0), (b"", ("-y",), 0)],
    ids=["no", "end of input", "yes", "-y"],
)
def test_a_person_is_asked_before_a_download(laptop, typed, words, code):
    command = laptop.command("generate", "a fox", "-m", NAME, "-s1", "--steps", "1", *words)
    ended, seen, _ = at_terminal(command, 120, typed=typed, cwd=laptop.home, env=laptop.env)
    assert ended == code, seen
    assert (b"Fetch " in seen) == (not words)
    assert bool(laptop.files(OWN.repo)) == (code == 0)


def test_a_download_is_announced_with_its_size_the_disk_and_the_time(laptop):
    run = laptop.pull()
    size = sum(path.stat().st_size for path in laptop.blobs())
    (line,) = (line for line in run.stderr.splitlines() if line.startswith("to fetch: "))
    assert f"to fetch: {gigabytes(size)}, of " in line
    assert f" free in {laptop.home}; about 1 s at 100 Mbit/s" in line
    assert "to fetch" not in laptop.pull().stderr


def test_the_next_run_asks_the_hub_for_nothing(laptop, hub):
    laptop.pull()
    hub.requests.clear()
    laptop.sana("generate", "a fox", "-m", NAME, "--steps", "1", "-o", "fox.png")
    laptop.pull()
    assert hub.requests == []


def test_a_second_model_costs_only_its_transformer(laptop, hub, published):
    second = "sana-0.6b-1024"
    own = known_models()[second].sources[0]
    hub.push(own.repo, published[0], own.revision)
    laptop.pull()
    hub.requests.clear()
    laptop.sana("models", "pull", second)
    assert {name for _, name, _ in hub.requests} == {"", *NEEDED[OWN.repo]}


def test_a_dry_run_names_the_files_and_fetches_none(laptop, hub):
    run = laptop.sana("models", "pull", NAME, "--dry-run", "--json")
    document = json.loads(run.stdout)
    files = {(row["repo"], row["file"]) for row in document["files"]}
    assert files == {(repo, name) for repo, names in NEEDED.items() for name in names}
    assert document["fetched_bytes"] == sum(row["bytes"] for row in document["files"])
    assert hub.sent == 0
    assert not laptop.blobs()


def test_generates_own_dry_run_opens_no_connection_and_says_what_it_would_fetch(laptop, hub):
    run = laptop.sana("generate", "a fox", "-r", "4096", "--dry-run")
    plan = json.loads(run.stdout)
    assert plan["download_bytes"] == sum(s.bytes for s in known_models()["sana-1.6b-4k"].sources)
    assert plan["recipes"][0]["flow_shift"] == 6.0
    assert "would fetch 9.69 GB first: sana models pull sana-1.6b-4k" in run.stderr
    assert hub.requests == []


def test_a_model_of_no_list_is_fetched_by_its_hub_name(laptop, hub, published):
    hub.push("someone/finetune", published[1])
    run = laptop.sana(
        *("generate", "a fox", "-m", "someone/finetune", "--steps", "1", "-o", "fox.png")
    )
    assert run.stdout == "fox.png\n"
    assert "transformer/diffusion_pytorch_model.bf16.safetensors" in laptop.files(
        "someone/finetune"
    )
    assert not {name for name in laptop.files("someone/finetune") if "int4" in name}


# --- interruptions -----------------------------------------------------------------------------


def test_a_killed_download_goes_on_where_it_was(laptop, hub):
    hub.slow = 0.05
    run = subprocess.Popen(
        laptop.command("models", "pull", NAME), env=laptop.env, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while hub.sent < 600_000 and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    partial = {p.name: p.stat().st_size for p in laptop.blobs() if p.name.endswith(".incomplete")}
    assert any(partial.values())
    hub.slow = 0
    hub.requests.clear()
    laptop.pull()
    spans = [span for _, _, span in hub.requests if span]
    assert {f"bytes={size}-" for size in partial.values() if size} <= set(spans)
    assert_whole(laptop)


def test_an_interrupted_download_leaves_at_once_and_quietly(laptop, hub):
    """While the hub keeps silent: it would for longer than the test waits."""
    hub.faults[TRANSFORMER] = Fault(stall=3600)
    run = subprocess.Popen(
        laptop.command("models", "pull", NAME),
        env=laptop.env | {"HF_HUB_DOWNLOAD_TIMEOUT": "3600"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not hub.fetched(TRANSFORMER) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert "Traceback" not in said
    assert "interrupted; what was fetched is kept" in said


@pytest.mark.parametrize(
    "fault",
    [
        Fault(cut=1000),
        Fault(stall=3),
        Fault(corrupt=True),
        Fault(status=503, times=2),
        *exhaustive(Fault(cut=0, times=3), Fault(status=429)),
    ],
    ids=["dies-midway", "stalls", "corrupt", "503", "dies-at-once", "429"],
)
def test_what_passes_is_retried(laptop, hub, fault):
    hub.faults[TRANSFORMER] = fault
    run = laptop.pull()
    assert "again" in run.stderr
    assert_whole(laptop)


def test_a_dropped_connection_is_resumed_not_restarted(laptop, hub):
    hub.faults[TRANSFORMER] = Fault(cut=300_000)
    laptop.pull()
    assert hub.fetched(TRANSFORMER)[-1] == "bytes=300000-"


def test_a_listing_that_fails_for_a_moment_is_asked_again(laptop, hub):
    hub.faults[""] = Fault(status=503, times=2)
    laptop.pull()
    assert_whole(laptop)


def test_content_that_stays_wrong_is_never_used(laptop, hub):
    hub.faults[TRANSFORMER] = Fault(corrupt=True, times=99)
    said = polite(laptop.pull(code=5))
    assert "arrived damaged twice" in said
    assert TRANSFORMER not in laptop.files(OWN.repo)
    assert not laptop.row()["cached"]
    hub.faults.clear()
    laptop.pull()
    assert_whole(laptop)


def test_two_processes_at_once_fetch_each_file_once(laptop, hub):
    hub.slow = 0.02
    runs = [
        subprocess.Popen(
            laptop.command("models", "pull", NAME), env=laptop.env, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for run in runs:
        _, said = run.communicate(timeout=60)
        assert run.returncode == 0, said
    assert len(hub.fetched(TRANSFORMER)) == 1
    assert_whole(laptop)


# --- refusals ----------------------------------------------------------------------------------


def test_an_unknown_repository_is_named(laptop):
    said = polite(laptop.sana("models", "pull", "nobody/nothing", code=5))
    assert "nobody/nothing" in said


def test_a_repository_without_weights_is_named(laptop, hub, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    hub.push("someone/bare", tmp_path / "bare")
    said = polite(laptop.sana("models", "pull", "someone/bare", code=5))
    assert "someone/bare" in said
    assert "layout" in said


def test_a_licence_to_accept_is_explained_and_a_token_opens(laptop, hub):
    hub.repos[OWN.repo].token, hub.repos[OWN.repo].gated = "hf_secret", True
    said = polite(laptop.pull(code=5))
    assert "HF_TOKEN" in said
    assert "licence" in said
    laptop.pull(HF_TOKEN="hf_secret")
    assert_whole(laptop)


def test_a_hub_that_is_down_is_given_up_with_what_came_kept(laptop, hub):
    hub.faults[TRANSFORMER] = Fault(status=503, times=99)
    said = polite(laptop.pull(code=5))
    assert "503" in said
    assert "kept" in said
    hub.faults.clear()
    laptop.pull()
    assert_whole(laptop)


UNREACHABLE = {
    "refused": {},
    "no-such-host": {"HF_ENDPOINT": "http://hub.invalid"},
    "no-proxy": {"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": "http://127.0.0.1:1"},
}


@pytest.mark.parametrize("how", UNREACHABLE)
@pytest.mark.parametrize("words", [("models", "pull", NAME), ("generate", "a fox", "-m", NAME)])
def test_a_hub_that_cannot_be_reached_is_said_at_once(laptop, hub, how, words):
    hub.close()
    run = laptop.sana(*words, code=5, **UNREACHABLE[how])
    said = polite(run)
    assert "cannot reach the hub at http://" in said and "Errno" not in said
    assert "HF_ENDPOINT" in said
    assert "again" not in run.stderr  # no attempt was repeated


def test_a_cache_without_locks_is_named(laptop, hub, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import errno, fcntl, os\n"
        "def raising(*args): raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))\n"
        "fcntl.flock = raising\n"
    )
    laptop.program = Path(sys.executable).with_name("sana")  # a process that reads it
    said = polite(laptop.pull(code=5, PYTHONPATH=str(tmp_path)))
    assert "cannot be locked" in said and os.strerror(errno.ENOLCK) in said
    assert "HF_HOME" in said


def test_what_is_under_way_when_another_file_fails_is_neither_repeated_nor_reported():
    # The process ends and closes the connections of its threads; the error was the last word.
    stop, notes = threading.Event(), []

    def closed() -> None:
        stop.set()
        raise ConnectionError("Bad file descriptor")

    with pytest.raises(ConnectionError):
        download._again(closed, notes.append, stop=stop)
    assert notes == []


def test_a_disk_too_small_is_found_out_before_the_first_byte(laptop, hub, monkeypatch):
    # A file of 10^18 bytes fits on no disk; the hub only has to say that it is so large.
    import hub as stand_in

    class Huge(bytes):
        def __len__(self) -> int:
            return 10**18

    monkeypatch.setattr(stand_in, "etag", lambda content: "0" * 64)
    files = hub.repos[OWN.repo].commits[OWN.revision]
    files[TRANSFORMER] = Huge(files[TRANSFORMER])
    said = polite(laptop.pull(code=6))
    assert "HF_HOME" in said
    assert hub.sent == 0


# --- no network --------------------------------------------------------------------------------

NO_SOCKETS = """
import socket, sys
def refuse(*_, **__):
    raise AssertionError("a socket was opened")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
socket.create_connection = refuse
sys.argv = ["sana", *sys.argv[1:]]
from sana_cli.app import main
main()
"""


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("by", ["--offline", *exhaustive("HF_HUB_OFFLINE")])
def test_offline_opens_no_socket(laptop, here, by):
    if here:
        laptop.pull()
    words = ["generate", "a fox", "-m", NAME, "--steps", "1", "-o", "fox.png"]
    env = laptop.env | ({"HF_HUB_OFFLINE": "1"} if by == "HF_HUB_OFFLINE" else {})
    run = subprocess.run(
        [sys.executable, "-P", "-c", NO_SOCKETS, *words, *([by] if by == "--offline" else [])],
        **{"capture_output": True, "text": True, "timeout": 120, "cwd": laptop.home},
        env=env,
    )
    assert "a socket was opened" not in run.stderr
    if here:
        assert (run.returncode, run.stdout) == (0, "fox.png\n"), run.stderr
    else:
        assert run.returncode == 5
        assert f"sana models pull {NAME}" in polite(run)


def test_pull_refuses_to_work_without_a_network(laptop):
    polite(laptop.pull(code=5, HF_HUB_OFFLINE="1"))
