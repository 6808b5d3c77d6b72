"""Text states -> latents -> pixels, one stage at a time: load a network, use it, give it back.

Where a picture is the start, it becomes latents in a stage of its own, before the denoising.

`draw` is a generator: it says what it has done as it goes, and hands out each picture as soon as
it is decoded. It never prints.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sana_cli.checkpoint import load_weights, on_meta
from sana_cli.dc_ae import DCAE
from sana_cli.device import give_back, peak_bytes
from sana_cli.dit import DiT
from sana_cli.errors import BadPicture, SanaError, UsageError
from sana_cli.instruction import as_read
from sana_cli.model_files import ModelFiles
from sana_cli.recipe import Recipe
from sana_cli.solver import SOLVERS, first_step
from sana_cli.text_cache import TextCache

Texts = dict[tuple[str, str], Tensor]  # (instruction, text) -> states
Images = Mapping[str, np.ndarray]  # SHA-256 of a picture to start from -> uint8 RGB (h, w, 3)
Starts = dict[tuple[str, int, int], Tensor]  # the same at a native height and width -> latents


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of a stage took `seconds`."""

    stage: str  # "load", "encode", "image", "denoise" or "decode"
    done: int
    total: int
    seconds: float
    peak_bytes: int = 0  # when the stage's last unit is done: the most memory held so far


@dataclass(frozen=True)
class Picture:
    """uint8 RGB (height, width, 3) of the recipe at `index`."""

    index: int
    pixels: np.ndarray


@dataclass(frozen=True)
class Failure:
    """Why there is no picture of the recipe at `index`. The others are drawn all the same."""

    index: int
    error: SanaError


@dataclass(frozen=True)
class Remark:
    """Something that happened on the way, for those who want to know; or should, as a warning."""

    text: str
    warning: bool = False


Event = Progress | Picture | Failure | Remark


def draw(
    recipes: list[Recipe],
    files: ModelFiles,
    device: str,
    *,
    images: Images | None = None,
    cache: Path | None = None,
) -> Iterator[Event]:
    """Draw every recipe, all with one model and one precision: encode, denoise, then decode all.

    `images` holds the pixels of every picture that a recipe starts from; `cache` is a folder to
    keep and find texts in, and None reads and writes nothing.
    """
    for recipe in recipes:
        if (recipe.solver == "scm") != files.is_sprint:
            raise UsageError(f"{recipe.model} cannot be sampled by {recipe.solver}")
    texts: Texts = {}
    starts: Starts = {}
    latents: list[Tensor] = []
    yield from _encode(recipes, files, device, cache, texts)
    give_back(device)
    if images:
        yield from _encode_images(recipes, images, files, device, starts)
        give_back(device)
    yield from _denoise(recipes, texts, starts, files, device, latents)
    give_back(device)
    yield from _decode(recipes, latents, files, device)


# --- text --------------------------------------------------------------------------------------


def _encode(
    recipes: list[Recipe], files: ModelFiles, device: str, folder: Path | None, texts: Texts
) -> Iterator[Progress | Remark]:
    """Fill `texts`: each distinct (instruction, text) once, as states (1, L, width)."""
    wanted = {(r.instruction, r.prompt): None for r in recipes}
    wanted |= {("", r.negative): None for r in recipes if _is_guided(r, files)}
    precision = recipes[0].text_dtype
    cache = TextCache(folder, files.parts, precision, device) if folder else None
    encoder, found = None, 0
    for i, (instruction, text) in enumerate(wanted):
        began = time.perf_counter()
        what = as_read(text), instruction
        states = cache.states(*what) if cache else None
        if states is not None:
            found += 1
        else:
            if encoder is None:  # neither it nor its library is loaded if every text is found
                from sana_cli.text_encoder import TextEncoder

                encoder = TextEncoder(files.parts, precision, device, cache)
                yield _loaded(began)
                began = time.perf_counter()
            states = encoder.encode(*what)
            if cache:
                cache.keep_states(states, *what)
        texts[instruction, text] = states
        yield _done("encode", i, len(wanted), began, device)
    if cache:
        yield Remark(f"text cache: {found} of {len(wanted)} texts found")
        for fault in cache.faults():
            yield Remark(f"the cache in {folder} cannot be written: {fault}", warning=True)


