"""Stage 1: the DC-AE, on crops of drawn scenes, by L1 on pixels and on their differences."""

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sana_cli.dc_ae import DCAE, ChannelRMSNorm, DCAEConfig
from training.optim import Average, Muon, descend, load_state, open_log, save_state, schedule
from training.shapes import draw, training_scene

CONFIG = DCAEConfig(
    encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    encoder_block_out_channels=(8, 16, 32, 64, 128, 128),
    decoder_block_out_channels=(8, 16, 32, 64, 128, 128),
    encoder_layers_per_block=(1, 1, 1, 1, 1, 1),
    decoder_layers_per_block=(1, 1, 1, 2, 2, 2),
    upsample_block_type="interpolate",
    downsample_block_type="Conv",
)
SIDE = 256
CROP = 128
BATCH = 8
# Noise put on the latents, so that the decoder forgives what a sampler gets wrong, and the pull
# towards zero that keeps the encoder from escaping it by growing. Together: a std near one.
LATENT_NOISE = 0.2
LATENT_DECAY = 2e-3


def images(rng: np.random.Generator, batch: int, crop: int) -> Tensor:
    """(batch, 3, crop, crop) float32 in [-1, 1], channels last; crops lie anywhere in a scene."""
    crops = []
    for _ in range(batch):
        top, left = rng.integers(0, SIDE - crop + 1, 2) if crop < SIDE else (0, 0)
        crops.append(draw(training_scene(rng), SIDE, (int(top), int(left), crop)))
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    return pixels.float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


def loss_of(decoded: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, plain L1). The differences between neighbours weigh edges, which L1 alone blurs."""
    l1 = F.l1_loss(decoded, image)
    edges = F.l1_loss(decoded.diff(dim=-1), image.diff(dim=-1))
    edges = edges + F.l1_loss(decoded.diff(dim=-2), image.diff(dim=-2))
    return l1 + edges, l1


def build() -> DCAE:
    """Residual branches start at zero: three times faster here than starting at one."""
    model = DCAE(CONFIG).to(memory_format=torch.channels_last)
    for name, module in model.named_modules():
        if isinstance(module, ChannelRMSNorm) and not name.endswith("decoder.norm_out"):
            torch.nn.init.zeros_(module.weight)
    return model


def train(folder: Path, steps: int, lr: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = build()
    optimiser, average = Muon(model, lr), Average(model, 0.998)
    state = folder / "autoencoder.safetensors"
    note = load_state(state, model, average, optimiser) or {"step": 0, "seconds": 0.0}
    log = open_log(folder / "autoencoder.jsonl", note["step"])
    began = time.monotonic() - note["seconds"]
    shown: list[float] = []
    for step in range(note["step"], steps):
        rng = np.random.default_rng((seed, step))
        torch.manual_seed(seed * 1_000_003 + step)
        image = images(rng, BATCH, CROP)
        latents = model.encode(image)
        noisy = latents + LATENT_NOISE * torch.randn_like(latents)
        loss, l1 = loss_of(model.decode(noisy), image)
        loss = loss + LATENT_DECAY * latents.square().mean()
        descend(loss, model, optimiser, average, lr * schedule(step, steps), step)
        shown.append(l1.item())
        if (step + 1) % 25 == 0 or step + 1 == steps:
            row = {"step": step + 1, "l1": round(sum(shown) / len(shown), 5)}
            row |= {
                "std": round(latents.std().item(), 3),
                "seconds": round(time.monotonic() - began),
            }
            print(json.dumps(row), file=log, flush=True)
            shown = []
        if (step + 1) % 250 == 0 or step + 1 == steps:
            note = {"step": step + 1, "seconds": time.monotonic() - began}
            save_state(state, model, average, optimiser, note)
