"""Stage 1: the DC-AE, trained on crops of drawn images with L1 on pixels and their differences.

Encoder and decoder are trained together on crops. Later the decoder alone is trained on larger
crops while the encoder, and so the latents, stay fixed (the last phase of DC-AE, arXiv 2410.10733,
section 3.3, without its adversarial loss, which flat drawings do not need).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sana_cli.models.configs import DCAEConfig
from sana_cli.models.dc_ae import DCAE, ChannelRMSNorm
from training import bundled, emoji
from training.loop import Losses, Machine, Stage, train
from training.settings import Settings
from training.world import World, draw


@dataclass(frozen=True)
class Crops:
    """The crops of a step, uint8 (batch, crop, crop, 3), of images of any of the given sides.

    Crops start at multiples of a latent cell, so that the grid on which objects are placed is kept.
    Those of Noto's things contain a part of one, as their drawings have the most detail.
    """

    world: World
    seed: int
    stream: int
    sides: tuple[int, ...]
    batch: int
    crop: int

    def __call__(self, step: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, self.stream, step))
        crops = []
        for _ in range(self.batch):
            sample, side = self.world.sample(rng), int(rng.choice(self.sides))
            last = (side - self.crop) // 32
            top, left = (int(n) for n in rng.integers(0, last + 1, 2))
            if isinstance(sample, emoji.Scene):
                x0, x1, y0, y1 = sample.boxes[int(rng.integers(len(sample.boxes)))]
                left, top = (
                    int(np.clip(round((at * side - self.crop / 2) / 32), 0, last))
                    for at in rng.uniform((x0, y0), (x1, y1))
                )
            top, left = 32 * top, 32 * left
            crops.append(draw(sample, side, (top, left, self.crop)))
        return np.stack(crops)


def to_image(pixels: np.ndarray, device: str) -> Tensor:
    """Convert uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1], channels last, on a device."""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def reconstruction(decoded: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and its L1 part. Differences of neighbours weight edges, which L1 blurs."""
    decoded = decoded.float()
    l1 = F.l1_loss(decoded, image)
    edges = F.l1_loss(decoded.diff(dim=-1), image.diff(dim=-1))
    return l1 + edges + F.l1_loss(decoded.diff(dim=-2), image.diff(dim=-2)), l1


def build(config: DCAEConfig) -> DCAE:
    """Build the model with residual branches that start at zero: it learns three times faster."""
    model = DCAE(config).to(memory_format=torch.channels_last)
    for name, module in model.named_modules():
        if isinstance(module, ChannelRMSNorm) and not name.endswith("decoder.norm_out"):
            torch.nn.init.zeros_(module.weight)
    return model


def decoder_loss(
    model: DCAE, latents: Tensor, image: Tensor, noise: float
) -> tuple[Tensor, Tensor]:
    """Return `reconstruction` of the image decoded from its latents with normal noise added."""
    return reconstruction(model.decode(latents + noise * torch.randn_like(latents)), image)


def crops(settings: Settings, seed: int, stream: int, batch: int, crop: int) -> Crops:
    """Return batches of which a third are crops of low-resolution images, the others of high."""
    sides = settings.low_side, settings.high_side, settings.high_side
    return Crops(settings.world, seed, stream, sides, batch, crop)


def stage(settings: Settings, machine: Machine, seed: int) -> Stage:
    torch.manual_seed(seed)
    model = build(settings.autoencoder)
    if settings.warm_start:
        bundled.start_from(model, "vae")

    def losses(pixels: np.ndarray) -> Losses:
        image = to_image(pixels, machine.device)
        latents = model.encode(image).float()
        loss, l1 = decoder_loss(model, latents, image, settings.latent_noise)
        loss = loss + settings.latent_decay * latents.square().mean()
        return {"loss": loss, "l1": l1, "std": latents.std()}

    batch = crops(settings, seed, 1, settings.autoencoder_batch, settings.crop)
    steps, rate = settings.autoencoder_steps, settings.autoencoder_rate
    return Stage("autoencoder", model, steps, rate, 0.998, batch, losses)


def decoder_stage(settings: Settings, machine: Machine, seed: int, model: DCAE) -> Stage:
    """Train only the decoder, on whole low-resolution images and on crops of that size."""
    model.decoder.requires_grad_(True)

    def losses(pixels: np.ndarray) -> Losses:
        image = to_image(pixels, machine.device)
        with torch.no_grad():
            latents = model.encode(image).float()
        loss, l1 = decoder_loss(model, latents, image, settings.latent_noise)
        return {"loss": loss, "l1": l1}

    batch = crops(settings, seed, 2, settings.decoder_batch, settings.low_side)
    steps, rate = settings.decoder_steps, settings.decoder_rate
    return Stage("decoder", model, steps, rate, 0.998, batch, losses)


def train_autoencoder(folder: Path, settings: Settings, machine: Machine, seed: int) -> DCAE:
    return train(stage(settings, machine, seed), folder, machine, seed)


def finetune_decoder(
    folder: Path, settings: Settings, machine: Machine, seed: int, model: DCAE
) -> DCAE:
    return train(decoder_stage(settings, machine, seed, model), folder, machine, seed)
