"""The lock keeps a model on the commit it was fetched at, until `--update`."""

import json
import shutil

import pytest

from laptop import NEEDED, OWN, TRANSFORMER, polite
from sana_cli.weights.catalogue import known_models

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
