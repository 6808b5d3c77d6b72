"""A call in the words of diffusers draws what diffusers draws."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline, SanaSprintPipeline

from reference import LIKE_0_6B, SPRINT, assert_same_picture, random_pipeline
from sana_cli import Pipeline
from sana_cli.diffusers_compat import CALL, ELSEWHERE
from sana_cli.errors import UsageError

PROMPT = "a red circle"
BARE = {"complex_human_instruction": None, "use_resolution_binning": False}
OURS = {"instruction": False, "fit": "exact"}
SIZE = {"width": 160, "height": 128}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=[False, True], ids=["sana", "sprint"])
def pair(request, tmp_path_factory):
    """A model in miniature as diffusers' pipeline and as ours."""
    folder = tmp_path_factory.mktemp("compat")
    theirs = random_pipeline(
        **{**LIKE_0_6B, "sample_size": 16}, **(SPRINT if request.param else {})
    )
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder)
    return theirs, Pipeline.from_pretrained(folder, torch_dtype=torch.float32, device="cpu")


def test_a_generator_gives_the_image_and_is_left_in_the_state_that_diffusers_leaves(pair):
    theirs, ours = pair
    call = {**SIZE, "num_inference_steps": 2, "guidance_scale": 3.0}
    one, other = seeded(7), seeded(7)
    expected = theirs(PROMPT, generator=one, **call, **BARE).images[0]
    result = ours(PROMPT, generator=other, **call, **OURS)
    assert_same_picture(np.asarray(result.images[0]), np.asarray(expected))
    assert torch.equal(one.get_state(), other.get_state())
    with pytest.raises(UsageError, match="has been drawn from"):
        ours(PROMPT, generator=other, **call, **OURS)


def test_every_image_has_its_own_of_several_generators(pair):
    theirs, ours = pair
    call = {**SIZE, "num_inference_steps": 2, "num_images_per_prompt": 2, "output_type": "np"}
    prompts = [PROMPT, "a blue star"]
    expected = theirs(prompts, generator=[seeded(s) for s in (5, 1, 9, 2)], **call, **BARE).images
    result = ours(prompts, generator=[seeded(5), 1, seeded(9), seeded(2)], **call, **OURS)
    assert (result.images.dtype, result.images.shape) == (np.float32, expected.shape)
    for one, other in zip(result.images, expected, strict=True):
        assert_same_picture(*(np.rint(255 * x).astype(np.uint8) for x in (one, other)))
    assert [recipe.seed for recipe in result.recipes] == [5, 1, 9, 2]


def test_latents_and_the_steps_that_lead_to_them(pair):
    theirs, ours = pair
    told: dict[str, list] = {"theirs": [], "ours": []}

    def tell(pipe, step, timestep, values):
        kept = told["ours" if pipe is ours else "theirs"]
        kept.append((step, float(timestep), values["latents"].clone()))
        return values

    call = {**SIZE, "num_inference_steps": 2, "output_type": "latent"}
    call["callback_on_step_end"] = tell
    expected = theirs(PROMPT, generator=seeded(3), **call, **BARE).images
    latents = ours(PROMPT, generator=3, **call, **OURS).images
    torch.testing.assert_close(latents, expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(told["ours"][-1][2], latents)
    assert [step for step, *_ in told["ours"]] == [step for step, *_ in told["theirs"]]
    if isinstance(theirs, SanaPipeline):  # Sana-Sprint's are in another scale
        for one, other in zip(told["ours"], told["theirs"], strict=True):
            assert one[1] == other[1]
            torch.testing.assert_close(one[2], other[2], atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def demo():
    return Pipeline("demo", cache=False)


def test_a_seed_is_that_of_the_first_image(demo):
    result = demo(PROMPT, generator=4, num_images_per_prompt=2, num_inference_steps=1, res=256)
    again = demo.generate(PROMPT, seed=5, steps=1, res=256)[0]
    assert result.images[1].tobytes() == again.tobytes()
    assert result[0] is result.images


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"generator": seeded(1), "num_images_per_prompt": 2}, "one generator cannot draw 2"),
        ({"generator": [seeded(1)] * 3}, "3 generators cannot draw 1"),
        ({"output_type": "jax"}, "'jax' is not one of pil, np, latent"),
        ({"callback_on_step_end": lambda *a: {"latents": 2 * a[3]["latents"]}}, "other latents"),
        ({"callback_on_step_end": lambda *a: {"old": a[3]["latents"].zero_()}}, "other latents"),
    ],
)
def test_what_would_draw_something_else_is_refused(demo, arguments, says):
    with pytest.raises(UsageError, match=says):
        demo(PROMPT, num_inference_steps=1, res=256, **arguments)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda demo: demo(PROMPT, num_inference_step=3), "did you mean num_inference_steps"),
        (lambda demo: demo(PROMPT, stpes=3), "did you mean steps"),
        (lambda demo: demo(PROMPT, seed=3), "use generator"),
        (lambda demo: demo(PROMPT, steps=3, num_inference_steps=3), "one argument"),
        (lambda demo: demo(PROMPT, width=256), "width and height are given together"),
        (lambda demo: demo(PROMPT, dtype="float32"), "an argument of Pipeline"),
        (lambda demo: demo(PROMPT, complex_human_instruction=None), "use instruction=True"),
        (lambda demo: demo(PROMPT, generator="7"), "not '7'"),
        (lambda demo: demo(PROMPT, image=np.zeros((8, 8))), "image is the path of a file"),
        (lambda demo: demo.generate(PROMPT, guidance_scale=3), "use guidance"),
        (lambda demo: Pipeline.from_pretrained("demo", variant="bf16"), "use dtype"),
        (lambda demo: Pipeline("demo", torch_dtype="float32"), "use dtype"),
    ],
)
def test_any_other_argument_is_told_ours(demo, call, says):
    with pytest.raises(TypeError, match=says):
        call(demo)


def test_an_attribute_that_diffusers_has_cannot_be_set_in_vain(demo):
    for name in ("scheduler", "_interrupt", "_guidance_scale"):
        with pytest.raises(AttributeError):
            setattr(demo, name, None)


@pytest.mark.parametrize("pipeline", [SanaPipeline, SanaSprintPipeline])
def test_every_argument_of_diffusers_is_taken_or_explained(demo, pipeline):
    taken = inspect.signature(demo.__call__).parameters.keys() | CALL.keys() | ELSEWHERE.keys()
    # Of these our way is the only one, whatever they say.
    nothing_like_it = {"eta", "clean_caption", "attention_kwargs", "max_sequence_length"}
    embeds = {name for name in inspect.signature(pipeline.__call__).parameters if "embeds" in name}
    masks = {"prompt_attention_mask", "negative_prompt_attention_mask"}
    theirs = inspect.signature(pipeline.__call__).parameters.keys() - {"self"}
    unexplained = theirs - taken - nothing_like_it - embeds - masks
    assert unexplained <= {"max_timesteps", "intermediate_timesteps"}


def test_to_draws_the_same_image_on_the_device_that_it_names(demo):
    before = demo.generate(PROMPT, seed=1, steps=1, res=256)[0]
    assert demo.to(torch.device("cpu")) is demo
    assert demo.device == "cpu"
    assert demo.generate(PROMPT, seed=1, steps=1, res=256)[0].tobytes() == before.tobytes()
    with pytest.raises(UsageError, match="'abacus'"):
        demo.to("abacus")
    assert demo.device == "cpu"
