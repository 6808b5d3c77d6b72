"""`sana models`: what is here, whether it is whole, and its removal."""

import json

import pytest

from laptop import NAME, OWN, TRANSFORMER, assert_whole, polite
from sana_cli.weights.catalogue import known_models
from terminal import at_terminal


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


@pytest.mark.parametrize("answer", [b"n\n", b"\x04"], ids=["no", "end-of-input"])
def test_rm_does_nothing_when_the_answer_is_no(laptop, answer):
    laptop.pull()
    code, seen, _ = at_terminal(laptop.command("models", "rm", NAME), typed=answer, env=laptop.env)
    assert code == 1 and b"nothing was removed" in seen
    assert laptop.row()["cached"]


@pytest.mark.parametrize("verb", ["pull", "verify", "rm"])
def test_the_bundled_model_needs_none_of_this(laptop, verb):
    assert "demo is not from the hub" in polite(laptop.sana("models", verb, "demo", code=2))


@pytest.mark.parametrize("verb", ["pull", "verify", "rm"])
def test_a_misspelt_model_brings_a_suggestion(laptop, verb):
    said = polite(laptop.sana("models", verb, "sana-0.6b-51", code=2))
    assert f"did you mean {NAME}" in said
