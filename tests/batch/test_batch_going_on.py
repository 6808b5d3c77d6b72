"""A batch that is run again draws what is missing."""

import shutil
import subprocess
import sys
from pathlib import Path

from batches import DEMO, PROMPTS, lines, pictures
from sana_cli.weights.catalogue import known_models


def test_run_again_it_draws_what_is_missing_and_nothing_else(sana):
    first = sana("batch", "jobs.txt", *DEMO)
    before = pictures("jobs-images")
    again = sana("batch", "jobs.txt", *DEMO)
    assert (again.code, again.out) == (0, "")
    assert "3 were there" in again.err
    lost, changed, kept = first.out.split()
    Path(lost).unlink()
    Path(changed).write_bytes(b"edited")
    Path("jobs.txt").write_text("\n".join((*PROMPTS, "a pink cross on white")))
    again = sana("batch", "jobs.txt", *DEMO)
    assert [Path(path).name for path in again.out.split()[:2]] == [
        Path(lost).name,
        f"{Path(changed).stem}-2.png",
    ]
    assert len(again.out.split()) == 3
    assert Path(changed).read_bytes() == b"edited"
    assert Path(lost).read_bytes() == before[Path(lost).name]
    assert sana("batch", "jobs.txt", *DEMO).out == ""


def test_other_weights_in_a_folder_of_the_same_name_draw_other_jobs(sana):
    Path("jobs.txt").write_text(PROMPTS[0])
    words = ("batch", "jobs.txt", "--steps", "1", "-r", "128x128", "--fit", "exact", "-o", "out")
    shutil.copytree(known_models()["demo"].folder, "run1/model")
    assert sana(*words, "-m", "run1/model").code == 0
    for name in ("copied", "trained"):
        shutil.copytree("run1/model", f"{name}/model", copy_function=shutil.copy)
    weights = Path("trained/model/text_encoder/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-400] + bytes(400))
    run = sana(*words, "-m", "copied/model", "--check")
    assert (run.code, run.out) == (0, "1 job, 0 to draw into out\n")
    run = sana(*words, "-m", "trained/model", "--check")
    assert (run.code, run.out) == (0, "1 job, 1 to draw into out\n")


def test_a_restart_draws_all_again_in_place(sana):
    sana("batch", "jobs.txt", *DEMO)
    before = pictures("jobs-images")
    run = sana("batch", "jobs.txt", *DEMO, "--restart")
    assert len(run.out.split()) == 3
    assert pictures("jobs-images") == before
    assert len(lines("jobs-images", "done")) == 6


def test_the_file_of_someone_else_is_never_replaced_without_force(sana):
    Path("out").mkdir()
    Path("out/a-red-circle-on-white-1.png").write_text("mine")
    Path("one.txt").write_text(PROMPTS[0])
    run = sana("batch", "one.txt", *DEMO, "-s", "1", "-o", "out")
    assert run.out == "out/a-red-circle-on-white-1-2.png\n"
    assert sana("batch", "one.txt", *DEMO, "-s", "1", "-o", "out").out == ""
    run = sana("batch", "one.txt", *DEMO, "-s", "1", "-o", "out", "--restart", "--force")
    assert run.out == "out/a-red-circle-on-white-1.png\n"
    assert Path("out/a-red-circle-on-white-1.png").read_bytes()[:4] == b"\x89PNG"


def test_a_second_process_is_told_who_has_the_folder(sana, here):
    code = """
import sys, pathlib
from sana_cli.batch.manifest import Manifest
with Manifest(pathlib.Path("jobs-images")) as manifest:
    manifest.begin(jobs=3, todo=3)
    print("held", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        other.stdout.readline()
        run = sana("batch", "jobs.txt", *DEMO)
        assert (run.code, run.out) == (1, "")
        assert f"jobs-images is in use by process {other.pid} on" in run.err
        status = sana("batch", "status", "jobs-images")
        assert f"running: process {other.pid}" in status.out
        other.kill()
    assert sana("batch", "jobs.txt", *DEMO).code == 0
