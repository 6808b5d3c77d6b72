"""Stage 3: the Linear DiT, by flow matching on the latents of stage 1 and the states of stage 2.

The low resolution first, then the high one from its weights, with some low batches still among
them (the paper's cascade, section 4): most of what there is to learn is learnt where it is cheap.
"""

import json
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Gemma2Model

from sana_cli.models.dc_ae import DCAE
from sana_cli.models.dit import DiT, DiTConfig
from training.arithmetic import autocast
from training.autoencoder import to_image
from training.fused import fuse
from training.loop import Losses, Machine, Stage, ahead, train
from training.settings import Settings
from training.text import tokenise
from training.world import Sample, describe, draw, objects_at, training_sample

PART = 1024  # pictures of the bank in one file
ENCODED = 16  # pictures that are drawn and encoded at once


@cache  # every picture of the bank is described anew dozens of times
def bank_sample(seed: int, side: int, number: int) -> Sample:
    return training_sample(np.random.default_rng((seed, 4, side, number)))


def _drawn(seed: int, side: int, pictures: int, chunk: int) -> np.ndarray:
    numbers = range(chunk * ENCODED, min((chunk + 1) * ENCODED, pictures))
    return np.stack([draw(bank_sample(seed, side, i), side) for i in numbers])


def bank(folder: Path, vae: DCAE, machine: Machine, seed: int, side: int, pictures: int) -> Tensor:
    """Latents (pictures, 32, side/32, side/32) on the device, kept on disk in parts."""
    parts = []
    for start in range(0, pictures, PART):
        path = folder / f"latents-{side}-{start:06}.safetensors"
        if not path.is_file():
            chunks = range(start // ENCODED, -(-min(start + PART, pictures) // ENCODED))
            rows = []
            for pixels in ahead(partial(_drawn, seed, side, pictures), chunks, machine.workers):
                with torch.inference_mode(), autocast(machine.device):
                    rows.append(vae.encode(to_image(pixels, machine.device)).float().cpu())
            scratch = path.with_suffix(".partial")
            save_file({"latents": torch.cat(rows).contiguous()}, scratch)
            scratch.rename(path)
        parts.append(load_file(path)["latents"])
    return torch.cat(parts).to(machine.device)


@dataclass(frozen=True)
class Bank:
    """Scaled latents (pictures, 32, h, w), and what a cell weighs in the loss (pictures, h, w)."""

    latents: Tensor
    weight: Tensor


def weighed(latents: Tensor, scaling: float, object_weight: float, seed: int, side: int) -> Bank:
    """Cells that hold an object count `object_weight` times: outlines are the hardest to learn,
    and land and sky are most of a picture."""
    where = [objects_at(bank_sample(seed, side, i), side // 32) for i in range(len(latents))]
    there = torch.from_numpy(np.stack(where)).to(latents)
    return Bank(latents * scaling, 1 + (object_weight - 1) * there)


@dataclass(frozen=True)
class Told:
    """Of a step: its side, indices into that side's bank, and a caption for each, tokenised.

    `low_every` 1 takes every batch from the low bank; n takes one of n from it.
    """

    settings: Settings
    seed: int
    stream: int
    tokenizer: Tokenizer
    low_every: int

    def __call__(self, step: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        s = self.settings
        low = step % self.low_every == 0
        side, pictures = (s.low_side, s.low_pictures) if low else (s.high_side, s.high_pictures)
        batch = s.low_batch if low else s.high_batch
        rng = np.random.default_rng((self.seed, self.stream, step))
        chosen = rng.integers(0, pictures, batch)
        captions = [
            ""
            if rng.random() < s.empty_captions
            else describe(bank_sample(self.seed, side, int(i)), rng).text
            for i in chosen
        ]
        return side, chosen, *tokenise(self.tokenizer, captions)


def build(config: DiTConfig, text_scale: float) -> DiT:
    """Every branch to the residual stream but the MLP's starts at zero, and so does the output.

    The text enters RMS-normalised and at a small learned scale (paper, section 2.3).
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


def sample_sigmas(count: int, shift: float, device: str) -> Tensor:
    """Logit-normal noise levels, shifted towards noise as the sampler's schedule is."""
    sigma = torch.sigmoid(torch.randn(count, device=device))
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass
class Cascade:
    """What both resolutions train with."""

    folder: Path
    settings: Settings
    machine: Machine
    seed: int
    tokenizer: Tokenizer
    encoder: Gemma2Model
    banks: dict[int, Bank]  # by side

    def low(self, model: DiT) -> Stage:
        """At a flat rate: its weights only have to be a good start, and their average is."""
        s = self.settings
        return replace(self._stage("low", model, s.low_steps, s.low_rate, 1), rate_decay=0.0)

    def high(self, model: DiT) -> Stage:
        s = self.settings
        return self._stage("high", model, s.high_steps, s.high_rate, s.low_every)

    def _stage(self, name: str, model: DiT, steps: int, rate: float, low_every: int) -> Stage:
        s, device = self.settings, self.machine.device

        def losses(batch: tuple[int, np.ndarray, np.ndarray, np.ndarray]) -> Losses:
            side, *rest = batch
            chosen, ids, mask = (torch.from_numpy(part).to(device) for part in rest)
            with torch.no_grad():
                text = self.encoder(ids, attention_mask=mask, use_cache=False).last_hidden_state
            clean, weight = self.banks[side].latents[chosen], self.banks[side].weight[chosen]
            noise, sigma = torch.randn_like(clean), sample_sigmas(len(clean), s.flow_shift, device)
            mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
            velocity = model(mixed, sigma * 1000, model.project_text(text), mask.bool())
            squares = (velocity.float() - (noise - clean)).square().mean(1)
            return {"loss": (weight * squares).mean() / weight.mean(), "plain": squares.mean()}

        told = Told(s, self.seed, 5 if low_every == 1 else 6, self.tokenizer, low_every)
        return Stage(name, model, steps, rate, s.average_decay, told, losses, weight_decay=0.01)


def finished(
    folder: Path,
    settings: Settings,
    machine: Machine,
    seed: int,
    vae: DCAE,
    tokenizer: Tokenizer,
    encoder: Gemma2Model,
) -> DiT:
    """The trained transformer; trains what is not done yet."""
    s = settings
    low = bank(folder, vae, machine, seed, s.low_side, s.low_pictures)
    scaling = round(1 / low.std().item(), 5)
    (folder / "scaling.json").write_text(json.dumps({"scaling_factor": scaling}))
    banks = {s.low_side: weighed(low, scaling, s.object_weight, seed, s.low_side)}
    cascade = Cascade(folder, s, machine, seed, tokenizer, encoder, banks)
    torch.manual_seed(seed)
    model = build(s.transformer, s.text_scale)
    model = train(cascade.low(model), folder, machine, seed)
    model.requires_grad_(True).train()
    high = bank(folder, vae, machine, seed, s.high_side, s.high_pictures)
    banks[s.high_side] = weighed(high, scaling, s.object_weight, seed, s.high_side)
    return train(cascade.high(model), folder, machine, seed)
