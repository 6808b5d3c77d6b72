"""Perturbed-attention guidance draws what diffusers' SanaPAGPipeline draws."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaPAGPipeline
from PIL import Image

from reference import assert_same_picture, random_pipeline
from sana_cli.pipeline.draw import ImageDone
from sana_cli.session import Session
from sana_cli.settings import Settings

CALL = ("-s", "7", "--steps", "4", "-r", "320x256", "--fit", "exact", "--no-instruction")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pag") / "model"
    random_pipeline(sample_size=16, num_layers=4).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("layer", "guidance", "adaptive"), [(0, 4.5, 0.0), (2, 4.5, 0.004), (3, 1.0, 0.0)]
)
def test_it_is_that_of_diffusers(model, sana, tmp_path, layer, guidance, adaptive):
    pipe = SanaPAGPipeline.from_pretrained(model, pag_applied_layers=f"transformer_blocks.{layer}")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        "a fox",
        num_inference_steps=4,
        guidance_scale=guidance,
        pag_scale=3.0,
        pag_adaptive_scale=adaptive,
        width=320,
        height=256,
        generator=torch.Generator().manual_seed(7),
        use_resolution_binning=False,
        complex_human_instruction=None,
    ).images[0]
    out = tmp_path / "out.png"
    words = ("-g", str(guidance), "--pag", "3", "--pag-layer", str(layer))
    words += ("--pag-adaptive", str(adaptive)) if adaptive else ()
    run = sana("generate", "a fox", "-m", str(model), *CALL, *words, "-o", str(out))
    assert run.code == 0, run.err
    assert_same_picture(np.asarray(Image.open(out)), np.asarray(theirs))
    recipe = json.loads(Image.open(out).text["sana"])["recipe"]
    assert (recipe["pag"], recipe["pag_layer"]) == (3.0, layer)
    again = tmp_path / "again.png"
    assert sana("generate", "--from", str(out), "-m", str(model), "-o", str(again)).code == 0


def test_it_is_drawn_the_same_in_small_pieces(model):
    session = Session(cache=False)
    settings = Settings("a fox", model=str(model), res="320x256", fit="exact", steps=2, pag=3.0)
    request = session.request([settings], [7])
    plan = session.plan(request)
    images = []
    for one in (plan, replace(plan, batched_cfg=False), replace(plan, row_chunk=2)):
        (pixels,) = (e.pixels for e in session.draw(request, one) if isinstance(e, ImageDone))
        images.append(pixels.astype(int))
    assert all(np.abs(other - images[0]).max() <= 1 for other in images)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--pag-layer", "3"), "--pag-layer has no effect without --pag"),
        (("--pag", "3", "--pag-layer", "4"), "--pag-layer 4: "),
        (("--pag", "-1"), "--pag -1"),
        (("--pag", "3", "-m", "sana-sprint-0.6b", "--offline"), "cannot use --pag"),
    ],
)
def test_what_cannot_be_perturbed_is_refused(model, sana, words, says):
    chosen = () if "-m" in words else ("-m", str(model))
    run = sana("generate", "a fox", *chosen, *words)
    assert run.code == 2
    assert says in run.err
