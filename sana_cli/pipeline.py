"""Text states -> latents -> pixels, one stage at a time: load a network, use it, give it back.

`draw` is a generator: it says what it has done as it goes, and hands out each picture as soon as
it is decoded. It never prints.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sana_cli.architectures import architecture
from sana_cli.checkpoint import load_weights, on_meta, read_config
from sana_cli.dc_ae import DCAE, DCAEConfig
from sana_cli.device import give_back, peak_bytes
from sana_cli.dit import DiT, DiTConfig
from sana_cli.errors import BadPicture, BrokenModel, MissingModel
from sana_cli.gemma import GemmaConfig
from sana_cli.instruction import as_read
from sana_cli.layout import INDEX, Parts, read_json
from sana_cli.recipe import Recipe
from sana_cli.solver import SOLVERS
from sana_cli.text_cache import TextCache
from sana_cli.weights import Model

Texts = dict[tuple[str, str], Tensor]  # (instruction, text) -> states


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of a stage ("load", "encode", "denoise", "decode") took `seconds`."""

    stage: str
    done: int
    total: int
    seconds: float
    peak_bytes: int = 0  # when the stage's last unit is done: the most memory held so far


@dataclass(frozen=True)
class Picture:
    """uint8 RGB (height, width, 3) of the recipe at `index`, and what had to be done for it."""

    index: int
    pixels: np.ndarray
    note: str | None = None


@dataclass(frozen=True)
class Remark:
    """Something that happened on the way, for those who want to know; or should, as a warning."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's parts lie, and the facts in their configs that a recipe depends on."""

    parts: Parts
    dit: DiTConfig
    vae: DCAEConfig
    text: GemmaConfig
    flow_shift: float
    unknown_keys: tuple[str, ...]  # of the configs: what they ask for is not done

    @property
    def side(self) -> int:
        return self.dit.sample_size * self.vae.compression


def released_model(model: Model) -> ModelFiles:
    """What the configs of a released model say, for one whose files are not on this machine."""
    if model.architecture is None or model.side is None:
        raise MissingModel(
            f"{model.name} is not on this machine, and nothing is known of it before its download",
            f"fetch it with: sana models pull {model.name}",
        )
    known = architecture(model.architecture, model.side)
    return ModelFiles({}, known.dit, known.vae, known.text, known.flow_shift, ())


def open_model(parts: Parts) -> ModelFiles:
    """Read every config of a model, no weights. BrokenModel names what is wrong."""
    index = parts["transformer"].folder.parent / INDEX
    kind = read_json(index).get("_class_name")
    if kind not in (None, "SanaPipeline"):
        raise BrokenModel(f"{index} names a {kind}", "only a SanaPipeline can be drawn")
    dit, strange = read_config(DiTConfig, parts["transformer"].config)
    vae, more = read_config(DCAEConfig, parts["vae"].config)
    path = parts["text_encoder"].config
    text, _ = read_config(GemmaConfig, path)
    if text.hidden_size != dit.caption_channels:
        raise BrokenModel(
            f"{path}: hidden_size is {text.hidden_size}, the transformer reads"
            f" {dit.caption_channels}"
        )
    if dit.in_channels != vae.latent_channels or dit.out_channels != vae.latent_channels:
        raise BrokenModel(
            f"{parts['vae'].config}: {vae.latent_channels} latent channels, the transformer's"
            f" are {dit.in_channels} in and {dit.out_channels} out"
        )
    scheduler = parts["scheduler"].folder / "scheduler_config.json"
    facts = read_json(scheduler)
    # Flow-DPM configs call it flow_shift, Flow-Euler ones shift.
    shift = facts.get("flow_shift", facts.get("shift"))
    if not isinstance(shift, int | float) or isinstance(shift, bool) or not 0 < shift < 1000:
        raise BrokenModel(f"{scheduler}: the flow shift is {shift!r}")
    return ModelFiles(parts, dit, vae, text, float(shift), (*strange, *more))


