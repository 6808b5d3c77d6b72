"""Image-to-image against diffusers' parts, and repainting against its own algebra."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from diffusers.image_processor import PixArtImageProcessor
from PIL import Image

from reference import assert_same_picture, random_pipeline
from sana_cli.pipeline.solver import SOLVERS, Repaint, advance

CALL = ("--no-instruction", "--steps", "8", "-s", "7", "--dtype", "float32", "--fit", "exact")


def photo(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    rgb = np.stack([np.sin(9 * x) * 0.5 + 0.5, y, (x + y > 0.7) * 0.9], axis=-1)
    return (rgb * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repaint") / "model"
    random_pipeline(sample_size=16).save_pretrained(folder)
    return folder


def reference(folder: Path, image: np.ndarray, strength: float, solver: str) -> np.ndarray:
    """What diffusers' networks and schedulers draw from an image, begun at its noise level."""
    pipe = SanaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if solver == "flow-euler":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift)
    height, width = image.shape[:2]
    pixels = PixArtImageProcessor(vae_scale_factor=32).preprocess(Image.fromarray(image))
    latents = pipe.vae.encode(pixels).latent * pipe.vae.config.scaling_factor
    shape = (1, 32, height // 32, width // 32)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    pipe.scheduler.set_timesteps(8)
    first = int(8 - 8 * strength)
    sigma = pipe.scheduler.sigmas[first]
    start = torch.lerp(latents, noise, sigma)
    timesteps = pipe.scheduler.timesteps[first:]
    pipe.scheduler.set_begin_index(first)
    embeds = pipe.encode_prompt(
        "a fox", True, negative_prompt="", complex_human_instruction=None, max_sequence_length=300
    )
    prompt, mask, negative, negative_mask = embeds
    sample = start
    for t in timesteps:
        both = torch.cat([sample] * 2)
        with torch.no_grad():
            velocity = pipe.transformer(
                both,
                encoder_hidden_states=torch.cat([negative, prompt]),
                encoder_attention_mask=torch.cat([negative_mask, mask]),
                timestep=t.expand(2),
            ).sample.float()
        without, given = velocity.chunk(2)
        velocity = without + 4.5 * (given - without)
        sample = pipe.scheduler.step(velocity, t, sample, return_dict=False)[0]
    with torch.no_grad():
        drawn = pipe.vae.decode(sample / pipe.vae.config.scaling_factor).sample
    return np.asarray(pipe.image_processor.postprocess(drawn, output_type="pil")[0])


@pytest.mark.parametrize("solver", ["flow-dpm", "flow-euler"])
@pytest.mark.parametrize("strength", [0.25, 0.6, 1.0])
def test_an_image_is_the_start_for_both_flow_solvers(model, sana, tmp_path, solver, strength):
    image = photo(256, 320)
    Image.fromarray(image).save(tmp_path / "in.png")
    words = ("-m", str(model), *CALL, "-r", "320x256", "--solver", solver, "-o", "out.png")
    words += ("--image", str(tmp_path / "in.png"), "--strength", str(strength))
    run = sana("generate", "a fox", *words, "-o", str(tmp_path / "out.png"))
    assert run.code == 0, run.err
    ours = np.asarray(Image.open(tmp_path / "out.png"))
    assert_same_picture(ours, reference(model, image, strength, solver))


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_kept_follows_its_own_noised_image_to_the_end(solver):
    """Outside the mask every step lands on (1-σ)·z + σ·noise, whatever the network says there."""
    torch.manual_seed(0)
    z, noise = torch.randn(2, 1, 32, 4, 4)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 2:] = 1
    steps = 6
    schedule = SOLVERS[solver].schedule(steps, None if solver == "scm" else 3.0)
    x, previous = torch.lerp(z, noise, schedule.sigmas[0]), None
    free, before = x.clone(), None
    for i in range(steps):
        update = SOLVERS[solver].update(schedule, i)
        fresh = torch.randn_like(z) if SOLVERS[solver].stochastic else None
        velocity = torch.randn_like(z)
        x, previous = advance(update, x, velocity, previous, fresh, Repaint(z, mask))
        free, before = advance(update, free, velocity, before, fresh)
        sigma = schedule.sigmas[i + 1]
        kept = torch.lerp(z, noise if fresh is None else fresh, sigma)
        torch.testing.assert_close(x[..., :2], kept[..., :2], rtol=1e-4, atol=1e-5)
        # Inside, the mask changes nothing: the history of a multistep solver stays clean.
        torch.testing.assert_close(x[..., 2:], free[..., 2:])
    assert torch.equal(x[..., :2], z[..., :2])


