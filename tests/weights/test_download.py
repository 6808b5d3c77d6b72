"""Weights fetched from a hub on loopback by the real client, through everything that goes wrong."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from examples import exhaustive
from hub import Fault, Hub
from sana_cli.units import gigabytes
from sana_cli.weights import download
from sana_cli.weights.catalogue import known_models
from terminal import at_terminal

NAME = "sana-0.6b-512"
OWN, TEXT, VAE = known_models()[NAME].sources
TRANSFORMER = "transformer/diffusion_pytorch_model.fp16.safetensors"
NEEDED = {
    OWN.repo: {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        TRANSFORMER,
    },
    TEXT.repo: {
        "text_encoder/config.json",
        "text_encoder/model.bf16-00001-of-00002.safetensors",
        "text_encoder/model.bf16-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.bf16.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bf16.safetensors",
    },
}


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> tuple[Path, Path]:
    """The two repositories that a model is fetched from, with all that must not be fetched."""
    from reference import random_pipeline

    pipe = random_pipeline(sample_size=16)
    own, shared = (tmp_path_factory.mktemp("published") / name for name in ("own", "shared"))
    for folder, variant in ((own, "fp16"), (shared, "bf16")):
        pipe.save_pretrained(folder)  # the full precision, under the plain names
        pipe.save_pretrained(folder, variant=variant)
        (folder / "transformer" / "diffusion_pytorch_model.int4.safetensors").write_bytes(b"4" * 99)
        (folder / "README.md").write_text("# a card")
    for file in (shared / "text_encoder").glob("model.bf16*"):
        file.unlink()
    pipe.text_encoder.save_pretrained(
        shared / "text_encoder", variant="bf16", max_shard_size="400KB"
    )
    shards = {path.name for path in (shared / "text_encoder").glob("model.bf16-*")}
    assert len(shards) == 2, shards
    return own, shared


@pytest.fixture
def hub(published):
    server = Hub()
    server.push(OWN.repo, published[0], OWN.revision)
    server.push(TEXT.repo, published[1], TEXT.revision)
    yield server
    server.close()


@dataclass
class Laptop:
    """A machine of its own: cache, lock, and the hub it talks to."""

    home: Path
    url: str
    program: Path

    def __post_init__(self) -> None:
        self.env = os.environ | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "SANA_DATA_DIR": str(self.home / "data"),
            "NO_PROXY": "127.0.0.1",
            "COLUMNS": "200",
        }
        self.env.pop("HF_TOKEN", None)

    def command(self, *words: str) -> list[str]:
        return [str(self.program), *words]

    def sana(self, *words: str, code: int = 0, **env: str) -> subprocess.CompletedProcess:
        run = subprocess.run(
            self.command(*words),
            **{"capture_output": True, "text": True, "timeout": 120, "cwd": self.home},
            env=self.env | env,
        )
        assert run.returncode == code, run.stderr
        return run

    def pull(self, code: int = 0, **env: str) -> subprocess.CompletedProcess:
        return self.sana("models", "pull", NAME, code=code, **env)

    def row(self, name: str = NAME) -> dict:
        rows = json.loads(self.sana("models", "list", "--json").stdout)["models"]
        return next(row for row in rows if row["name"] == name)

    def files(self, repo: str) -> set[str]:
        """Names of the files of a repository in the cache."""
        place = self.home / "hf" / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots"
        found = [path for path in place.rglob("*") if path.is_file()]
        return {path.relative_to(place).as_posix().split("/", 1)[1] for path in found}

    def blobs(self) -> list[Path]:
        return [path for path in (self.home / "hf").rglob("blobs/*") if path.is_file()]


@pytest.fixture
def laptop(hub, tmp_path, quick) -> Laptop:
    return Laptop(tmp_path, hub.url, quick / "sana")


def assert_whole(laptop: Laptop) -> None:
    assert laptop.row()["cached"]
    assert json.loads(laptop.sana("models", "verify", NAME, "--json").stdout)["models"] == [
        {"name": NAME, "ok": True, "damaged": []}
    ]
    assert not [path for path in laptop.blobs() if path.name.endswith(".incomplete")]


def polite(run: subprocess.CompletedProcess) -> str:
    """The error line and the hint, after checking that there is nothing worse."""
    assert "Traceback" not in run.stderr
    last, hint = run.stderr.strip().splitlines()[-2:]
    assert last.startswith("error: ")
    assert hint.startswith("hint: ")
    return f"{last}\n{hint}"


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


# --- main moves, the lock stays ----------------------------------------------------------------

MOVING = "sana-1.6b-512"
MAIN = known_models()[MOVING].sources[0]


@pytest.fixture
def moved(laptop, hub, published, tmp_path):
    """A model of `main` that was fetched, and then changed upstream."""
    first = hub.push(MAIN.repo, published[0])
    laptop.sana("models", "pull", MOVING)
    changed = shutil.copytree(published[0], tmp_path / "changed")
    config = changed / "transformer" / "config.json"
    config.write_text(config.read_text() + "\n")
    return first, hub.push(MAIN.repo, changed)


def test_the_first_download_of_main_pins_it(laptop, moved):
    lock = json.loads((laptop.home / "data" / "weights.lock.json").read_text())
    entry = lock[f"{MAIN.repo}@main"]
    assert entry["commit"] == moved[0]
    assert {name: facts["size"] > 0 for name, facts in entry["files"].items()} == dict.fromkeys(
        NEEDED[OWN.repo], True
    )
    assert len(entry["files"][TRANSFORMER]["value"]) == 64


def test_a_change_upstream_is_reported_and_not_taken(laptop, moved):
    run = laptop.sana("models", "pull", MOVING)
    assert f"was {moved[0]} and is now {moved[1]}" in run.stderr
    drawn = laptop.sana("generate", "a", "-m", MOVING, "--steps", "1", "--json", "-o", "a.png")
    assert json.loads(drawn.stdout)["images"][0]["recipe"]["revision"] == moved[0]


def test_files_lost_after_a_change_are_fetched_from_the_pinned_commit(laptop, moved):
    for path in (laptop.home / "hf").rglob("snapshots/*/scheduler/scheduler_config.json"):
        path.unlink()
    laptop.sana("models", "pull", MOVING)
    assert laptop.row(MOVING)["cached"]
    lock = json.loads((laptop.home / "data" / "weights.lock.json").read_text())
    assert lock[f"{MAIN.repo}@main"]["commit"] == moved[0]


def test_a_commit_that_is_gone_upstream_brings_the_way_to_the_newest(laptop, hub, moved):
    del hub.repos[MAIN.repo].commits[moved[0]]
    for path in (laptop.home / "hf").rglob("snapshots/*/scheduler/scheduler_config.json"):
        path.unlink()
    said = polite(laptop.sana("generate", "a", "-m", MOVING, "--steps", "1", code=5))
    assert f"{MAIN.repo} has not, or no longer, the commit" in said and "pull --update" in said
    laptop.sana("models", "pull", MOVING, "--update")
    assert laptop.row(MOVING)["cached"]


def test_update_also_fetches_what_is_lost_of_an_unchanged_model(laptop, hub, published):
    hub.push(MAIN.repo, published[0])
    laptop.sana("models", "pull", MOVING)
    for path in (laptop.home / "hf").rglob("snapshots/*/scheduler/scheduler_config.json"):
        path.unlink()
    laptop.sana("models", "pull", MOVING, "--update")
    assert laptop.row(MOVING)["cached"]


def test_update_takes_the_change(laptop, moved):
    laptop.sana("models", "pull", MOVING, "--update")
    drawn = laptop.sana("generate", "a", "-m", MOVING, "--steps", "1", "--json", "-o", "a.png")
    assert json.loads(drawn.stdout)["images"][0]["recipe"]["revision"] == moved[1]


# --- sana models -------------------------------------------------------------------------------


def test_list_tells_what_is_here(laptop):
    before = laptop.row()
    laptop.pull()
    after = laptop.row()
    assert (before["cached"], before["missing_bytes"]) == (False, before["bytes"])
    assert (after["cached"], after["missing_bytes"]) == (True, 0)
    table = laptop.sana("models", "list").stdout
    for name, model in known_models().items():
        (line,) = (line for line in table.splitlines() if line.split()[:1] == [name])
        assert model.licence in line


def test_on_a_terminal_of_the_usual_width_a_model_is_one_line(sana):
    lines = sana("models", "list").out.splitlines()
    assert len(lines) == 1 + len(known_models())
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("how", ["changed", "shortened", "deleted"])
def test_verify_names_the_damaged_file(laptop, how):
    laptop.pull()
    (path,) = (laptop.home / "hf").rglob(f"snapshots/*/{TRANSFORMER}")
    blob = path.resolve()
    if how == "deleted":
        blob.unlink()
    else:
        content = bytearray(blob.read_bytes())
        content[-1] ^= 1
        blob.write_bytes(content if how == "changed" else content[:-1])
    run = laptop.sana("models", "verify", NAME, "--json", code=5)
    (row,) = json.loads(run.stdout)["models"]
    assert row["damaged"] == [f"{OWN.repo}/{TRANSFORMER}"]
    assert f"sana models rm -y {NAME} && sana models pull {NAME}" in polite(run)
    laptop.sana("models", "rm", "-y", NAME)
    laptop.pull()
    assert_whole(laptop)


def test_rm_keeps_what_another_model_uses(laptop, hub, published):
    second = "sana-0.6b-1024"
    own = known_models()[second].sources[0]
    hub.push(own.repo, published[0], own.revision)
    laptop.pull()
    laptop.sana("models", "pull", second)
    freed = json.loads(laptop.sana("models", "rm", "-y", NAME, "--json").stdout)["freed_bytes"]
    assert freed > 100_000
    assert not laptop.files(OWN.repo)
    assert laptop.row(second)["cached"]
    laptop.sana("models", "rm", "-y", second)
    assert not laptop.blobs()


def test_rm_asks_first_and_does_nothing_unasked(laptop):
    laptop.pull()
    polite(laptop.sana("models", "rm", NAME, code=2))
    assert laptop.row()["cached"]


@pytest.mark.parametrize("verb", ["pull", "verify", "rm"])
def test_the_bundled_model_needs_none_of_this(laptop, verb):
    assert "demo is not from the hub" in polite(laptop.sana("models", verb, "demo", code=2))


@pytest.mark.parametrize("verb", ["pull", "verify", "rm"])
def test_a_misspelt_model_brings_a_suggestion(laptop, verb):
    said = polite(laptop.sana("models", verb, "sana-0.6b-51", code=2))
    assert f"did you mean {NAME}" in said


# --- LoRAs -------------------------------------------------------------------------------------

LORA = "pytorch_lora_weights.safetensors"
FIND = """
import sys
from sana_cli.errors import SanaError
from sana_cli.ui import Console
from sana_cli.weights.fetch import fetch_lora
from sana_cli.weights.lora_choice import parse_lora
console = Console()
try:
    print(fetch_lora(parse_lora(sys.argv[1]).place, console, offline="offline" in sys.argv))
