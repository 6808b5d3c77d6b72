"""LoRAs fetched from a hub by their repository or by their file."""

import subprocess
import sys
from pathlib import Path

import pytest

from hub import Fault
from laptop import OWN, Laptop, polite

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