@pytest.fixture
def scene(tmp_path) -> np.ndarray:
    image = photo(512, 512)
    Image.fromarray(image).save(tmp_path / "scene.png")
    mask = np.zeros((512, 512), np.uint8)
    mask[200:300, 100:180] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return image


DEMO = ("-m", "demo", "--steps", "2", "-s", "3")


def test_every_pixel_outside_the_repainted_cells_is_the_input_s_own(sana, tmp_path, scene):
    words = ("--image", str(tmp_path / "scene.png"), "--mask", str(tmp_path / "mask.png"))
    out = tmp_path / "out.png"
    run = sana("generate", "a balloon", *DEMO, *words, "-o", str(out))
    assert run.code == 0, run.err
    assert "white is repainted" in run.err
    drawn = np.asarray(Image.open(out))
    kept = np.ones((512, 512), bool)
    kept[192:320, 64:192] = False  # the cells that the mask and its feather touch
    assert (drawn[kept] == scene[kept]).all()
    assert (drawn[200:300, 100:180] != scene[200:300, 100:180]).any(-1).mean() > 0.9
    recipe = json.loads(Image.open(out).text["sana"])["recipe"]
    assert recipe["strength"] == 1 and len(recipe["mask"]) == 64
    again = tmp_path / "again.png"
    assert sana("generate", "--from", str(out), *words, "-o", str(again)).code == 0
    assert again.read_bytes() == out.read_bytes()


def test_outpainting_keeps_the_image_and_paints_around_it(sana, tmp_path, scene):
    out = tmp_path / "out.png"
    words = ("--image", str(tmp_path / "scene.png"), "--outpaint", "64,0,0,64", "--fit", "exact")
    run = sana("generate", "a balloon", *DEMO, *words, "-o", str(out))
    assert run.code == 0, run.err
    drawn = np.asarray(Image.open(out))
    assert drawn.shape == (576, 576, 3)
    inner = 32  # one cell of overlap
    assert (drawn[: 512 - inner, 64 + inner :] == scene[: 512 - inner, inner:]).all()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--mask", "mask.png"), "--mask has no effect without --image"),
        (("--outpaint", "8"), "--outpaint has no effect without --image"),
        (("--image-fit", "pad"), "--image-fit has no effect without --image"),
        (("--image", "scene.png", "--mask", "small.png"), "--mask is 8x8 and --image 512x512"),
        (("--image", "scene.png", "--mask", "alpha"), "has no transparent part"),
        (("--image", "scene.png", "--outpaint", "x"), "--outpaint 'x' does not say"),
        (("--image", "scene.png", "--outpaint", "99999"), "pixels; at most 134 million are taken"),
        (("--image", "scene.png", "--image-fit", "tile"), "tile"),
        (("--image", "scene.png", "--image", "small.png"), "--image is given twice"),
        (("--control", "scene.png", "--control", "small.png"), "--control is given twice"),
    ],
)
def test_combinations_that_cannot_work_are_refused_before_weights_load(
    sana, tmp_path, scene, monkeypatch, words, says
):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8), 255).save("small.png")
    run = sana("generate", "a fox", *DEMO, *words)
    assert run.code == 2
    assert says in run.err
