"""Stage 3: the Linear DiT, trained by flow matching on the latents of stage 1 and texts of stage 2.

Training starts at the low resolution and continues from those weights at the high one, with some
low-resolution batches in between (the paper's cascade, section 4): most of the learning happens
where it is cheap.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Gemma2Model

from sana_cli.models.configs import DiTConfig
from sana_cli.models.dc_ae import DCAE
from sana_cli.models.dit import DiT
from training import bundled
from training.arithmetic import autocast
from training.autoencoder import to_image
from training.fused import fuse
from training.loop import Losses, Machine, Stage, prefetch, train
from training.settings import Settings
from training.text import tokenise
from training.world import Sample, World, draw, objects_at

PART = 1024  # latents in one file of the bank
ENCODED = 16  # images drawn and encoded at once
Paint = Callable[[Sample, int], np.ndarray]  # a sample and a side to uint8 RGB (side, side, 3)


@cache  # every image of the bank gets a new caption dozens of times
def bank_sample(world: World, seed: int, side: int, number: int) -> Sample:
    return world.sample(np.random.default_rng((seed, 4, side, number)))


def _draw_chunk(
    paint: Paint, world: World, seed: int, side: int, images: int, chunk: int
) -> np.ndarray:
    numbers = range(chunk * ENCODED, min((chunk + 1) * ENCODED, images))
    return np.stack([paint(bank_sample(world, seed, side, i), side) for i in numbers])


def bank(
    folder: Path,
    vae: DCAE,
    machine: Machine,
    world: World,
    seed: int,
    side: int,
    images: int,
    paint: Paint = draw,
) -> Tensor:
    """Return latents (images, 32, side/32, side/32) on the device; they are cached on disk."""
    parts = []
    for start in range(0, images, PART):
        path = folder / f"latents-{side}-{start:06}.safetensors"
        if not path.is_file():
            chunks = range(start // ENCODED, -(-min(start + PART, images) // ENCODED))
            rows = []
            for pixels in prefetch(
                partial(_draw_chunk, paint, world, seed, side, images), chunks, machine.workers
            ):
                with torch.inference_mode(), autocast(machine.device):
                    rows.append(vae.encode(to_image(pixels, machine.device)).float().cpu())
            scratch = path.with_suffix(".partial")
            save_file({"latents": torch.cat(rows).contiguous()}, scratch)
            scratch.rename(path)
        parts.append(load_file(path)["latents"])
    return torch.cat(parts).to(machine.device)


@dataclass(frozen=True)
class Bank:
    """Scaled latents (images, 32, h, w) and the loss weights of their cells (images, h, w)."""

    latents: Tensor
    weight: Tensor


def weight_cells(
    latents: Tensor, scaling: float, object_weight: float, world: World, seed: int, side: int
) -> Bank:
    """Scale latents and give cells with an object the weight `object_weight`, all others 1.

    Outlines are the hardest to learn, and land and sky are most of an image.
    """
    samples = (bank_sample(world, seed, side, i) for i in range(len(latents)))
    where = [objects_at(sample, side // 32) for sample in samples]
    there = torch.from_numpy(np.stack(where)).to(latents)
    return Bank(latents * scaling, 1 + (object_weight - 1) * there)


@dataclass(frozen=True)
class CaptionedBatches:
    """The side of a step, indices into the bank of that side, and ids and mask of their captions.

    One batch in `low_every` is taken from the low-resolution bank, the others from the high one.
    """

    settings: Settings
    seed: int
    stream: int
    tokenizer: Tokenizer
    low_every: int

    def __call__(self, step: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        s = self.settings
        low = step % self.low_every == 0
        side, images = (s.low_side, s.low_images) if low else (s.high_side, s.high_images)
        batch = s.low_batch if low else s.high_batch
        rng = np.random.default_rng((self.seed, self.stream, step))
        chosen = rng.integers(0, images, batch)
        captions = [
            "" if rng.random() < s.empty_captions else self._caption(side, int(i), rng)
            for i in chosen
        ]
        return side, chosen, *tokenise(self.tokenizer, captions)

    def _caption(self, side: int, number: int, rng: np.random.Generator) -> str:
        world = self.settings.world
        sample = bank_sample(world, self.seed, side, number)
        return world.describe(sample, rng, withhold=True).text


def build(config: DiTConfig, text_scale: float) -> DiT:
    """Build the model; its output and its cross-attention branches start at zero.

    The text enters RMS-normalised and with a small learned scale (paper, section 2.3).
    """
    model = DiT(config)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    nn.init.constant_(model.caption_norm.weight, text_scale)
    nn.init.normal_(model.scale_shift_table, std=config.width**-0.5)
    nn.init.normal_(model.time_embed.linear.weight, std=0.02)
    nn.init.zeros_(model.time_embed.linear.bias)
    for block in model.transformer_blocks:
        nn.init.normal_(block.scale_shift_table, std=config.width**-0.5)
        nn.init.zeros_(block.attn2.to_out[0].weight)
        nn.init.zeros_(block.attn2.to_out[0].bias)
    return fuse(model)


def sample_sigmas(count: int, shift: float, device: torch.device) -> Tensor:
    """Draw logit-normal noise levels, shifted towards noise like the sampler's schedule."""
    sigma = torch.sigmoid(torch.randn(count, device=device))
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_matching(
    model: DiT, encoder: Gemma2Model, bank: Bank, shift: float, batch: Sequence[np.ndarray]
) -> Losses:
    """Return the loss of a batch: indices into the bank, and ids and mask of their captions."""
    device = bank.latents.device
    chosen, ids, mask = (torch.from_numpy(part).to(device) for part in batch)
    with torch.no_grad():
        text = encoder(ids, attention_mask=mask, use_cache=False).last_hidden_state
    clean, weight = bank.latents[chosen], bank.weight[chosen]
    noise, sigma = torch.randn_like(clean), sample_sigmas(len(clean), shift, device)
    mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
    velocity = model(mixed, sigma * 1000, model.project_text(text), mask.bool())
    squares = (velocity.float() - (noise - clean)).square().mean(1)
    return {"loss": (weight * squares).mean() / weight.mean(), "plain": squares.mean()}