except SanaError as error:
    console.error(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def loras(hub, tmp_path) -> Path:
    """A repository with diffusers' file beside another one, and one of PEFT's with its config."""
    folder = tmp_path / "loras"
    for name, size in ((LORA, 5000), ("sub/other.safetensors", 6000)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)
    (folder / "README.md").write_text("# a card")
    hub.push("someone/loras", folder)
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_model.safetensors").write_bytes(b"y" * 5000)
    (peft / "adapter_config.json").write_text("{}")
    hub.push("someone/peft", peft)
    return folder


def find(laptop: Laptop, *words: str, code: int = 0) -> subprocess.CompletedProcess:
    run = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", FIND, *words],
        **{"capture_output": True, "text": True, "timeout": 120, "cwd": laptop.home},
        env=laptop.env,
    )
    assert run.returncode == code, run.stderr
    return run


def test_pull_fetches_the_one_lora_of_a_repository(laptop, hub, loras):
    laptop.sana("models", "pull", "someone/loras")
    assert laptop.files("someone/loras") == {LORA}
    hub.requests.clear()
    assert find(laptop, "someone/loras").stdout.strip().endswith(LORA)
    laptop.sana("models", "pull", "someone/loras")
    assert {name for _, name, _ in hub.requests} <= {""}, "the file is not fetched again"
    assert "ok" in laptop.sana("models", "verify", "someone/loras").stdout
    laptop.sana("models", "rm", "-y", "someone/loras")
    assert not laptop.blobs()


