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

from sana_cli.checkpoint import load_weights, on_meta, read_config, read_json, weight_files
from sana_cli.dc_ae import DCAE, DCAEConfig
from sana_cli.device import give_back, peak_bytes
from sana_cli.dit import DiT, DiTConfig
from sana_cli.errors import BadPicture, BrokenModel
from sana_cli.gemma import GemmaConfig
from sana_cli.recipe import Recipe
from sana_cli.solver import SOLVERS
from sana_cli.strips import Decoded, decode, fold
from sana_cli.text_encoder import TextEncoder

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
class ModelFiles:
    """A model's folder and the facts in its small files that a recipe depends on."""

    folder: Path
    variant: str
    dit: DiTConfig
    vae: DCAEConfig
    flow_shift: float
    unknown_keys: tuple[str, ...]  # of the configs: what they ask for is not done

    @property
    def side(self) -> int:
        return self.dit.sample_size * self.vae.compression


def open_model(folder: Path, variant: str) -> ModelFiles:
    """Read every config of a model, no weights. BrokenModel names what is wrong."""
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in (None, "SanaPipeline"):
        raise BrokenModel(f"{folder} holds a {kind}", "only SanaPipeline folders can be drawn")
    dit, strange = read_config(DiTConfig, folder / "transformer" / "config.json")
    vae, more = read_config(DCAEConfig, folder / "vae" / "config.json")
    text = folder / "text_encoder" / "config.json"
    width = read_config(GemmaConfig, text)[0].hidden_size
    if width != dit.caption_channels:
        raise BrokenModel(
            f"{text}: hidden_size is {width}, the transformer reads {dit.caption_channels}"
        )
    if dit.in_channels != vae.latent_channels or dit.out_channels != vae.latent_channels:
        raise BrokenModel(
            f"{folder}: the transformer and the autoencoder differ in latent channels"
        )
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    # Flow-DPM configs call it flow_shift, Flow-Euler ones shift.
    shift = scheduler.get("flow_shift", scheduler.get("shift"))
    if not isinstance(shift, int | float) or isinstance(shift, bool) or not 0 < shift < 1000:
        raise BrokenModel(f"{folder / 'scheduler'}: the flow shift is {shift!r}")
    return ModelFiles(folder, variant, dit, vae, float(shift), (*strange, *more))


def draw(recipes: list[Recipe], files: ModelFiles, device: str) -> Iterator[Progress | Picture]:
    """Draw every recipe, all with one model and one precision: encode, denoise, then decode all."""
    texts: Texts = {}
    latents: list[Tensor] = []
    yield from _encode(recipes, files, device, texts)
    give_back(device)
    yield from _denoise(recipes, texts, files, device, latents)
    give_back(device)
    yield from _decode(recipes, latents, files, device)


# --- text --------------------------------------------------------------------------------------


def _encode(
    recipes: list[Recipe], files: ModelFiles, device: str, texts: Texts
) -> Iterator[Progress]:
    """Fill `texts`: each distinct (instruction, text) once, as states (1, L, width)."""
    began = time.perf_counter()
    wanted = {(r.instruction, r.prompt): None for r in recipes}
    wanted |= {("", r.negative): None for r in recipes if r.guidance > 1}
    encoder = TextEncoder(files.folder, files.variant, _dtype(recipes[0].text_dtype), device)
    yield _loaded(began)
    for i, (instruction, text) in enumerate(wanted):
        began = time.perf_counter()
        texts[instruction, text] = encoder.encode(text, instruction)
        yield _done("encode", i, len(wanted), began, device)


# --- latents -----------------------------------------------------------------------------------


def _denoise(
    recipes: list[Recipe], texts: Texts, files: ModelFiles, device: str, latents: list[Tensor]
) -> Iterator[Progress]:
    """Fill `latents` with a float32 (1, 32, h, w) for each recipe, on the CPU."""
    began = time.perf_counter()
    part = files.folder / "transformer"
    weights = weight_files(part, "diffusion_pytorch_model", files.variant)
    dit = on_meta(DiT, files.dit, part / "config.json")
    load_weights(dit, weights, _dtype(recipes[0].dit_dtype)).to(device)
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
    part = files.folder / "vae"
    weights = weight_files(part, "diffusion_pytorch_model", files.variant)
    decoder = on_meta(
        DCAE, files.vae, part / "config.json"
    ).decoder  # the encoder's half stays on disk
    load_weights(decoder, weights, None, only="decoder.")
    fold(decoder)
    decoder.to(device, _dtype(recipes[0].vae_dtype), memory_format=torch.channels_last)
    yield _loaded(began)
    for i, (recipe, latent) in enumerate(zip(recipes, latents, strict=True)):
        began = time.perf_counter()
        note = None
        drawn = _pixels(decoder, latent.to(device), recipe, files.vae)
        if _fault(drawn) and recipe.vae_dtype != "float32":
            decoder.float()
            drawn = _pixels(decoder, latent.to(device), recipe, files.vae)
            decoder.to(_dtype(recipe.vae_dtype))
            note = f"decoded again in float32: {recipe.vae_dtype} gave a bad picture"
        if fault := _fault(drawn):
            raise BadPicture(
                f"seed {recipe.seed} came out as {fault}",
                "try --dtype float32, another seed, or other weights",
            )
        yield _done("decode", i, len(recipes), began, device)
        yield Picture(i, drawn.pixels.numpy(), note)


def _pixels(decoder: Any, latent: Tensor, recipe: Recipe, vae: DCAEConfig) -> Decoded:
    """The picture, resized or cropped to the size of the recipe."""
    latent = latent.to(decoder.norm_out.weight.dtype) / vae.scaling_factor
    size = recipe.height, recipe.width
    resized = None
    if recipe.fit == "trained":
        height, width = (side * vae.compression for side in latent.shape[-2:])
        resized = _covering((height, width), size)
    return decode(decoder, latent, resized=resized, size=size)


def _covering(whole: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest (height, width) in the shape of `whole` that covers `size`."""
    ratio = max(wanted / side for wanted, side in zip(size, whole, strict=True))
    # Truncated as the reference does, but never below the target by a rounding error, as can
    # happen there.
    height, width = (
        max(wanted, int(side * ratio)) for wanted, side in zip(size, whole, strict=True)
    )
    return height, width


def _fault(drawn: Decoded) -> str | None:
    if drawn.low.isnan():
        return "NaN"
    return "one flat colour" if drawn.high - drawn.low < 1 / 255 else None


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _loaded(began: float) -> Progress:
    return Progress("load", 1, 1, time.perf_counter() - began)


def _done(stage: str, i: int, total: int, began: float, device: str) -> Progress:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    peak = peak_bytes(device) if i + 1 == total else 0
    return Progress(stage, i + 1, total, time.perf_counter() - began, peak)
