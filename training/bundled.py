"""The weights of the bundled model, from which a run can start."""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

DEMO = Path(__file__).resolve().parents[1] / "sana_cli" / "demo"


def scaling_factor() -> float:
    return json.loads((DEMO / "vae" / "config.json").read_text())["scaling_factor"]


def start_from(model: nn.Module, part: str, without: tuple[str, ...] = ()) -> None:
    """Copy the bundled "vae" or "transformer" into a model of the same sizes.

    Tensors whose names begin with one of `without` keep their values. RuntimeError names tensors
    that do not fit.
    """
    stored = load_file(DEMO / part / "diffusion_pytorch_model.safetensors")
    kept = {name: value for name, value in model.state_dict().items() if name.startswith(without)}
    model.load_state_dict({**{k: v.float() for k, v in stored.items()}, **kept})
