"""What steps and decodes give a GPU to do, for the predicted times of kernels/README.md.

    python -m benchmarks.work > benchmarks/work.json && python -m benchmarks.tables

Counted on the meta device in bfloat16; needs Triton. `models` has a step and a decode at 1024² on
an RTX 4090 Laptop (sm_89). `decodes` has decodes of several sides on a GPU with the fused
convolutions (8.9) and on one without (9.0), and how many of their operations are Triton's.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import torch

from sana_cli.bench.counted import SAMPLE, Count, cells_of, count_decode, count_step
from sana_cli.bench.roofline import launches
from sana_cli.models.architectures import DC_AE_F32C32
from sana_cli.models.dc_ae import DCAE
from sana_cli.models.streaming.autoencoder import decode, prepare
from sana_cli.pipeline.plan import GPU_STRIP_BYTES
from sana_cli.resolve import Inputs, resolve
from sana_cli.settings import Settings
from sana_cli.weights.model_files import released_model

MODELS = {"0.6B": "sana-0.6b-1024", "1.6B": "sana-1.6b-1024"}
CAPABILITY = (8, 9)
SIDES = (512, 1024, 2048, 4096)


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
            kernels = sum(n for name, n in run.calls.items() if name.endswith("_kernel"))
            name = ".".join(map(str, capability))
            found.setdefault(str(side), {})[name] = {"count": count, "triton": kernels}
    return found


if __name__ == "__main__":
    models = {size: counted(model) for size, model in MODELS.items()}
    document = {"models": models, "decodes": decodes(SIDES)}
    sys.stdout.write(json.dumps(document, indent=1) + "\n")
