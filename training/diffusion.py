"""Stage 3: the Linear DiT, by flow matching on the latents of stage 1 and the states of stage 2."""

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from sana_cli.dc_ae import DCAE
from sana_cli.dit import DiT, DiTConfig
from training import autoencoder
from training.optim import (
    Average,
    Muon,
    averaged,
    descend,
    load_state,
    open_log,
    save_state,
    schedule,
)
from training.shapes import Scene, describe, draw, training_scene
from training.text import WIDTH, Reader, tokenise

CONFIG = DiTConfig(
    num_attention_heads=6,
    attention_head_dim=32,
    num_layers=8,
    num_cross_attention_heads=4,
    cross_attention_head_dim=48,
    cross_attention_dim=192,
    caption_channels=WIDTH,
    sample_size=autoencoder.SIDE // 32,
)
BATCH = 64
FLOW_SHIFT = 3.0
EMPTY_CAPTIONS = 0.1
ONE_OBJECT_FROM = 3600


def bank_scenes(seed: int, pictures: int) -> list[Scene]:
    """`pictures` scenes of the whole world, then a third as many of one object each."""
    world = [training_scene(np.random.default_rng((seed, 3, i))) for i in range(pictures)]
    return world + [
        training_scene(np.random.default_rng((seed, 5, i)), objects=1) for i in range(pictures // 3)
    ]


def encode_bank(folder: Path, vae: DCAE, scenes: list[Scene]) -> Tensor:
    """Latents (scenes, 32, 8, 8) of the pictures of scenes, kept on disk in parts."""
    parts = []
    for start in range(0, len(scenes), 2048):
        path = folder / f"latents-{start:06}.safetensors"
        if not path.is_file():
            rows = []
            for first in range(start, min(start + 2048, len(scenes)), 16):
                drawn = [draw(scene, autoencoder.SIDE) for scene in scenes[first : first + 16]]
                image = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)
                image = image.contiguous(memory_format=torch.channels_last).float()
                with torch.inference_mode():
                    rows.append(vae.encode(image.div_(127.5).sub_(1)))
            save_file({"latents": torch.cat(rows).contiguous()}, path)
        parts.append(load_file(path)["latents"])
    return torch.cat(parts)


def choose(rng: np.random.Generator, step: int, pictures: int) -> np.ndarray:
    """BATCH indices into the bank: the whole world, later half of them one-object pictures.

    Two objects in a relation, always of middling size, are learnt first; one object of three
    sizes in five places, which is what most prompts ask for, needs the longer practice.
    """
    chosen = rng.integers(0, pictures, BATCH)
    if step >= ONE_OBJECT_FROM:
        single = pictures + rng.integers(0, pictures // 3, BATCH)
        chosen = np.where(rng.random(BATCH) < 0.5, single, chosen)
    return chosen


def build() -> DiT:
    """Every branch to the residual stream but the MLP's starts at zero, and so does the output."""
    model = DiT(CONFIG)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    nn.init.normal_(model.scale_shift_table, std=CONFIG.width**-0.5)
    nn.init.normal_(model.time_embed.linear.weight, std=0.02)
    nn.init.zeros_(model.time_embed.linear.bias)
    for block in model.transformer_blocks:
        nn.init.normal_(block.scale_shift_table, std=CONFIG.width**-0.5)
        nn.init.zeros_(block.attn2.to_out[0].weight)
        nn.init.zeros_(block.attn2.to_out[0].bias)
    return model


def sample_sigmas(count: int) -> Tensor:
    """Logit-normal noise levels, shifted towards noise as the sampler's schedule is."""
    sigma = torch.sigmoid(torch.randn(count))
    return FLOW_SHIFT * sigma / (1 + (FLOW_SHIFT - 1) * sigma)


def train(folder: Path, steps: int, lr: float, seed: int, pictures: int) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    reader = averaged(folder / "text.safetensors", Reader(tokenizer.get_vocab_size()))
    vae = averaged(folder / "autoencoder.safetensors", autoencoder.build())
    scenes = bank_scenes(seed, pictures)
    bank = encode_bank(folder, vae, scenes)
    scaling = round(1 / bank[:pictures].std().item(), 5)
    (folder / "scaling.json").write_text(json.dumps({"scaling_factor": scaling}))
    bank = bank * scaling
    torch.manual_seed(seed)
    model = build()
    optimiser, average = Muon(model, lr, weight_decay=0.01), Average(model, 0.999)
    state = folder / "diffusion.safetensors"
    note = load_state(state, model, average, optimiser) or {"step": 0, "seconds": 0.0}
    began = time.monotonic() - note["seconds"]
    log = open_log(folder / "diffusion.jsonl", note["step"])
    shown: list[float] = []
    for step in range(note["step"], steps):
        rng = np.random.default_rng((seed, 4, step))
        torch.manual_seed(seed * 1_000_003 + step)
        chosen = choose(rng, step, pictures)
        captions = [
            "" if rng.random() < EMPTY_CAPTIONS else describe(scenes[i], rng) for i in chosen
        ]
        ids, mask = tokenise(tokenizer, captions)
        with torch.no_grad():
            text = reader.encoder(ids, attention_mask=mask).last_hidden_state
        clean = bank[torch.from_numpy(chosen)]
        noise, sigma = torch.randn_like(clean), sample_sigmas(BATCH)
        mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
        velocity = model(mixed, sigma * 1000, model.project_text(text), mask.bool())
        loss = F.mse_loss(velocity, noise - clean)
        descend(loss, model, optimiser, average, lr * schedule(step, steps), step)
        shown.append(loss.item())
        if (step + 1) % 25 == 0 or step + 1 == steps:
            row = {"step": step + 1, "loss": round(sum(shown) / len(shown), 5)}
            print(
                json.dumps(row | {"seconds": round(time.monotonic() - began)}), file=log, flush=True
            )
            shown = []
        if (step + 1) % 100 == 0 or step + 1 == steps:
            note = {"step": step + 1, "seconds": time.monotonic() - began}
            save_state(state, model, average, optimiser, note)