def test_pull_fetches_a_lora_by_its_file(laptop, loras):
    laptop.sana("models", "pull", "someone/loras/sub/other.safetensors")
    assert laptop.files("someone/loras") == {"sub/other.safetensors"}
    assert "ok" in laptop.sana("models", "verify", "someone/loras/sub/other.safetensors").stdout
    # That it is here does not make it the repository's only one.
    assert "not on this machine" in find(laptop, "someone/loras", "offline", code=5).stderr


def test_pefts_config_comes_with_its_file(laptop, loras):
    path = Path(find(laptop, "someone/peft:0.5").stdout.strip())
    assert path.name == "adapter_model.safetensors"
    assert path.with_name("adapter_config.json").read_text() == "{}"
    assert find(laptop, "someone/peft", "offline").stdout.strip() == str(path)


def test_a_lora_that_is_not_here_is_not_fetched_offline(laptop, hub, loras):
    said = find(laptop, "someone/loras", "offline", code=5).stderr
    assert "sana models pull someone/loras" in said
    assert hub.requests == []


@pytest.mark.parametrize(
    "words", [("generate", "a fox", "--dry-run"), ("batch", "a.txt", "--check")]
)
def test_a_dry_run_fetches_no_lora(laptop, hub, loras, words):
    (laptop.home / "a.txt").write_text("a fox")
    run = laptop.sana(*words, "-m", "demo", "--lora", "someone/loras", code=5)
    assert "sana models pull someone/loras" in polite(run)
    assert hub.requests == []


