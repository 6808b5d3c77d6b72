"""The bundled model: draws what it is told, the same in diffusers, the same every time."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples import exhaustive
from reference import assert_same_picture, draw

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "sana_cli" / "demo"


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize(
    ("prompt", "shape", "colour", "ground"),
    [
        ("a red circle on a blue background", "circle", "red", "blue"),
        *exhaustive(("a large white star in the centre on purple", "star", "white", "purple")),
    ],
)
def test_it_draws_the_shape_it_is_told(sana, tmp_path, prompt, shape, colour, ground):
    from training.shape_checker import check
    from training.shapes import Object, Scene

    run = sana("generate", prompt, "-m", "demo", "-s", "1", "-o", f"{tmp_path}/")
    assert run.code == 0, run.err
    scene = Scene((Object(shape, colour, 0.5, 0.5, 0.2),), (ground,))
    verdict = check(scene, pixels(run.out.strip()))
    assert all(verdict.values()), verdict


@pytest.mark.parametrize(
    ("prompt", "facts"),
    [
        (
            "a red balloon over snowy mountains at sunset",
            {"kind 1": "balloon", "colour 1": "red", "land": "snowy mountains", "sky": "sunset"},
        ),
        *exhaustive(
            (
                "a blue house in front of hills at noon",
                {"kind 1": "house", "colour 1": "blue", "land": "hills", "sky": "noon"},
            ),
        ),
    ],
)
def test_it_draws_the_scene_it_is_told(sana, tmp_path, prompt, facts):
    from training.checker import check

    run = sana("generate", prompt, "-m", "demo", "--res", "512", "-s", "1", "-o", f"{tmp_path}/")
    assert run.code == 0, run.err
    drawn = pixels(run.out.strip())
    assert drawn.shape == (512, 512, 3)
    verdict = check({**facts, "count 1": "1"}, drawn)
    assert all(verdict.values()), verdict


@pytest.mark.parametrize(
    ("world", "side", "every", "least"),
    [("shapes", 256, 60, 4), *exhaustive(("shapes", 256, 15, 17), ("scenes", 512, 25, 17))],
)
def test_it_follows_most_prompts_it_was_not_trained_on(world, side, every, least):
    """A sample of `python -m training.evaluate`; the whole is in benchmarks/demo/."""
    from sana_cli.weights.layout import folder_parts
    from sana_cli.weights.model_files import open_model
    from training.evaluate import draw_images, recipe, scene_questions, shape_questions

    files = open_model(folder_parts(DEMO))
    ask = {"scenes": scene_questions, "shapes": shape_questions}[world]
    asked = list(enumerate(ask()))[::every]
    how = files.flow_shift, 20, 4.5
    drawn = draw_images([recipe(q.prompt, i, *how, side=side) for i, q in asked], files, "cpu")
    right = [all(q.judge(p).values()) for (_, q), p in zip(asked, drawn, strict=True)]
    assert len(right) == {60: 5, 15: 20, 25: 20}[every]
    assert sum(right) >= least


@pytest.mark.parametrize("side", [256, *exhaustive(512)])
def test_diffusers_loads_it_and_draws_the_same(sana, tmp_path, side):
    from diffusers import SanaPipeline

    prompt = "a green star above a white ring on a purple background"
    pipe = SanaPipeline.from_pretrained(DEMO, local_files_only=True).to(dtype=_float32())
    (theirs,) = draw(
        pipe,
        seeds=[3],
        prompt=prompt,
        height=side,
        width=side,
        use_resolution_binning=False,
        complex_human_instruction=None,
    )
    run = sana("generate", prompt, "-m", "demo", "-r", f"{side}", "-s", "3", "-o", f"{tmp_path}/")
    assert_same_picture(pixels(run.out.strip()), theirs)


def _float32():
    import torch

    return torch.float32


def test_seeds_differ_and_repeat(sana, tmp_path):
    words = ("-m", "demo", "-r", "256", "--steps", "6", "-s", "1,2", "--json")
    call = ("generate", "a heart", "a balloon over the sea", *words)
    first, again = (
        json.loads(sana(*call, "-o", f"{tmp_path}/{n}/").out)["images"] for n in ("a", "b")
    )
    assert len(first) == 4
    for one, other in zip(first, again, strict=True):
        assert Path(one["path"]).read_bytes() == Path(other["path"]).read_bytes()
    ones, twos = pixels(first[2]["path"]), pixels(first[3]["path"])
    assert np.abs(ones.astype(int) - twos).mean() > 5
    words = ("-m", "demo", "-r", "256", "--steps", "6", "-s", "2", "-o", f"{tmp_path}/c/")
    alone = sana("generate", "a balloon over the sea", *words)
    assert Path(alone.out.strip()).read_bytes() == Path(first[3]["path"]).read_bytes()


def test_it_is_small_and_needs_nothing_else():
    size = sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file())
    assert size <= 25e6
    assert not [name for name in os.listdir(DEMO) if name.endswith((".bin", ".pt"))]