@dataclass
class Cascade:
    """The stages of both resolutions, with all that they share."""

    folder: Path
    settings: Settings
    machine: Machine
    seed: int
    tokenizer: Tokenizer
    encoder: Gemma2Model
    banks: dict[int, Bank]  # by side

    def low(self, model: DiT) -> Stage:
        """Train at a constant rate: the averaged weights are a good enough starting point."""
        s = self.settings
        return replace(self._stage("low", model, s.low_steps, s.low_rate, 1), rate_decay=0.0)

    def high(self, model: DiT) -> Stage:
        s = self.settings
        return self._stage("high", model, s.high_steps, s.high_rate, s.low_every)

    def _stage(self, name: str, model: DiT, steps: int, rate: float, low_every: int) -> Stage:
        s = self.settings

        def losses(batch: tuple[int, np.ndarray, np.ndarray, np.ndarray]) -> Losses:
            side, *rest = batch
            return flow_matching(model, self.encoder, self.banks[side], s.flow_shift, rest)

        stream = 5 if low_every == 1 else 6
        batches = CaptionedBatches(s, self.seed, stream, self.tokenizer, low_every)
        return Stage(name, model, steps, rate, s.average_decay, batches, losses, weight_decay=0.01)


def train_transformer(
    folder: Path,
    settings: Settings,
    machine: Machine,
    seed: int,
    vae: DCAE,
    tokenizer: Tokenizer,
    encoder: Gemma2Model,
) -> DiT:
    """Return the trained transformer, after running the steps that are not done yet."""
    s = settings
    low = bank(folder, vae, machine, s.world, seed, s.low_side, s.low_images)
    # The bundled transformer knows latents of the bundled scale.
    scaling = bundled.scaling_factor() if s.warm_start else round(1 / low.std().item(), 5)
    (folder / "scaling.json").write_text(json.dumps({"scaling_factor": scaling}))
    banks = {s.low_side: weight_cells(low, scaling, s.object_weight, s.world, seed, s.low_side)}
    cascade = Cascade(folder, s, machine, seed, tokenizer, encoder, banks)
    torch.manual_seed(seed)
    model = build(s.transformer, s.text_scale)
    if s.warm_start:
        # Its text states come from another encoder, so what projects them starts anew.
        bundled.start_from(model, "transformer", without=("caption_projection", "caption_norm"))
    model = train(cascade.low(model), folder, machine, seed)
    model.requires_grad_(True).train()
    high = bank(folder, vae, machine, s.world, seed, s.high_side, s.high_images)
    banks[s.high_side] = weight_cells(high, scaling, s.object_weight, s.world, seed, s.high_side)
    return train(cascade.high(model), folder, machine, seed)
