"""What steps and decodes give a GPU to do, for the predicted times of kernels/README.md.

    python -m benchmarks.work > benchmarks/work.json && python -m benchmarks.tables

Counted on the meta device in bfloat16; needs Triton. `models` has a step and a decode at 1024² on
an RTX 4090 Laptop (sm_89). `decodes` has decodes of several sides on a GPU with the fused
convolutions (8.9) and on one without (9.0): how many of their operations are Triton's, how many
seconds Python is predicted to launch them, and how many GPUs take, without a CUDA graph and with
one.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.tables import HALVED, LAUNCHED_ON
from sana_cli.bench.counted import SAMPLE, Count, cells_of, count_decode, count_step
from sana_cli.bench.forecast import EFFICIENCY, Rates, seconds
from sana_cli.bench.roofline import Launches, launches
from sana_cli.models.architectures import DC_AE_F32C32
from sana_cli.models.dc_ae import DCAE
from sana_cli.models.streaming.autoencoder import decode, prepare
from sana_cli.pipeline.plan import GPU_STRIP_BYTES
from sana_cli.resolve import Inputs, resolve
from sana_cli.settings import Settings
from sana_cli.weights.model_files import released_model

MODELS = {"0.6B": "sana-0.6b-1024", "1.6B": "sana-1.6b-1024"}
CAPABILITY = (8, 9)
SIDES = (256, 512, 1024, 2048, 4096)
LAUNCH = {False: 7e-6, True: 20e-6}  # seconds of Python for one by torch or Triton, estimated


def counted(model: str) -> dict[str, dict[str, float]]:
    """Return the counts of a step, of one in 8 bits and of a decode of a released model."""
    resolution = resolve(Settings("a fox", model=model, dtype="bfloat16"), Inputs())
    files = released_model(resolution.model)
    recipe = resolution.recipe(files, "cpu", 1)
    found = {
        "step": count_step(recipe, files, CAPABILITY),
        "w8a8 step": count_step(replace(recipe, quant="w8a8"), files, CAPABILITY),
        "decode": count_decode(recipe, files, CAPABILITY).enlarged(
            cells_of(recipe, files) / SAMPLE**2
        ),
    }
    return {stage: asdict(count) for stage, count in found.items()}


def decodes(sides: Iterable[int]) -> dict[str, dict[str, Any]]:
    """Return the counts of decodes by side and capability."""
    with torch.device("meta"):
        decoder = DCAE(DC_AE_F32C32).decoder.requires_grad_(False)
        prepare(decoder, torch.bfloat16)
    found: dict[str, dict[str, Any]] = {}
    for side in sides:
        latent = torch.empty(1, 32, side // 32, side // 32, device="meta", dtype=torch.bfloat16)
        for capability in (CAPABILITY, (9, 0)):
            run = launches(
                lambda latent=latent: decode(decoder, latent, strip_bytes=GPU_STRIP_BYTES),
                capability,
            )
            count = asdict(Count(run.flops, run.bytes, run.count, 0, 0))
            kernels = [one.name.endswith("_kernel") for one in run.each]
            cards = {
                card: waiting(run, Rates(*rates))
                for card, (*rates, eight) in LAUNCHED_ON.items()
                if (eight == HALVED) == (capability == CAPABILITY)
            }
            facts = {"count": count, "triton": sum(kernels)}
            facts |= {"python": sum(LAUNCH[kernel] for kernel in kernels), "seconds": cards}
            found.setdefault(str(side), {})[".".join(map(str, capability))] = facts
    return found


def waiting(run: Launches, rates: Rates) -> list[float]:
    """Predict the seconds of a decode without a CUDA graph and with one.

    Without one, each operation begins when the one before has ended and Python has launched it. The
    FLOP of Triton's kernels are known as a sum, which is divided among them by their bytes.
    """
    kernels = {i for i, one in enumerate(run.each) if one.name.endswith("_kernel")}
    flops = run.flops - sum(one.flops for one in run.each)
    moved = sum(run.each[i].bytes for i in kernels)
    launched = ended = busy = 0.0
    for i, one in enumerate(run.each):
        launched += LAUNCH[i in kernels]
        share = flops * one.bytes / moved if i in kernels else one.flops
        took = seconds(Count(share, one.bytes, 1, 0, 0), rates, EFFICIENCY["cuda"])
        ended = max(ended, launched) + took
        busy += took
    return [ended, busy]


if __name__ == "__main__":
    models = {size: counted(model) for size, model in MODELS.items()}
    document = {"models": models, "decodes": decodes(SIDES)}
    sys.stdout.write(json.dumps(document, indent=1) + "\n")
