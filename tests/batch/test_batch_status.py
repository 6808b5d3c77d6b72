"""What is known of a batch afterwards."""

import json
from pathlib import Path

from batches import DEMO, pictures


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


def test_status_of_no_batch_is_refused(sana):
    run = sana("batch", "status", "nowhere")
    assert run.code == 2 and "no manifest" in run.err
    assert not Path("nowhere").exists()