def test_a_lora_stays_on_the_commit_it_was_fetched_at(laptop, hub, loras):
    first = find(laptop, "someone/loras").stdout
    (loras / LORA).write_bytes(b"z" * 5000)
    hub.push("someone/loras", loras)
    assert find(laptop, "someone/loras").stdout == first
    assert "has changed" in laptop.sana("models", "pull", "someone/loras").stderr
    laptop.sana("models", "pull", "--update", "someone/loras")
    second = find(laptop, "someone/loras").stdout
    assert second != first
    assert Path(second.strip()).read_bytes() == b"z" * 5000


def test_a_damaged_lora_is_never_used(laptop, hub, loras):
    hub.faults[LORA] = Fault(corrupt=True, times=99)
    assert "arrived damaged twice" in find(laptop, "someone/loras", code=5).stderr
    assert LORA not in laptop.files("someone/loras")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("someone/several", "name one: OWNER/NAME/FILE"),
        ("someone/several/c.safetensors", "it has a.safetensors, b.safetensors"),
        ("someone/pickles", "only pickles"),
        (OWN.repo, "a whole model, not a LoRA"),
        ("nobody/nothing", "no repository"),
    ],
)
def test_a_repository_without_one_lora_is_explained(laptop, hub, tmp_path, name, says):
    for repo, files in (("several", ("a.safetensors", "b.safetensors")), ("pickles", ("a.bin",))):
        folder = tmp_path / repo
        folder.mkdir()
        for file in files:
            (folder / file).write_bytes(b"x")
        hub.push(f"someone/{repo}", folder)
    assert says in find(laptop, name, code=5).stderr


def test_a_name_outside_the_folder_is_not_fetched(laptop, hub, loras):
    files = hub.repos["someone/loras"].commits[hub.repos["someone/loras"].main]
    files["../../../outside.safetensors"] = files.pop(LORA)
    find(laptop, "someone/loras/../../../outside.safetensors", code=5)
    assert find(laptop, "someone/loras").stdout.strip().endswith("other.safetensors")
