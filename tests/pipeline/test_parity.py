"""Same seed, same picture as diffusers, through the command line, for every kind of Sana."""

import inspect

import numpy as np
import pytest
from diffusers import SanaPipeline
from PIL import Image

from examples import exhaustive
from reference import LIKE_0_6B, LIKE_1_6B, LITE, assert_same_picture, draw, random_pipeline
from sana_cli.instruction import INSTRUCTION

MODELS = {
    "0.6B": {**LIKE_0_6B, "sample_size": 16},
    "1.6B": {**LIKE_1_6B, "sample_size": 32},
    "qk-norm": {**LIKE_1_6B, "sample_size": 32, "qk_norm": "rms_norm_across_heads"},
    "2K": {**LIKE_1_6B, "sample_size": 64, "interpolation_scale": 1.0},
    "4K": {**LIKE_1_6B, "sample_size": 128, "interpolation_scale": 2.0, "shift": 6.0},
    "DC-AE-Lite": {**LIKE_0_6B, "sample_size": 16, "vae": LITE},
    "dense time": {**LIKE_0_6B, "sample_size": 16, "timestep_scale": 0.001},
}
LONG = " ".join(f"a red circle number {i} on the left" for i in range(90))


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """name -> (folder, the diffusers pipeline that was saved there); built when asked for."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("parity") / name
            pipe = random_pipeline(**MODELS[name])
            pipe.save_pretrained(folder)
            made[name] = folder, pipe
        return made[name]

    return get


@pytest.fixture
def compare(models, sana, tmp_path):
    def run(name, words=(), seeds=(7,), prompt="A Red circle, left of a blue star", **call):
        folder, pipe = models(name)
        steps = str(call.setdefault("num_inference_steps", 2))
        call.setdefault("complex_human_instruction", None)
        theirs = draw(pipe, seeds=list(seeds), prompt=prompt, **call)
        instruction = "--no-instruction" if call["complex_human_instruction"] is None else ""
        result = sana(
            *("generate", prompt, "-m", str(folder), "--device", "cpu", "--dtype", "float32"),
            *("-s", ",".join(map(str, seeds)), "--steps", steps, "-o", f"{tmp_path}/"),
            *([instruction] if instruction else []),
            *words,
        )
        assert result.code == 0, result.err
        paths = result.out.split()
        assert len(paths) == len(seeds)
        for path, picture in zip(paths, theirs, strict=True):
            with Image.open(path) as image:
                assert_same_picture(np.asarray(image), picture)

    return run


def test_the_instruction_is_that_of_diffusers():
    call = inspect.signature(SanaPipeline.__call__).parameters
    assert "\n".join(call["complex_human_instruction"].default) == INSTRUCTION


@pytest.mark.parametrize(
    ("name", "side"), [("0.6B", 512), ("qk-norm", 1024), *exhaustive(("1.6B", 1024), ("2K", 2048))]
)
def test_native_size(compare, name, side):
    compare(name, height=side, width=side)


@pytest.mark.exhaustive
def test_native_size_of_the_4k_model(compare):
    compare("4K", height=4096, width=4096)


@pytest.mark.parametrize("name", ["2K", "4K"])
@pytest.mark.parametrize(("width", "height"), [(256, 256), (352, 160)])
def test_positions_off_the_native_grid(compare, name, width, height):
    compare(
        name,
        ["--res", f"{width}x{height}", "--fit", "exact"],
        width=width,
        height=height,
        use_resolution_binning=False,
    )


@pytest.mark.parametrize("name", ["DC-AE-Lite", "dense time"])
def test_variants_of_the_networks(compare, name):
    size = {"width": 256, "height": 160, "use_resolution_binning": False}
    compare(name, ["--res", "256x160", "--fit", "exact"], **size)


@pytest.mark.parametrize(
    ("aspect", "width", "height"),
    [("3:4", 448, 576), *exhaustive(("16:9", 672, 384), ("4:1", 1024, 256))],
)
def test_trained_shapes(compare, aspect, width, height):
    compare("0.6B", ["--ar", aspect], width=width, height=height)


@pytest.mark.parametrize(("width", "height"), [(333, 444), *exhaustive((500, 300), (640, 512))])
def test_resize_and_crop(compare, width, height):
    compare("0.6B", ["--res", f"{width}x{height}"], width=width, height=height)


@pytest.mark.parametrize("steps", [1, 3, *exhaustive(2, 14, 20)])
@pytest.mark.parametrize("solver", ["flow-dpm", "flow-euler"])
def test_steps_and_solvers(models, compare, steps, solver):
    _, pipe = models("0.6B")
    scheduler = pipe.scheduler
    try:
        compare(
            "0.6B",
            ["--solver", solver],
            num_inference_steps=steps,
            width=512,
            height=512,
            solver=solver,
        )
    finally:
        pipe.scheduler = scheduler


@pytest.mark.parametrize("guidance", [1.0, 7.0, *exhaustive(1.5)])
def test_guidance(compare, guidance):
    compare("0.6B", ["-g", str(guidance)], guidance_scale=guidance, width=512, height=512)


@pytest.mark.parametrize("negative", ["green", "A long list of Things that are not wanted, at all"])
def test_negative_prompts(compare, negative):
    compare("0.6B", ["--negative", negative], negative_prompt=negative, width=512, height=512)


@pytest.mark.parametrize("prompt", ["a red circle", "Ünïcode 火 🦊 — “quotes”", LONG])
@pytest.mark.parametrize("instructed", [True, False])
def test_prompts_short_odd_and_longer_than_300_tokens(compare, prompt, instructed):
    told = INSTRUCTION.split("\n") if instructed else None
    compare("0.6B", prompt=prompt, complex_human_instruction=told, width=512, height=512)


def test_several_pictures_each_have_their_own_seed(compare):
    compare("0.6B", seeds=(5, 6, 4_000_000_000), width=512, height=512)
