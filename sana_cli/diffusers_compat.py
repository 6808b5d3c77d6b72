"""The arguments of a diffusers pipeline, in the words of this package.

Names that mean the same are translated, a generator becomes the seeds that draw its noise, and
everything else is a TypeError that names the argument to use.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from sana_cli.errors import UsageError
from sana_cli.recipe import SEED_LIMIT, parse_seeds

if TYPE_CHECKING:
    import torch

# Arguments of a call and of a load that mean the same under another name.
CALL = {
    "negative_prompt": "negative",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "num_images_per_prompt": "count",
}
LOAD = {"torch_dtype": "dtype"}
# What the other arguments of diffusers correspond to.
ELSEWHERE = {
    "complex_human_instruction": "instruction=True or False",
    "use_resolution_binning": 'fit="exact" instead of use_resolution_binning=False',
    "controlnet_conditioning_scale": "control_scale",
    "control_image": "control, the path of a file",
    "pag_scale": "pag",
    "pag_adaptive_scale": "pag_adaptive",
    "pag_applied_layers": "pag_layer",
    "latents": "generator or seed, which decide the noise",
    "sigmas": "num_inference_steps; the model decides the noise levels",
    "timesteps": "num_inference_steps; the model decides the noise levels",
    "callback": "callback_on_step_end",
    "callback_on_step_end_tensor_inputs": "callback_on_step_end, which gets the latents",
    "seed": "generator in a call of the pipeline, which takes a seed",
    "return_dict": "the result's images",
    "scheduler": "solver",
    "variant": "dtype",
    "local_files_only": "offline",
    "device_map": "device",
    "cache_dir": "the variable HF_HOME",
}
OUTPUTS = ("pil", "np", "latent")


def translate(given: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return arguments under our names. TypeError if one is given under both names."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        ours = names.get(name, name)
        if ours in found:
            theirs = next(other for other in given if names.get(other) == ours)
            raise TypeError(f"{ours} and {theirs} are one argument; give one of them")
        found[ours] = value
    return found


def unknown(name: str, call: str, known: Iterable[str], elsewhere: str | None = None) -> TypeError:
    """Return the error for an argument that `call` does not take.

    `elsewhere` is the call that takes it, if there is one.
    """
    text = f"{call} takes no argument {name!r}"
    known = list(known)
    if elsewhere is not None:
        return TypeError(f"{text}; it is an argument of {elsewhere}")
    same = (CALL | LOAD).get(name)
    if same in known:
        return TypeError(f"{text}; use {same}")
    if name in ELSEWHERE:
        return TypeError(f"{text}; use {ELSEWHERE[name]}")
    if close := get_close_matches(name, known, n=1):
        return TypeError(f"{text}; did you mean {close[0]}?")
    return TypeError(f"{text}; it takes {', '.join(known)}")


def resolution(width: int | None, height: int | None) -> str | None:
    """Return the `res` of a width and a height in pixels; None without both."""
    if (width is None) != (height is None):
        raise TypeError("width and height are given together, or neither")
    return None if width is None else f"{width}x{height}"


def seeds_of(
    generator: "torch.Generator | int | Sequence[torch.Generator | int] | None",
    prompts: int,
    count: int | None,
) -> list[list[int]]:
    """Return the seeds of each prompt's images, whose noise is what diffusers draws.

    A seed is that of the first image of every prompt, and the next images have the next seeds.
    Generators are one for each image. UsageError for a single generator that diffusers would draw
    several images from: only the first of them has a seed.
    """
    if generator is None or isinstance(generator, int):
        seed = None if generator is None else str(generator)
        return [parse_seeds(seed, count)] * prompts
    each = len(parse_seeds(None, count))
    generators = list(generator) if isinstance(generator, Sequence) else [generator]
    if len(generators) != prompts * each:
        given = "one generator" if len(generators) == 1 else f"{len(generators)} generators"
        raise UsageError(
            f"{given} cannot draw {prompts * each} images that have a seed each",
            "give a seed, as in generator=7, or a list with one generator for each image",
        )
    seeds = [one if isinstance(one, int) else seed_of(one) for one in generators]
    return [seeds[first : first + each] for first in range(0, len(seeds), each)]


def seed_of(generator: "torch.Generator") -> int:
    """Return the seed whose noise a generator draws next.

    TypeError for anything else than a torch generator; UsageError for one of a GPU, whose noise is
    another, and for one that has been drawn from.
    """
    import torch

    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a torch.Generator or a seed, not {generator!r}")
    if generator.device.type != "cpu":
        raise UsageError(
            f"a generator on {generator.device} draws other noise on every kind of GPU",
            "use torch.Generator() on the CPU; the images are drawn on the device all the same",
        )
    seed = generator.initial_seed()
    if not torch.equal(generator.get_state(), torch.Generator().manual_seed(seed).get_state()):
        raise UsageError(
            "the generator has been drawn from, so no seed gives its noise",
            "seed it anew before every call: generator.manual_seed(7)",
        )
    return seed % SEED_LIMIT  # torch's generator reads the lowest 32 bits
