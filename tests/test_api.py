"""Sana from Python: the same pictures as from the shell, as Pillow images with recipes."""

import copy
import inspect
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import MISSING, fields

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from hub import Hub
from sana_cli import Pipeline, SanaError, SanaImage
from sana_cli.errors import BadImage, MissingModel, UsageError
from sana_cli.images.metadata import recipe_of
from sana_cli.pipeline.events import Progress
from sana_cli.settings import Settings
from sana_cli.system.signals import exit_by_exception
from terminal import at_terminal

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def circle() -> SanaImage:
    return Pipeline("demo", cache=False).generate(PROMPT, seed=7, steps=4)[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ()),
        ({"negative": "blue", "guidance": 3.0}, ("--negative", "blue", "-g", "3")),
        ({"res": "220x240", "solver": "flow-euler"}, ("-r", "220x240", "--solver", "flow-euler")),
        (
            {"res": 256, "ar": "4:3", "fit": "exact", "instruction": True},
            ("-r", "256", "--ar", "4:3", "--fit", "exact", "--instruction"),
        ),
    ],
    ids=["plain", "guided", "resized", "shaped"],
)
def test_a_saved_picture_is_the_file_that_the_command_writes(sana, tmp_path, settings, words):
    one, other = tmp_path / "python.png", tmp_path / "shell.png"
    Pipeline("demo").generate(PROMPT, seed=7, steps=2, **settings)[0].save(one)
    run = sana("generate", PROMPT, "-m", "demo", "-s7", "--steps", "2", *words, "-o", str(other))
    assert run.code == 0, run.err
    assert one.read_bytes() == other.read_bytes()


def test_every_setting_can_be_given_and_has_the_same_default():
    given = {
        name: parameter.default
        for call in (Pipeline, Pipeline.generate)
        for name, parameter in inspect.signature(call).parameters.items()
    }
    for setting in fields(Settings):
        expected = inspect.Parameter.empty if setting.default is MISSING else setting.default
        assert given[setting.name] == expected, setting.name


def test_all_seeds_of_a_prompt_come_before_the_next_prompt():
    pictures = Pipeline("demo").generate(["a red star", "a blue ring"], seed=[5, 2], steps=1)
    told = [(picture.recipe.prompt, picture.recipe.seed) for picture in pictures]
    assert told == [("a red star", 5), ("a red star", 2), ("a blue ring", 5), ("a blue ring", 2)]
    alone = Pipeline("demo").generate("a blue ring", seed=5, steps=1)[0]
    assert alone.tobytes() == pictures[2].tobytes()
    assert alone.recipe == pictures[2].recipe


@pytest.mark.parametrize(
    ("seed", "expected"), [("17", [17]), ("1..3", [1, 2, 3]), (np.int64(7), [7]), ((5, 2), [5, 2])]
)
def test_seeds_are_numbers_or_what_the_option_takes(tiny_model, seed, expected):
    images = Pipeline(tiny_model).generate("a", seed=seed, steps=1, res="64x64")
    assert [image.recipe.seed for image in images] == expected


def test_seeds_are_counted_up_and_a_random_one_is_in_the_recipe():
    first, second = Pipeline("demo").generate("a red star", count=2, steps=1)
    assert second.recipe.seed == first.recipe.seed + 1
    again = Pipeline("demo").generate("a red star", seed=first.recipe.seed, steps=1)[0]
    assert again.tobytes() == first.tobytes()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.avif"])
def test_files_hold_the_recipe(circle, tmp_path, name):
    circle.save(tmp_path / name)
    assert recipe_of(str(tmp_path / name)) == (circle.recipe.as_dict(), [])


def test_the_format_can_be_given_as_pillow_takes_it(circle, tmp_path):
    stream = io.BytesIO()
    circle.save(stream, "PNG")
    stream.seek(0)
    with Image.open(stream) as image:
        assert json.loads(image.text["sana"])["recipe"] == circle.recipe.as_dict()
    circle.save(tmp_path / "a.bmp")  # has no room for a recipe
    with Image.open(tmp_path / "a.bmp") as image:
        assert image.tobytes() == circle.tobytes()


@pytest.mark.parametrize(("name", "word"), [("a.png", "pnginfo"), ("a.webp", "exif")])
def test_the_recipe_can_be_left_out(circle, tmp_path, name, word):
    circle.save(tmp_path / name, **{word: None if word == "pnginfo" else b""})
    assert PROMPT.encode() not in (tmp_path / name).read_bytes()
    with pytest.raises(SanaError, match="holds no recipe"):
        recipe_of(str(tmp_path / name))


def test_copies_and_other_modes_of_a_picture_keep_its_recipe(circle, tmp_path):
    for image in (circle.copy(), copy.copy(circle), circle.convert("L"), circle.convert("RGB")):
        image.save(tmp_path / "a.png")
        assert recipe_of(str(tmp_path / "a.png"))[0] == circle.recipe.as_dict()


def test_a_picture_with_other_pixels_has_no_recipe(circle):
    for image in (circle.resize((64, 64)), circle.crop((0, 0, 64, 64)), circle.rotate(90)):
        assert not isinstance(image, SanaImage)