def draw(
    recipes: list[Recipe], files: ModelFiles, device: str, cache: Path | None = None
) -> Iterator[Progress | Remark | Picture]:
    """Draw every recipe, all with one model and one precision: encode, denoise, then decode all.

    `cache` is a folder to keep and find texts in; None reads and writes nothing.
    """
    texts: Texts = {}
    latents: list[Tensor] = []
    yield from _encode(recipes, files, device, cache, texts)
    give_back(device)
    yield from _denoise(recipes, texts, files, device, latents)
    give_back(device)
    yield from _decode(recipes, latents, files, device)


# --- text --------------------------------------------------------------------------------------


def _encode(
    recipes: list[Recipe], files: ModelFiles, device: str, folder: Path | None, texts: Texts
) -> Iterator[Progress | Remark]:
    """Fill `texts`: each distinct (instruction, text) once, as states (1, L, width)."""
    wanted = {(r.instruction, r.prompt): None for r in recipes}
    wanted |= {("", r.negative): None for r in recipes if r.guidance > 1}
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


def _denoise(
    recipes: list[Recipe], texts: Texts, files: ModelFiles, device: str, latents: list[Tensor]
) -> Iterator[Progress]:
    """Fill `latents` with a float32 (1, 32, h, w) for each recipe, on the CPU."""
    began = time.perf_counter()
    part = files.parts["transformer"]
    dit = on_meta(DiT, files.dit, part.config)
    load_weights(dit, part.weights, _dtype(recipes[0].dit_dtype)).to(device)
    yield _loaded(began)
    total = sum(recipe.steps for recipe in recipes)
    done = 0
    for recipe in recipes:
        guided = recipe.guidance > 1
        conditions = [texts[recipe.instruction, recipe.prompt]]
        if guided:
            conditions.insert(0, texts["", recipe.negative])
        caption, mask = _captions(dit, conditions)
        solver = SOLVERS[recipe.solver]
        schedule = solver.schedule(recipe.steps, recipe.flow_shift)
        sample, previous = initial_noise(recipe, files).to(device), None
        for i, timestep in enumerate(schedule.timesteps):
            began = time.perf_counter()
            batch = sample.expand(len(conditions), -1, -1, -1).to(_dtype(recipe.dit_dtype))
            at = torch.full((len(conditions),), timestep, device=device)
            velocity = dit(batch, at, caption, mask).float()
            if guided:  # classifier-free guidance (arXiv 2207.12598)
                without, given = velocity.chunk(2)
                velocity = without + recipe.guidance * (given - without)
            sample, previous = solver.step(schedule, i, sample, velocity, previous)
            yield _done("denoise", done, total, began, device)
            done += 1
        latents.append(sample.cpu())


def initial_noise(recipe: Recipe, files: ModelFiles) -> Tensor:
    """float32 (1, 32, h, w), drawn on the CPU so that it is the same whatever the device."""
    cell = files.vae.compression
    shape = (1, files.dit.in_channels, recipe.native_height // cell, recipe.native_width // cell)
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(recipe.seed))


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
) -> Iterator[Progress | Picture]:
    began = time.perf_counter()
    part = files.parts["vae"]
    decoder = on_meta(DCAE, files.vae, part.config).decoder  # the encoder's half stays on disk
    load_weights(decoder, part.weights, _dtype(recipes[0].vae_dtype), only="decoder.")
    decoder.to(device, memory_format=torch.channels_last)
    yield _loaded(began)
    for i, (recipe, latent) in enumerate(zip(recipes, latents, strict=True)):
        began = time.perf_counter()
        note = None
        pixels = _pixels(decoder, latent.to(device), recipe, files.vae.scaling_factor)
        if _is_bad(pixels) and recipe.vae_dtype != "float32":
            decoder.float()
            pixels = _pixels(decoder, latent.to(device), recipe, files.vae.scaling_factor)
            decoder.to(_dtype(recipe.vae_dtype))
            note = f"decoded again in float32: {recipe.vae_dtype} gave a bad picture"
        if _is_bad(pixels):
            fault = "NaN" if pixels.isnan().any() else "one flat colour"
            raise BadPicture(
                f"seed {recipe.seed} came out as {fault}",
                "try --dtype float32, another seed, or other weights",
            )
        picture = (pixels * 255).round().to(torch.uint8).cpu().numpy()
        yield _done("decode", i, len(recipes), began, device)
        yield Picture(i, picture, note)


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
