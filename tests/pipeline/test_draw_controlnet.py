"""ControlNet and other autoencoders through the command line draw what diffusers draws."""

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import SanaControlNetModel, SanaControlNetPipeline, SanaPipeline
from PIL import Image

from reference import (
    LIKE_1_6B,
    LITE,
    TEXT_WIDTH,
    assert_same_picture,
    draw,
    random_controlnet,
    random_pipeline,
)

CALL = ("-s", "7", "--steps", "3", "-r", "320x256", "--fit", "exact", "--no-instruction")
THEIRS = {"num_inference_steps": 3, "width": 320, "height": 256}
THEIRS |= {"use_resolution_binning": False, "complex_human_instruction": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("control")
    random_pipeline(sample_size=16, num_layers=4).save_pretrained(folder / "model")
    random_controlnet(num_layers=2).save_pretrained(folder / "controlnet")
    random_pipeline(vae=LITE).vae.save_pretrained(folder / "lite")
    narrow = SanaControlNetModel(num_layers=2, caption_channels=TEXT_WIDTH, **LIKE_1_6B)
    narrow.save_pretrained(folder / "narrow")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def scribble(tmp_path) -> Path:
    y, x = np.mgrid[0:256, 0:320]
    lines = (np.hypot(x - 160, y - 128) % 40 < 6) * 255
    path = tmp_path / "scribble.png"
    Image.fromarray(np.stack([lines] * 3, -1).astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize(("scale", "guidance"), [(1.0, 4.5), (0.4, 4.5), (1.0, 1.0)])
def test_a_control_image_steers_as_in_diffusers(folders, scribble, sana, tmp_path, scale, guidance):
    controlnet = SanaControlNetModel.from_pretrained(folders["controlnet"])
    pipe = SanaControlNetPipeline.from_pretrained(folders["model"], controlnet=controlnet)
    (theirs,) = draw(
        pipe,
        seeds=[7],
        prompt="a fox",
        control_image=Image.open(scribble),
        controlnet_conditioning_scale=scale,
        guidance_scale=guidance,
        **THEIRS,
    )
    out = tmp_path / "out.png"
    words = ("--control", str(scribble), "--controlnet", str(folders["controlnet"]))
    words += ("--control-scale", str(scale), "-g", str(guidance))
    run = sana("generate", "a fox", "-m", str(folders["model"]), *CALL, *words, "-o", str(out))
    assert run.code == 0, run.err
    assert_same_picture(np.asarray(Image.open(out)), theirs)
    assert "ControlNet controlnet at scale" in run.err
    recipe = json.loads(Image.open(out).text["sana"])["recipe"]
    assert recipe["control_scale"] == scale and len(recipe["control"]) == 64


def test_another_autoencoder_of_the_same_latents_decodes(folders, sana, tmp_path):
    pipe = SanaPipeline.from_pretrained(folders["model"])
    pipe.vae = type(pipe.vae).from_pretrained(folders["lite"])
    (theirs,) = draw(pipe, seeds=[7], prompt="a fox", **THEIRS)
    out = tmp_path / "out.png"
    words = ("-m", str(folders["model"]), *CALL, "--vae", str(folders["lite"]), "-o", str(out))
    run = sana("generate", "a fox", *words)
    assert run.code == 0, run.err
    assert_same_picture(np.asarray(Image.open(out)), theirs)
    assert json.loads(Image.open(out).text["sana"])["recipe"]["vae"] == "lite"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--control-scale", "2"), "--control-scale has no effect without --control"),
        (("--controlnet", "x"), "--controlnet has no effect without --control"),
        (("--control", "{scribble}"), "no ControlNet is known for"),
        (("--control", "{scribble}", "--controlnet", "nowhere"), "neither a name nor a folder"),
        (("--control", "{scribble}", "--controlnet", "{narrow}"), "has width"),
        (("--vae", "nowhere"), "neither a name nor a folder"),
        (("--control", "{scribble}", "-m", "sana-sprint-0.6b"), "has no ControlNet"),
    ],
)
def test_what_does_not_go_together_is_refused(folders, scribble, sana, words, says):
    names = {"scribble": scribble, **folders}
    words = [word.format(**names) for word in words]
    chosen = [] if "-m" in words else ["-m", str(folders["model"])]
    run = sana("generate", "a fox", *chosen, *words)
    assert run.code in (1, 2)
    assert says in run.err