def test_a_picture_travels_between_processes(circle):
    for other in (pickle.loads(pickle.dumps(circle)), copy.deepcopy(circle)):
        assert (other.recipe, other.tobytes()) == (circle.recipe, circle.tobytes())


def test_nothing_is_printed_and_progress_is_told(capfd):
    told = []
    Pipeline("demo", cache=False).generate("a red star", seed=1, steps=3, progress=told.append)
    assert capfd.readouterr() == ("", "")
    steps = [e for e in told if isinstance(e, Progress) and e.stage == "denoise"]
    assert [(event.done, event.total) for event in steps] == [(1, 3), (2, 3), (3, 3)]


def test_warnings_are_python_warnings(tiny_sprint):
    with pytest.warns(UserWarning, match="was made for 1 to 4 steps, not 5") as caught:
        Pipeline(tiny_sprint).generate("a fox", seed=1, steps=5, instruction=False)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("wrong", "kind", "says"),
    [
        (lambda: Pipeline("dmeo"), UsageError, "no model or folder is called 'dmeo'"),
        (lambda: Pipeline("demo", memory="much"), UsageError, "'much' is not an amount"),
        (lambda: Pipeline("demo").generate("a", steps=0), UsageError, "--steps 0"),
        (lambda: Pipeline("demo").generate("a", seed=-1), UsageError, "'-1' is not a seed"),
        (lambda: Pipeline("demo").generate("a", seed=[]), UsageError, "is not a seed"),
        (lambda: Pipeline("demo").generate("a", seed=[1, 2], count=2), UsageError, "--count"),
        (lambda: Pipeline("demo", dtype="half").generate("a"), UsageError, "'half' is not one of"),
        (lambda: Pipeline("demo", device="abacus").generate("a"), UsageError, "'abacus'"),
        (lambda: Pipeline("demo").generate("a", image="a.png"), UsageError, "a.png cannot be read"),
        (lambda: Pipeline("a/b", offline=True).generate("a"), MissingModel, "not on this machine"),
        (lambda: Pipeline("demo").generate("a", stpes=3), TypeError, "stpes"),
        (lambda: Pipeline("demo", devise="cpu"), TypeError, "devise"),
    ],
)
def test_what_is_wrong_is_said_by_its_kind(wrong, kind, says):
    with pytest.raises(kind, match=says):
        wrong()


def test_a_flat_picture_is_an_error(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "flat")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: 0 * tensor for name, tensor in tensors.items()}, weights, {"format": "pt"})
    with pytest.raises(BadImage, match="one flat colour") as caught:
        Pipeline(folder).generate("a fox", seed=1, steps=1, instruction=False)
    assert caught.value.hint


def test_a_program_keeps_its_own_ways_with_signals():
    before = signal.getsignal(signal.SIGINT)
    with exit_by_exception():
        assert signal.getsignal(signal.SIGINT) is before


def test_it_draws_in_a_thread(circle):
    drawn = []

    def work() -> None:
        drawn.extend(Pipeline("demo").generate(PROMPT, seed=7, steps=4))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert drawn[0].tobytes() == circle.tobytes()


BARS = """
from sana_cli import Pipeline
pipeline = Pipeline("demo", cache=False)
pipeline.generate("a red star", seed=1, steps=2, progress=False)
print("silent until here")
pipeline.generate("a red star", seed=1, steps=2)
"""


def test_bars_are_shown_on_a_terminal_unless_they_are_not_wanted():
    _, seen, _ = at_terminal([sys.executable, "-P", "-c", BARS], 80, 24)
    before, after = seen.split(b"silent until here")
    assert before == b""
    assert re.search(rb"denoise.*2/2", after)


def test_a_pipeline_and_a_picture_say_what_they_are(circle):
    assert repr(circle) == f"<SanaImage 512x512 RGB, demo, seed 7: '{PROMPT}'>"
    pipeline = Pipeline("demo", cache=False, device="cpu", dtype="float32")
    assert repr(pipeline) == "<Pipeline demo on cpu, dtype='float32': nothing loaded>"
    pipeline.generate("a red star", seed=1, steps=1, res=256)
    assert re.search("text_encoder, transformer, decoder loaded .* MB", repr(pipeline))


PROGRAM = """
import logging, sys
import sana_cli
assert not {"torch", "PIL", "numpy", "sana_cli.api"} & set(sys.modules)
from sana_cli import Pipeline, SanaError
assert not {"torch", "transformers", "diffusers"} & set(sys.modules)
logging.basicConfig(level="INFO", format="%(name)s %(message)s", stream=sys.stderr)
picture = Pipeline("someone/their-sana").generate("a fox", seed=1, steps=1, instruction=False)[0]
picture.save("fox.png")
print(picture.recipe.model, picture.recipe.revision)
"""


def test_weights_that_are_not_here_are_fetched(tiny_model, tmp_path):
    hub = Hub()
    commit = hub.push("someone/their-sana", tiny_model)
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "SANA_DATA_DIR": str(tmp_path / "data"),
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-P", "-c", PROGRAM]
    both = {"capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, **both)
    hub.close()
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"someone/their-sana {commit}\n"
    assert "sana_cli fetching someone/their-sana from" in done.stderr
    assert recipe_of(str(tmp_path / "fox.png"))[0]["revision"] == commit
