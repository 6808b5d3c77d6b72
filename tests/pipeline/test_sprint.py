"""SANA-Sprint through the command line draws what diffusers draws, from noise or a picture."""

import hashlib
import json

import numpy as np
import pytest
import torch
from diffusers import SanaSprintImg2ImgPipeline
from PIL import Image

from examples import exhaustive
from reference import LIKE_0_6B, LIKE_1_6B, LITE, SPRINT, assert_same_picture, draw, random_pipeline
from sana_cli.errors import UsageError
from sana_cli.instruction import INSTRUCTION
from sana_cli.pipeline import draw as stages
from sana_cli.pipeline.plan import Plan
from sana_cli.recipe import Recipe
from sana_cli.weights import model_files
from sana_cli.weights.layout import folder_parts

MODELS = {
    "0.6B": {**LIKE_0_6B, **SPRINT},
    "1.6B": {**LIKE_1_6B, **SPRINT, "seed": 1},
    "lite": {**LIKE_0_6B, **SPRINT, "vae": LITE},
    "dense time": {**LIKE_0_6B, **SPRINT, "timestep_scale": 0.001},  # which Sprint does not heed
}
PROMPT = "A Red circle, left of a blue star"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """name -> (folder, the diffusers pipeline that was saved there); built when asked for."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("sprint") / name
            pipe = random_pipeline(**MODELS[name])
            pipe.save_pretrained(folder)
            made[name] = folder, pipe
        return made[name]

    return get


@pytest.fixture
def ours(models, sana, tmp_path):
    """Draw with the command; gives the pictures, what was said and the recipes."""

    def run(name, *words, seeds=(7,), prompt=PROMPT, instructed=False):
        result = sana(
            *("generate", prompt, "-m", str(models(name)[0]), "--device", "cpu"),
            *("-s", ",".join(map(str, seeds)), "-o", f"{tmp_path}/", "--json", *words),
            *(() if instructed else ("--no-instruction",)),
        )
        assert result.code == 0, result.err
        rows = json.loads(result.out)["images"]
        pictures = [np.asarray(Image.open(row["path"])) for row in rows]
        return pictures, result.err, [row["recipe"] for row in rows]

    return run


@pytest.fixture
def compare(models, ours):
    def run(name, words=(), steps=2, seeds=(7,), instructed=False, **call):
        pipe = models(name)[1]
        if "image" in call:
            pipe = SanaSprintImg2ImgPipeline(**pipe.components)
        theirs = draw(
            pipe,
            seeds=list(seeds),
            prompt=PROMPT,
            num_inference_steps=steps,
            intermediate_timesteps=1.3 if steps == 2 else None,
            complex_human_instruction=INSTRUCTION.split("\n") if instructed else None,
            **call,
        )
        words = ("--steps", str(steps), *words) if steps != 2 else words  # the default
        pictures = ours(name, *words, seeds=seeds, instructed=instructed)[0]
        assert len(pictures) == len(theirs)
        for picture, theirs_ in zip(pictures, theirs, strict=True):
            assert_same_picture(picture, theirs_)
        return theirs

    return run


SMALL = ("--res", "160x256", "--fit", "exact")
SMALL_CALL = {"width": 160, "height": 256, "use_resolution_binning": False}


@pytest.mark.parametrize("name", ["0.6B", *exhaustive("1.6B")])
@pytest.mark.parametrize("steps", [1, 2, 4, *exhaustive(3)])
def test_steps(compare, name, steps):
    compare(name, SMALL, steps=steps, **SMALL_CALL)


@pytest.mark.parametrize("name", ["1.6B", *exhaustive("0.6B")])
def test_native_size(compare, name):
    compare(name)


@pytest.mark.exhaustive
def test_a_trained_shape(compare):
    compare("0.6B", ["--ar", "16:9"], width=1344, height=768)


def test_resize_and_crop(compare):
    compare("0.6B", ["--res", "900x700"], width=900, height=700)


@pytest.mark.parametrize("guidance", [1.0, 4.5, 7.0])
def test_guidance_is_told_to_the_network(compare, guidance):
    (picture,) = compare(
        "0.6B", [*SMALL, "-g", str(guidance)], guidance_scale=guidance, **SMALL_CALL
    )
    if guidance != 4.5:
        (usual,) = compare("0.6B", SMALL, **SMALL_CALL)
        with pytest.raises(AssertionError):
            assert_same_picture(picture, usual)


def test_every_seed_has_its_own_noise_at_every_step(compare):
    compare("0.6B", SMALL, steps=4, seeds=(5, 6, 4_000_000_000), **SMALL_CALL)


def test_the_instruction_stays_in_front(compare):
    compare("0.6B", SMALL, instructed=True, **SMALL_CALL)


def test_the_network_is_told_the_noise_level_whatever_the_scale_of_the_config(compare):
    compare("dense time", SMALL, **SMALL_CALL)


def test_dc_ae_lite_decodes(compare):
    compare("lite", SMALL, **SMALL_CALL)


def test_guidance_is_rounded_as_the_text_is(ours):
    """4.5 x 0.1 in bfloat16, which is what the reference tells a network in bfloat16."""
    told = []

    def listen(module, inputs):
        if type(module).__name__ == "GuidedModulation":
            told.append(inputs[1].item())

    handle = torch.nn.modules.module.register_module_forward_pre_hook(listen)
    try:
        ours("0.6B", *SMALL, "--dtype", "bfloat16")
        ours("0.6B", *SMALL, "--dtype", "float32")
    finally:
        handle.remove()
    assert told == [0.44921875, pytest.approx(0.45, abs=1e-7)]  # once a picture


def test_the_defaults_are_those_of_sprint(ours):
    _, said, (recipe,) = ours("0.6B", *SMALL)
    assert (recipe["steps"], recipe["solver"], recipe["guidance"]) == (2, "scm", 4.5)
    assert recipe["flow_shift"] is None and recipe["image"] is None
    assert "2 steps of scm, guidance 4.5" in said
    assert "warning:" not in said


def test_more_steps_than_it_was_made_for_are_taken_with_a_warning(ours):
    _, said, _ = ours("0.6B", *SMALL, "--steps", "5")
    assert "warning:" in said and "1 to 4 steps, not 5" in said


# --- image to image ----------------------------------------------------------------------------


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours with an edge, so that every resampling filter gives something else."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    rgb = np.stack([np.sin(9 * x) * 0.5 + 0.5, y, (x + y > 0.7) * 0.9], axis=-1)
    return Image.fromarray((rgb * 255).astype(np.uint8))


@pytest.fixture
def picture(tmp_path):
    """A picture of that size, and the words that name its file."""

    def make(width, height):
        path = tmp_path / "photo.png"
        photo(width, height).save(path)
        # As the reference does it; other fits are tested in tests/images/test_masks.py.
        return photo(width, height), ["--image", str(path), "--image-fit", "stretch"]

    return make


@pytest.mark.parametrize(
    ("steps", "strength"),
    [(1, 0.5), (2, 0.5), (4, 0.6)]
    + exhaustive((2, 0.3), (2, 0.6), (2, 1.0), (3, 0.6), (4, 0.2), (4, 0.75)),
)
def test_strength_and_steps(compare, picture, steps, strength):
    image, words = picture(300, 200)
    compare(
        "0.6B",
        [*SMALL, *words, "--strength", str(strength)],
        steps=steps,
        image=image,
        strength=strength,
        **SMALL_CALL,
    )


def test_the_default_strength_is_that_of_diffusers(compare, picture):
    image, words = picture(160, 256)
    compare("1.6B", [*SMALL, *words], steps=4, image=image, **SMALL_CALL)


def test_each_seed_and_guidance_with_a_picture(compare, picture):
    image, words = picture(64, 64)
    words = [*SMALL, *words, "--strength", "0.5", "-g", "3"]
    call = {"image": image, "strength": 0.5, "guidance_scale": 3.0, **SMALL_CALL}
    compare("0.6B", words, steps=3, seeds=(1, 2), instructed=True, **call)


def test_the_autoencoder_may_be_lite(compare, picture):
    image, words = picture(160, 256)
    words = [*SMALL, *words, "--strength", "0.5"]
    compare("lite", words, image=image, strength=0.5, **SMALL_CALL)


def test_without_a_size_the_trained_shape_nearest_to_the_picture_is_drawn(compare, picture):
    image, words = picture(640, 500)
    words = [*words, "--strength", "0.5"]
    (drawn,) = compare("0.6B", words, image=image, strength=0.5, width=1152, height=896)
    assert drawn.shape == (896, 1152, 3)


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ((), (1152, 896)),
        (("--res", "1024"), (1152, 896)),
        (("--ar", "1:1"), (1024, 1024)),
        (("--res", "900x700"), (900, 700)),
        (("--fit", "exact"), (1159, 905)),
    ],
)
def test_the_size_asked_for_wins_over_the_picture_s(models, sana, picture, words, size):
    _, named = picture(640, 500)
    run = sana("generate", "a fox", "-m", str(models("0.6B")[0]), *named, *words, "--dry-run")
    (recipe,) = json.loads(run.out)["recipes"]
    assert (recipe["width"], recipe["height"]) == size
    native = f"{recipe['native_width']}x{recipe['native_height']}"
    assert f"photo.png (640x500), stretched to {native}, at strength 0.6" in run.err


def test_the_recipe_names_the_pixels_and_not_the_file(ours, picture, tmp_path):
    image, words = picture(90, 60)
    image.save(tmp_path / "again.webp", lossless=True)
    _, _, (first,) = ours("0.6B", *SMALL, *words, "--strength", "0.25")
    _, _, (second,) = ours(
        *("0.6B", *SMALL, "--image", str(tmp_path / "again.webp"), "--strength", "0.25"),
        *("--image-fit", "stretch"),
    )
    assert first == second
    assert first["image"] == hashlib.sha256(image.tobytes()).hexdigest()
    assert first["strength"] == 0.25
    with Image.open(next(tmp_path.glob("a-red*.png"))) as drawn:
        assert "Denoising strength: 0.25" in drawn.text["parameters"]
        assert "photo" not in drawn.text["sana"]


def test_encoding_the_picture_is_a_stage_of_its_own(models, sana, picture, tmp_path):
    words = ("generate", "a fox", "-m", str(models("0.6B")[0]), *SMALL, "-o", f"{tmp_path}/")
    _, named = picture(64, 64)
    seconds = json.loads(sana(*words, "--json", *named).out)["seconds"]
    stages = ["start", "load", "encode", "image", "denoise", "decode", "save", "other", "total"]
    assert list(seconds) == stages
    assert seconds["image"] > 0
    assert "image: 1 done" in sana(*words, *named).err
    assert "image" not in json.loads(sana(*words, "--json").out)["seconds"]


@pytest.mark.parametrize(
    ("steps", "strength", "says"),
    [
        ("2", "0.6", "--strength 0.5 or less"),
        ("2", "0.5", None),
        ("3", "0.7", "--strength 0.66 or less"),
        ("3", "0.66", None),
        ("4", "1", "--strength 0.75 or less"),
        ("4", "0.75", None),
        ("1", "0.1", "use more --steps"),
    ],
)
def test_a_picture_that_will_have_no_effect_brings_a_warning(
    models, sana, picture, steps, strength, says
):
    _, named = picture(64, 64)
    words = ("-m", str(models("0.6B")[0]), "--steps", steps, "--strength", strength, "--dry-run")
    run = sana("generate", "a fox", *named, *words)
    assert run.code == 0, run.err
    assert ("the image has no effect" in run.err) == (says is not None)
    assert (says or "") in run.err


def test_a_recipe_for_another_kind_of_model_is_not_drawn(models):
    recipe = Recipe(
        **dict.fromkeys(("prompt", "negative", "instruction", "model"), ""),
        **dict.fromkeys(("width", "height", "native_width", "native_height"), 64),
        **dict.fromkeys(("text_dtype", "dit_dtype", "vae_dtype"), "float32"),
        **{"seed": 1, "steps": 2, "guidance": 4.5, "solver": "flow-dpm", "flow_shift": 3.0},
        **{"fit": "exact", "revision": None},
    )
    files = model_files.open_model(folder_parts(models("0.6B")[0]))
    with pytest.raises(UsageError, match="flow-dpm"):
        stages.draw([recipe], files, Plan("cpu"))
