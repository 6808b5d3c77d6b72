"""What version 0.1 wrote is still read: recipes in images, manifests, kept benchmarks."""

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from sana_cli.bench.baseline import read_baseline

WRITTEN = Path(__file__).with_name("version_0_1")


def test_its_images_tell_their_recipes_and_are_drawn_again(sana, tmp_path):
    old, new = WRITTEN / "circle.png", tmp_path / "again.png"
    shown = sana("info", "--json", str(old))
    assert shown.code == 0, shown.err
    (image,) = json.loads(shown.out)["images"]
    assert (image["recipe"]["seed"], image["recipe"]["steps"]) == (7, 2)
    run = sana("generate", "--from", str(old), "-o", str(new))
    assert run.code == 0, run.err
    with Image.open(old) as before, Image.open(new) as after:
        off = np.abs(np.asarray(before).astype(int) - np.asarray(after))
        assert off.max() <= 1, "equal up to the rounding of another processor"
        recipes = [json.loads(one.text["sana"])["recipe"] for one in (before, after)]
    assert recipes[0] == recipes[1]


def test_its_batches_go_on_where_they_ended(sana, tmp_path, monkeypatch):
    shutil.copytree(WRITTEN, tmp_path / "x")
    monkeypatch.chdir(tmp_path / "x")
    words = ("batch", "shapes.txt", "-m", "demo", "--res", "256", "--steps", "2", "-o", "shapes")
    assert sana(*words, "--check").out == "2 jobs, 0 to draw into shapes\n"
    status = sana("batch", "status", "shapes", "--json")
    assert (status.code, json.loads(status.out)["done"]) == (0, 2)
    (tmp_path / "x" / "shapes.txt").write_text("a blue star on white\na green ring\na red hill\n")
    assert sana(*words, "--check").out == "3 jobs, 1 to draw into shapes\n"


def test_its_benchmarks_can_be_compared_with():
    assert read_baseline(WRITTEN / "bench.json")["sizes"][0]["model"] == "demo"
