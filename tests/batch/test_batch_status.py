"""What is known of a batch afterwards."""

import json
import signal
import sys
from pathlib import Path

import pytest

from batches import DEMO, PROMPTS, lines, pictures, started
from sana_cli.batch.manifest import Manifest
from sana_cli.batch.shards import parse_shard


def test_status_tells_which_shards_to_run_again(sana):
    assert sana("batch", "jobs.txt", *DEMO, "-n", "4", "--shard", "2/3", "-o", "out").code == 0
    run = sana("batch", "status", "out", "--json")
    document = json.loads(run.out)
    assert run.code == 3
    assert document["resubmit"] == ["1/3", "3/3"]
    assert document["done"] == len(pictures("out")) > 0
    for shard in document["resubmit"]:
        assert sana("batch", "jobs.txt", *DEMO, "-n", "4", "--shard", shard, "-o", "out").code == 0
    run = sana("batch", "status", "out")
    assert (run.code, run.out) == (0, "12 done\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_an_image_of_a_killed_run_is_none_of_those_that_the_next_run_has_drawn(sana, program):
    Path("first.txt").write_text(PROMPTS[0])
    assert sana("batch", "first.txt", *DEMO, "-o", "out").code == 0
    manifest = Path("out/manifest.jsonl")
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    assert not lines("out", "done"), "as a run leaves it that was killed before this line"
    with started(program, "jobs.txt", *DEMO, "-n", "20", "-o", "out", "-q") as process:
        assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    run = sana("batch", "status", "out", "--json")
    document = json.loads(run.out)
    assert run.code == 3
    assert document["done"] >= 2 and document["done"] + document["left"] == 60


@pytest.mark.parametrize(
    ("before", "after"), [(None, ["1/2", "2/2"]), ("1/3", [None])], ids=["shards", "whole"]
)
def test_what_another_division_of_the_work_had_left_is_not_left_when_all_is_done(
    sana, before, after
):
    with Manifest(Path("out"), parse_shard(before, {}) if before else None) as manifest:
        manifest.begin(jobs=3, todo=3, file="jobs.txt", shard=before)  # and is killed
    assert sana("batch", "status", "out").code == 3
    for shard in after:
        words = ("--shard", shard) if shard else ()
        assert sana("batch", "jobs.txt", *DEMO, *words, "-o", "out").code == 0
    run = sana("batch", "status", "out")
    assert (run.code, run.out) == (0, "3 done\n")


def test_status_of_no_batch_is_refused(sana):
    run = sana("batch", "status", "nowhere")
    assert run.code == 2 and "no manifest" in run.err
    assert not Path("nowhere").exists()