# --- latents -----------------------------------------------------------------------------------


def _encode_images(
    recipes: list[Recipe], images: Images, files: ModelFiles, device: str, starts: Starts
) -> Iterator[Progress]:
    """Fill `starts`: each picture at each size it is drawn at, as float32 latents (1, 32, h, w)."""
    began = time.perf_counter()
    dtype = _dtype(recipes[0].vae_dtype)
    encoder = _autoencoder(files, "encoder", dtype, device)
    yield _loaded(began)
    wanted = {(r.image, r.native_height, r.native_width): None for r in recipes if r.image}
    for i, (image, height, width) in enumerate(wanted):
        began = time.perf_counter()
        # Stretched to the size, whatever its own aspect, as the reference does.
        fitted = Image.fromarray(images[image]).resize((width, height), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None].float()
        latents = encoder((pixels / 255 * 2 - 1).to(device, dtype)) * files.vae.scaling_factor
        starts[image, height, width] = latents.float().cpu()
        yield _done("image", i, len(wanted), began, device)


def _denoise(
    recipes: list[Recipe],
    texts: Texts,
    starts: Starts,
    files: ModelFiles,
    device: str,
    latents: list[Tensor],
) -> Iterator[Progress]:
    """Fill `latents` with a float32 (1, 32, h, w) for each recipe, on the CPU."""
    began = time.perf_counter()
    part = files.parts["transformer"]
    dit = on_meta(DiT, files.dit, part.config)
    load_weights(dit, part.weights, _dtype(recipes[0].dit_dtype)).to(device)
    yield _loaded(began)
    total = sum(recipe.steps - first_step(recipe.steps, recipe.strength) for recipe in recipes)
    done = 0
    for recipe in recipes:
        conditions = [texts[recipe.instruction, recipe.prompt]]
        if _is_guided(recipe, files):
            conditions.insert(0, texts["", recipe.negative])
        caption, mask = _captions(dit, conditions)
        told = _guidance(recipe, files, conditions[0]) if files.is_sprint else None
        solver = SOLVERS[recipe.solver]
        schedule = solver.schedule(recipe.steps, recipe.flow_shift)
        # Sana-Sprint is told the noise level itself, whatever its config says, as the reference.
        unit = 1.0 if files.is_sprint else files.dit.timestep_scale
        first = first_step(recipe.steps, recipe.strength)
        draws = noise(recipe, files)
        sample, previous = next(draws).to(device), None
        if recipe.image:
            start = starts[recipe.image, recipe.native_height, recipe.native_width].to(device)
            sample = torch.lerp(start, sample, schedule.sigmas[first])
        for i in range(first, recipe.steps):
            began = time.perf_counter()
            batch = sample.expand(len(conditions), -1, -1, -1).to(_dtype(recipe.dit_dtype))
            at = torch.full((len(conditions),), schedule.timesteps[i] * unit, device=device)
            velocity = dit(batch, at, caption, mask, told).float()
            if len(conditions) == 2:  # classifier-free guidance (arXiv 2207.12598)
                without, given = velocity.chunk(2)
                velocity = without + recipe.guidance * (given - without)
            fresh = next(draws).to(device) if solver.stochastic else None
            sample, previous = solver.step(schedule, i, sample, velocity, previous, fresh)
            yield _done("denoise", done, total, began, device)
            done += 1
        latents.append(sample.cpu())


def _is_guided(recipe: Recipe, files: ModelFiles) -> bool:
    """Whether every step runs with the negative text too, for classifier-free guidance."""
    return recipe.guidance > 1 and not files.is_sprint


def _guidance(recipe: Recipe, files: ModelFiles, text: Tensor) -> Tensor:
    """What Sana-Sprint is told (1,): in the precision of its text, as the reference does."""
    told = torch.full((1,), recipe.guidance, dtype=text.dtype, device=text.device)
    return told * files.dit.guidance_embeds_scale


