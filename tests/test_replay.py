"""`sana generate --from IMAGE`: the same pixels again, or with something changed."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from recipes import RECIPE
from sana_cli.replay import command_of

FAST = ("-m", "demo", "-r", "256", "--steps", "2", "--dtype", "float32")


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def drawn(sana, tmp_path, monkeypatch):
    """Draw with some options; the path of the picture."""
    monkeypatch.chdir(tmp_path)

    def draw(*words: str, name: str = "one.png") -> str:
        run = sana("generate", *FAST, *words, "-o", name, "-f")
        assert run.code == 0, run.err
        return run.out.strip()

    return draw


@pytest.mark.parametrize(
    "words",
    [
        ("a red circle on white", "-s", "7"),
        ("a red circle on white", "-s", "7", "--negative", "blue", "-g", "3", "--instruction"),
        ("a red circle on white", "-s", "7", "--solver", "flow-euler", "--res", "220x240"),
        ("a red circle on white", "-s", "7", "--res", "300x250", "--fit", "exact"),
        ("--dtype", "bfloat16", "a red circle on white", "--text-precision", "fp32"),
        ('a "quoted" prompt,\nNegative prompt: not one\nSteps: 3, Seed: 4 🦊',),
    ],
    ids=["plain", "guided", "resized", "exact", "precision", "odd-prompt"],
)
def test_the_same_pixels_again(sana, drawn, words):
    path = drawn(*words)
    run = sana("generate", "--from", path, "-o", "two.png")
    assert run.code == 0, run.err
    # The odd prompt alone has words that demo does not know.
    assert run.err.count("warning") == run.err.count("was not trained on") == ("quoted" in words[0])
    assert np.array_equal(pixels("two.png"), pixels(path))


@pytest.mark.parametrize("format", ["jpeg", "webp", "avif"])
def test_from_every_format(sana, drawn, format):
    drawn("a red circle on white", "-s", "7")
    drawn("a red circle on white", "-s", "7", name=f"one.{format}")
    assert sana("generate", "--from", f"one.{format}", "-o", "two.png").code == 0
    assert np.array_equal(pixels("two.png"), pixels("one.png"))


def test_any_option_and_the_prompt_override(sana, drawn):
    path = drawn("a red circle on white", "-s", "7", "--negative", "blue")
    words = ("generate", "--from", path, "a green star", "--steps", "3", "--seed", "8", "--dry-run")
    (recipe,) = json.loads(sana(*words).out)["recipes"]
    assert recipe["prompt"] == "a green star"
    assert (recipe["steps"], recipe["seed"], recipe["negative"]) == (3, 8, "blue")


def test_another_model_brings_its_own_size_and_settings(sana, drawn):
    path = drawn("a red circle on white", "-s", "7")
    words = ("generate", "--from", path, "-m", "sana-sprint-0.6b", "--dry-run")
    (recipe,) = json.loads(sana(*words).out)["recipes"]
    assert (recipe["width"], recipe["steps"], recipe["solver"]) == (1024, 2, "scm")
    assert (recipe["prompt"], recipe["seed"]) == ("a red circle on white", 7)


def test_several_pictures_from_one(sana, drawn):
    path = drawn("a red circle on white", "-s", "7")
    run = sana("generate", "--from", path, "-s", "1..3", "--dry-run")
    assert [recipe["seed"] for recipe in json.loads(run.out)["recipes"]] == [1, 2, 3]


def test_the_text_of_another_tool_as_far_as_it_goes(sana, tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text(
        "parameters",
        "a red circle on white\nNegative prompt: blue\n"
        "Steps: 12, Sampler: Euler, CFG scale: 3.5, Seed: 99, Size: 256x256, Model: sdxl, Hires: 2",
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png", pnginfo=info)
    run = sana("generate", "--from", str(tmp_path / "other.png"), "-m", "demo", "--dry-run")
    (recipe,) = json.loads(run.out)["recipes"]
    assert (recipe["prompt"], recipe["negative"]) == ("a red circle on white", "blue")
    assert recipe["seed"] == 99


def test_a_changed_model_is_said_aloud(sana, drawn):
    from sana_cli.images.metadata import read

    path = drawn("a red circle on white", "-s", "7")
    recipe = read(path).recipe | {"flow_shift": 6.0}
    info = PngImagePlugin.PngInfo()
    info.add_text("sana", json.dumps({"recipe": recipe, "made": {}}))
    Image.new("RGB", (8, 8)).save("other.png", pnginfo=info)
    run = sana("generate", "--from", "other.png", "--dry-run")
    assert "warning: flow_shift is 3.0, and was 6.0 for the image" in run.err


def test_a_picture_drawn_from_a_picture_needs_it_again(sana, tmp_path):
    recipe = {"prompt": "a fox", "model": "sana-sprint-0.6b", "image": "0" * 64, "strength": 0.5}
    info = PngImagePlugin.PngInfo()
    info.add_text("sana", json.dumps({"recipe": recipe, "made": {}}))
    path = tmp_path / "one.png"
    Image.new("RGB", (64, 64)).save(path, pnginfo=info)
    run = sana("generate", "--from", str(path), "--dry-run")
    assert run.code == 2
    assert "hint: add --image FILE" in run.err
    run = sana("generate", "--from", str(path), "--image", str(path), "--dry-run")
    assert run.code == 0
    assert "warning: image is" in run.err


@pytest.mark.parametrize("kind", ["absent", "no-picture", "no-recipe"])
def test_what_holds_no_recipe_is_one_line(sana, tmp_path, kind):
    path = tmp_path / "x.png"
    if kind == "no-picture":
        path.write_text("hello")
    elif kind == "no-recipe":
        Image.new("RGB", (8, 8)).save(path)
    run = sana("generate", "--from", str(path))
    assert run.code == (1 if kind == "no-recipe" else 2)
    assert run.err.startswith("error: ")
    assert "Traceback" not in run.err


def test_the_command_has_a_place_for_every_file_of_the_recipe():
    hashes = {"image": "a" * 64, "mask": "b" * 64, "control": "c" * 64, "strength": 1.0}
    loras = f"{'d' * 64}:0.5,{'e' * 64}:1.0"
    line, remarks = command_of(replace(RECIPE, lora=loras, **hashes).as_dict())
    files = "--image IMAGE --mask MASK --control CONTROL --lora LORA:0.5 --lora LORA:1.0"
    assert f"sana generate 'a red circle' {files} " in line
    assert [one for one in remarks if "replace LORA by the LoRA" in one]
    assert [one for one in remarks if "replace MASK by the mask" in one]
    assert "--mask" not in command_of(RECIPE.as_dict())[0]


@pytest.mark.parametrize("role", ["image", "control"])
def test_the_command_fits_its_image_as_before(role):
    line, _ = command_of(replace(RECIPE, **{role: "a" * 64, "image_fit": "pad"}).as_dict())
    assert "--image-fit pad" in line
