"""The cases of diffusers' pipeline tests, on its dummy pipelines: ours draw the same images."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaPAGPipeline, SanaPipeline
from PIL import Image

from dummies import CALL, PAG_SCALE, PIPELINES, SHIFT, STRENGTH, generator, pipeline
from examples import exhaustive
from reference import assert_same_picture
from sana_cli.errors import BrokenModel
from sana_cli.pipeline.draw import ImageDone, draw
from sana_cli.pipeline.plan import Plan
from sana_cli.pipeline.text_encoder import TextEncoder
from sana_cli.recipe import Recipe
from sana_cli.weights.layout import find_component, find_part, folder_parts
from sana_cli.weights.model_files import ModelFiles, open_model, with_controlnet

# Their image and control image are tensors of normal noise; here it is clipped to 8 bits.
INPUT = (torch.randn(32, 32, 3, generator=generator()).clamp(-1, 1) * 127.5 + 127.5).byte().numpy()
SHA256 = hashlib.sha256(INPUT.tobytes()).hexdigest()
EACH = pytest.mark.parametrize("name", PIPELINES)
NATIVE = {"use_resolution_binning": False}  # with binning their 32 pixels are drawn at 1024


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (folder, the pipeline that was saved there); built when asked for."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp("dummies") / name
            pipe = pipeline(name)
            pipe.save_pretrained(folder)
            made[name] = folder, pipe
        return made[name]

    return get


def theirs(name: str, pipe, **changes) -> np.ndarray:
    more: dict[str, Any] = {"generator": generator(), "output_type": "pil"}
    if name == "sprint-img2img":
        more |= {"image": Image.fromarray(INPUT), "strength": STRENGTH}
    elif name == "controlnet":
        more |= {"control_image": Image.fromarray(INPUT), "controlnet_conditioning_scale": 1.0}
    elif name == "pag":
        more["pag_scale"] = PAG_SCALE
    return np.asarray(pipe(**CALL | NATIVE | more | changes).images[0])


def opened(name: str, folder: Path) -> ModelFiles:
    files = open_model(folder_parts(folder))
    if name != "controlnet":
        return files
    return with_controlnet(files, find_component(folder, "controlnet"))


def recipe(name: str, **changes) -> Recipe:
    sprint = name.startswith("sprint")
    more: dict[str, Any] = {
        "sprint-img2img": {"image": SHA256, "strength": STRENGTH, "image_fit": "stretch"},
        "controlnet": {"control": SHA256, "control_scale": 1.0, "image_fit": "stretch"},
        "pag": {"pag": PAG_SCALE, "pag_layer": 0},
    }.get(name, {})
    base = Recipe(
        **{"prompt": "", "negative": "", "instruction": "", "seed": 0, "steps": 2},
        **{"guidance": 6.0, "width": 32, "height": 32, "native_width": 32, "native_height": 32},
        **{"solver": "scm" if sprint else "flow-euler", "flow_shift": None if sprint else SHIFT},
        **{"fit": "exact", "model": name, "revision": None},
        **dict.fromkeys(("text_dtype", "dit_dtype", "vae_dtype"), "float32"),
    )
    return replace(base, **more | changes)


def ours(recipes: list[Recipe], files: ModelFiles, plan: Plan | None = None) -> list[np.ndarray]:
    with torch.inference_mode():
        events = list(draw(recipes, files, plan or Plan("cpu"), images={SHA256: INPUT}))
    return [event.pixels for event in events if isinstance(event, ImageDone)]


@EACH
def test_the_saved_pipeline_draws_the_same_image(saved, name):
    folder, pipe = saved(name)
    (image,) = ours([recipe(name)], opened(name, folder))
    assert image.shape == (32, 32, 3)
    assert_same_picture(image, theirs(name, pipe))


@pytest.mark.parametrize("name", exhaustive(*PIPELINES))
def test_with_resolution_binning_too(saved, name):
    folder, pipe = saved(name)
    asked = recipe(name, native_width=1024, native_height=1024, fit="trained")
    (image,) = ours([asked], opened(name, folder))
    assert_same_picture(image, theirs(name, pipe, use_resolution_binning=True))


@pytest.mark.parametrize("name", ["sana", "controlnet", "pag"])
def test_without_guidance(saved, name):
    folder, pipe = saved(name)
    (image,) = ours([recipe(name, guidance=1.0)], opened(name, folder))
    assert_same_picture(image, theirs(name, pipe, guidance_scale=1.0))


@EACH
def test_each_image_of_a_call_is_the_one_drawn_alone(saved, name):
    files = opened(name, saved(name)[0])
    recipes = [recipe(name, seed=seed) for seed in (0, 1)]
    together = ours(recipes, files)
    alone = [image for one in recipes for image in ours([one], files)]
    assert np.array_equal(together, alone)
    assert not np.array_equal(*together)


@EACH
def test_in_pieces_the_image_is_the_same(saved, name):
    """Row chunks stand where diffusers slices attention, strips where it cuts tiles."""
    files = opened(name, saved(name)[0])
    whole = ours([recipe(name)], files)[0].astype(int)
    plan = Plan("cpu", batched_cfg=False, row_chunk=4, strip_bytes=4_000)
    assert np.abs(ours([recipe(name)], files, plan)[0] - whole).max() <= 1


@EACH
def test_in_float16_the_image_is_near_that_of_float32(saved, name):
    """Within the 0.08 that their own test allows."""
    files = opened(name, saved(name)[0])
    whole = ours([recipe(name)], files)[0] / 255
    (half,) = ours([recipe(name, dit_dtype="float16", vae_dtype="bfloat16")], files)
    assert np.abs(half / 255 - whole).mean() < 0.08


@EACH
def test_a_variant_on_disk_draws_and_one_that_is_not_there_is_refused(name, tmp_path):
    pipe = pipeline(name)
    pipe.save_pretrained(tmp_path, variant="fp16")
    (image,) = ours([recipe(name)], opened(name, tmp_path))
    assert_same_picture(image, theirs(name, pipe))
    for part in ("transformer", "vae", "text_encoder"):
        with pytest.raises(BrokenModel, match="is missing"):
            find_part(tmp_path / part, ("bf16",))


@EACH
def test_the_text_states_alone_are_the_same(saved, name):
    folder, pipe = saved(name)
    call = {"max_sequence_length": 16, "complex_human_instruction": None}
    states, mask, *_ = pipe.encode_prompt("", **call)
    got = TextEncoder(folder_parts(folder), "float32", "cpu").encode("")
    torch.testing.assert_close(got, states[:, mask[0].bool()])


# --- perturbed attention -----------------------------------------------------------------------


def test_a_scale_of_zero_is_the_plain_pipeline(saved):
    folder, pipe = saved("pag")
    plain = SanaPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    (image,) = ours([recipe("sana")], open_model(folder_parts(folder)))
    assert_same_picture(image, theirs("sana", plain))
    assert_same_picture(image, theirs("pag", pipe, pag_scale=0.0))


@pytest.mark.parametrize("layer", [0, 1])
def test_the_layer_that_is_named_is_perturbed(layer, tmp_path):
    pipe = pipeline("pag")
    pipe.save_pretrained(tmp_path)
    pipe = SanaPAGPipeline(**pipe.components, pag_applied_layers=f"blocks.{layer}")
    pipe.set_progress_bar_config(disable=True)
    (image,) = ours([recipe("pag", pag_layer=layer)], open_model(folder_parts(tmp_path)))
    assert_same_picture(image, theirs("pag", pipe))