def noise(recipe: Recipe, files: ModelFiles) -> Iterator[Tensor]:
    """The recipe's noise, float32 (1, 32, h, w) again and again.

    Drawn on the CPU, so that it is the same whatever the device.
    """
    cell = files.vae.compression
    shape = (1, files.dit.in_channels, recipe.native_height // cell, recipe.native_width // cell)
    generator = torch.Generator("cpu").manual_seed(recipe.seed)
    while True:
        yield torch.randn(shape, generator=generator)


def _captions(dit: DiT, texts: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Projected texts (B, longest, D) and the mask of real tokens, None if all are."""
    longest = max(text.shape[1] for text in texts)
    dtype = dit.proj_out.weight.dtype
    rows = [F.pad(text[0], (0, 0, 0, longest - text.shape[1])) for text in texts]
    caption = dit.project_text(torch.stack(rows).to(dtype))
    lengths = torch.tensor([text.shape[1] for text in texts], device=caption.device)
    mask = torch.arange(longest, device=caption.device) < lengths[:, None]
    return caption, None if bool(mask.all()) else mask


# --- pixels ------------------------------------------------------------------------------------


def _decode(
    recipes: list[Recipe], latents: list[Tensor], files: ModelFiles, device: str
) -> Iterator[Event]:
    began = time.perf_counter()
    decoder = _autoencoder(files, "decoder", _dtype(recipes[0].vae_dtype), device)
    yield _loaded(began)
    for i, (recipe, latent) in enumerate(zip(recipes, latents, strict=True)):
        began = time.perf_counter()
        pixels = _pixels(decoder, latent.to(device), recipe, files.vae.scaling_factor)
        if _is_bad(pixels) and recipe.vae_dtype != "float32":
            decoder.float()
            pixels = _pixels(decoder, latent.to(device), recipe, files.vae.scaling_factor)
            decoder.to(_dtype(recipe.vae_dtype))
            yield Remark(
                f"seed {recipe.seed} was decoded again in float32: {recipe.vae_dtype} gave a bad"
                " picture",
                warning=True,
            )
        if _is_bad(pixels):
            fault = "NaN" if pixels.isnan().any() else "one flat colour"
            error = BadPicture(
                f"seed {recipe.seed} came out as {fault}",
                "try --dtype float32, another seed, or other weights",
            )
            yield Failure(i, error)
            continue
        picture = (pixels * 255).round().to(torch.uint8).cpu().numpy()
        yield _done("decode", i, len(recipes), began, device)
        yield Picture(i, picture)


def _autoencoder(files: ModelFiles, half: str, dtype: torch.dtype, device: str) -> nn.Module:
    """The "encoder" or the "decoder"; the other half stays on disk."""
    part = files.parts["vae"]
    network = getattr(on_meta(DCAE, files.vae, part.config), half)
    load_weights(network, part.weights, dtype, only=f"{half}.")
    return network.to(device, memory_format=torch.channels_last)


def _pixels(decoder: Any, latent: Tensor, recipe: Recipe, scaling: float) -> Tensor:
    """float32 (height, width, 3) in [0, 1], resized or cropped to the size of the recipe."""
    dtype = next(decoder.parameters()).dtype
    image = decoder(latent.to(dtype) / scaling)
    if recipe.fit == "trained":
        image = _resize(image, recipe.height, recipe.width)
    top = (image.shape[-2] - recipe.height) // 2
    left = (image.shape[-1] - recipe.width) // 2
    image = image[..., top : top + recipe.height, left : left + recipe.width]
    return (image * 0.5 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).float()


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear to the smallest size that covers (height, width), as the reference does."""
    ratio = max(height / image.shape[-2], width / image.shape[-1])
    # Truncated as there, but never below the target by a rounding error, as can happen there.
    size = (max(height, int(image.shape[-2] * ratio)), max(width, int(image.shape[-1] * ratio)))
    if size == tuple(image.shape[-2:]):
        return image
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False)


def _is_bad(pixels: Tensor) -> bool:
    return bool(pixels.isnan().any()) or float(pixels.max() - pixels.min()) < 1 / 255


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _loaded(began: float) -> Progress:
    return Progress("load", 1, 1, time.perf_counter() - began)


def _done(stage: str, i: int, total: int, began: float, device: str) -> Progress:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    peak = peak_bytes(device) if i + 1 == total else 0
    return Progress(stage, i + 1, total, time.perf_counter() - began, peak)
