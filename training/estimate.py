"""Estimate how long a run takes on this machine, from a few steps of each stage."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from training import autoencoder, diffusion, text
from training.loop import Machine, Stage, train
from training.settings import Settings

WARM, TIMED = 2, 5


def estimate(settings: Settings, machine: Machine, seed: int) -> str:
    """Return a Markdown table of steps, seconds per step and minutes for each stage."""
    rows: list[tuple[str, int, float]] = []

    def timed(stage: Stage, folder: Path) -> None:
        stamps: list[float] = []
        losses = stage.losses

        def stamped(batch):
            if machine.device == "cuda":
                torch.cuda.synchronize()
            stamps.append(time.monotonic())
            return losses(batch)

        short = replace(stage, steps=WARM + TIMED + 1, losses=stamped)
        train(short, folder, machine, seed)
        stage.model.requires_grad_(True)
        rows.append((stage.name, stage.steps, (stamps[-1] - stamps[WARM]) / TIMED))

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        first = autoencoder.stage(settings, machine, seed)
        timed(first, folder)
        vae = first.model.requires_grad_(False)
        timed(autoencoder.decoder_stage(settings, machine, seed, vae), folder)
        vae.requires_grad_(False)
        s, banks = settings, {}
        text.train_tokenizer(folder / "tokenizer", s.world, seed, 2000, s.tokenizer_size)
        tokenizer = text.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
        reader = text.stage(settings, machine, seed, tokenizer)
        timed(reader, folder)
        for side, images in ((s.low_side, s.low_images), (s.high_side, s.high_images)):
            began = time.monotonic()
            some = min(32 * max(1, machine.workers), images)
            latents = diffusion.bank(folder, vae, machine, s.world, seed, side, some)
            each = (time.monotonic() - began) / some
            banks[side] = diffusion.weight_cells(latents, 1.0, s.object_weight, s.world, seed, side)
            rows.append((f"latents of {side}²", images, each))
        few = replace(
            s,
            low_images=len(banks[s.low_side].weight),
            high_images=len(banks[s.high_side].weight),
        )
        parts = folder, few, machine, seed, tokenizer, reader.model.encoder, banks
        cascade = diffusion.Cascade(*parts)
        model = diffusion.build(s.transformer, s.text_scale)
        timed(cascade.low(model), folder)
        timed(cascade.high(model), folder)
    lines = ["| stage | steps | seconds per step | minutes |", "|---|---|---|---|"]
    lines += [f"| {name} | {n} | {each:.3f} | {n * each / 60:.1f} |" for name, n, each in rows]
    total = sum(n * each for _, n, each in rows) / 60
    return "\n".join([*lines, f"| total | | | {total:.1f} |"])
