"""Two steps of each stage of training on the imaginary card, in the GPU's settings; JSON."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from card import card
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from training import autoencoder, diffusion, text  # noqa: E402
from training.arithmetic import autocast, fast_products  # noqa: E402
from training.loop import Machine, Stage  # noqa: E402
from training.optim import Average, Muon, descend  # noqa: E402
from training.settings import PRESETS  # noqa: E402

SETTINGS, MACHINE = PRESETS["h200"], Machine("cuda", 0, 60.0)
TOKENIZER = Tokenizer.from_file(str(ROOT / "sana_cli/demo/tokenizer/tokenizer.json"))


def run(stage: Stage, batch: Any, launched: list[Any]) -> dict[str, Any]:
    launched.clear()
    model = stage.model.to(MACHINE.device)
    optimiser = Muon(model, stage.rate, stage.weight_decay)
    average = Average(model, stage.average_decay)
    with fast_products(MACHINE.device):
        for step in range(2):
            with autocast(MACHINE.device):
                losses = stage.losses(batch)
            descend(next(iter(losses.values())), model, optimiser, average, stage.rate, step)
    average.copy_to(model)
    return {
        "kernels": Counter(case.kernel.__name__ for case in launched),
        "losses": sorted({f"{loss.device.type} {loss.dtype}" for loss in losses.values()}),
        "weights": sorted({f"{p.device.type} {p.dtype}" for p in model.parameters()}),
    }


def pixels(batch: int, side: int) -> np.ndarray:
    return np.zeros((batch, side, side, 3), np.uint8)


def main() -> None:
    s, told = SETTINGS, {}
    with card() as launched:
        stage = autoencoder.stage(s, MACHINE, 1)
        told["autoencoder"] = run(stage, pixels(s.autoencoder_batch, s.crop), launched)
        stage = autoencoder.decoder_stage(s, MACHINE, 1, stage.model)
        told["decoder"] = run(stage, pixels(s.decoder_batch, s.low_side), launched)
        stage = text.stage(s, MACHINE, 1, TOKENIZER)
        told["text"] = run(stage, stage.batch(0), launched)
        encoder = stage.model.encoder.requires_grad_(False)
        banks = {}
        for side in (s.low_side, s.high_side):
            shape = (64, side // 32, side // 32)
            latents = torch.empty(64, 32, *shape[1:], device=MACHINE.device)
            banks[side] = diffusion.Bank(latents, torch.empty(shape, device=MACHINE.device))
        cascade = diffusion.Cascade(Path(), s, MACHINE, 1, TOKENIZER, encoder, banks)
        model = diffusion.build(s.transformer, s.text_scale)
        captions = text.tokenise(TOKENIZER, ["a red house", "a blue boat on the sea"] * 4)
        for make, side in ((cascade.low, s.low_side), (cascade.high, s.high_side)):
            model.requires_grad_(True).train()
            stage = make(model)
            told[stage.name] = run(stage, (side, np.zeros(8, np.int64), *captions), launched)
    sys.stdout.write(json.dumps(told))


main()
