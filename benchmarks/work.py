"""What a step and a decode at 1024² give a GPU to do, for the predicted times of kernels/README.md.

    python -m benchmarks.work > benchmarks/work.json && python -m benchmarks.tables

Counted on the meta device as an RTX 4090 Laptop (sm_89) would run it in bfloat16; needs Triton.
"""

import json
import sys
from dataclasses import asdict

from sana_cli.bench.counted import SAMPLE, cells_of, count_decode, count_step
from sana_cli.resolve import Inputs, resolve
from sana_cli.settings import Settings
from sana_cli.weights.model_files import released_model

MODELS = {"0.6B": "sana-0.6b-1024", "1.6B": "sana-1.6b-1024"}
CAPABILITY = (8, 9)


def counted(model: str) -> dict[str, dict[str, float]]:
    """Return the FLOP, bytes and operations of a step and of a decode of a released model."""
    resolution = resolve(Settings("a fox", model=model, dtype="bfloat16"), Inputs())
    files = released_model(resolution.model)
    recipe = resolution.recipe(files, "cpu", 1)
    step, decode = (count(recipe, files, CAPABILITY) for count in (count_step, count_decode))
    decode = decode.enlarged(cells_of(recipe, files) / SAMPLE**2)
    return {"step": asdict(step), "decode": asdict(decode)}


if __name__ == "__main__":
    document = {size: counted(model) for size, model in MODELS.items()}
    sys.stdout.write(json.dumps(document, indent=1) + "\n")
