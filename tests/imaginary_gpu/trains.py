"""Two steps of each stage of training on the imaginary card, in the GPU's settings; JSON."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from card import card

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from training import autoencoder, diffusion, text  # noqa: E402
from training.arithmetic import autocast, fast_products  # noqa: E402
from training.loop import Machine, Stage  # noqa: E402
from training.optim import Average, Muon, descend  # noqa: E402
from training.settings import PRESETS  # noqa: E402

SETTINGS, MACHINE = PRESETS["h200"], Machine("cuda", 0, 60.0)
TOKENIZER = Tokenizer.from_file(str(ROOT / "sana_cli/demo/tokenizer/tokenizer.json"))


class Operations(TorchDispatchMode):
    """Counts what a GPU would have to be given to do; views are nothing to do."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.count += not (func.is_view or func.namespace == "prim")
        return func(*args, **(kwargs or {}))


def run(stage: Stage, batch: Any, launched: list[Any]) -> dict[str, Any]:
    launched.clear()
    model = stage.model.to(MACHINE.device)
    optimiser = Muon(model, stage.rate, stage.weight_decay)
    average = Average(model, stage.average_decay)
    with fast_products(MACHINE.device):
        for step in range(2):
            with FlopCounterMode(display=False) as counter, Operations() as operations:
                with autocast(MACHINE.device):
                    losses = stage.losses(batch)
                descend(next(iter(losses.values())), model, optimiser, average, stage.rate, step)
    average.copy_to(model)
    return {
        "steps": stage.steps,
        "flops": counter.get_total_flops(),
        "operations": operations.count + len(launched) // 2,
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
        sizes = (s.low_side, s.low_batch), (s.high_side, s.high_batch)
        for make, (side, batch) in zip((cascade.low, cascade.high), sizes, strict=True):
            model.requires_grad_(True).train()
            stage, chosen = make(model), np.zeros(batch, np.int64)
            captions = text.tokenise(TOKENIZER, ["three red houses, two blue boats"] * batch)
            told[stage.name] = run(stage, (side, chosen, *captions), launched)
    sys.stdout.write(json.dumps(told))


main()
