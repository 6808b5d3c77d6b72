"""What fails stops nothing else."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from batches import DEMO, PROMPTS, events, lines, pictures
from examples import exhaustive
from sana_cli.errors import NotEnoughMemory
from sana_cli.pipeline.plan import make_plan


def test_bad_jobs_do_not_stop_the_others(sana, broken, tiny_model, here):
    rows = [
        {"prompt": "a fox", "model": str(broken), "instruction": False},
        {"prompt": PROMPTS[0], "model": "demo"},
        {"prompt": "an owl", "model": str(broken), "instruction": False},
    ]
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = sana("batch", "jobs.jsonl", "--steps", "1", "--json")
    assert run.code == 3
    found = events(run.out)
    assert [e["event"] for e in found] == ["plan", "error", "error", "image", "summary"]
    assert [(e["row"], e["exit_code"]) for e in found if e["event"] == "error"] == [(1, 7), (3, 7)]
    assert "jobs.jsonl, row 1: seed" in run.err and "NaN" in run.err
    last = found[-1]
    assert (last["drawn"], last["failed"], last["left"], last["exit_code"]) == (1, 2, 0, 3)
    # They are not tried again unless asked, and are not forgotten.
    run = sana("batch", "jobs.jsonl", "--steps", "1")
    assert (run.code, run.out) == (3, "")
    assert "--retry-failed" in run.err
    status = sana("batch", "status", "jobs-images")
    assert status.code == 3
    assert status.out.splitlines()[0] == "1 done, 2 failed"
    assert "row 3: seed" in status.out
    # Other weights under the same name draw other jobs, which have not failed.
    shutil.rmtree(broken)
    shutil.copytree(tiny_model, broken)
    run = sana("batch", "jobs.jsonl", "--steps", "1")
    assert (run.code, len(run.out.split())) == (0, 2), run.err


def test_a_batch_stops_after_the_failures_that_are_allowed(sana, broken):
    Path("jobs.txt").write_text("\n".join(f"fox {i}" for i in range(5)))
    words = ("-m", str(broken), "--steps", "1", "--no-instruction", "--max-failures", "2")
    run = sana("batch", "jobs.txt", *words)
    assert run.code == 3
    assert len(lines("jobs-images", "failed")) == 2
    assert "stopped after 2 failures" in run.err and "3 left" in run.err


def test_weights_that_cannot_be_used_fail_their_jobs_only(sana, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "cut"))
    weights = model / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    rows = [{"prompt": f"fox {i}", "model": str(model)} for i in range(4)]
    rows.append({"prompt": PROMPTS[0], "model": "demo"})
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = sana("batch", "jobs.jsonl", "--steps", "1")
    assert (run.code, len(run.out.split())) == (3, 1)
    assert len(lines("jobs-images", "failed")) == 4


def test_too_little_memory_for_any_job_is_no_fault_of_the_jobs(sana):
    run = sana("batch", "jobs.txt", *DEMO, "--memory", "60MB", "--json")
    assert run.code == 4
    assert [event["event"] for event in events(run.out)] == ["plan", "summary"]
    assert "more than the 60.0 MB" in run.err
    assert not lines("jobs-images", "failed")
    assert sana("batch", "jobs.txt", *DEMO).code == 0


def test_too_little_memory_for_one_kind_of_job_fails_that_kind(sana, monkeypatch):
    def short(recipes, *given, **words):
        if any(recipe.pag for recipe in recipes):
            raise NotEnoughMemory("the test's")
        return make_plan(recipes, *given, **words)

    monkeypatch.setattr("sana_cli.pipeline.plan.make_plan", short)
    rows = [{"prompt": PROMPTS[0], "pag": scale} for scale in (0, 3, 0, 2)]
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = sana("batch", "jobs.jsonl", *DEMO)
    assert (run.code, len(run.out.split())) == (3, 2)
    assert len(lines("jobs-images", "failed")) == 2


@pytest.mark.parametrize("after", [4, *exhaustive(0, 2, 6, 8)])
def test_a_full_disk_ends_it_with_nothing_lost(sana, monkeypatch, after):
    expected = sana("batch", "jobs.txt", *DEMO, "-o", "whole").out
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        run = sana("batch", "jobs.txt", *DEMO)
    assert run.code == 6, run.err
    assert len([line for line in run.err.splitlines() if line.startswith("error:")]) == 1
    assert not list(Path("jobs-images").glob("*.partial"))
    for path in run.out.split():
        with Image.open(path) as picture:
            picture.load()
    again = sana("batch", "jobs.txt", *DEMO)
    assert again.code == 0
    assert len(run.out.split()) + len(again.out.split()) <= 3
    assert pictures("jobs-images") == pictures("whole")
    assert len(expected.split()) == 3
