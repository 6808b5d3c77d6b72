"""The models and recipes to measure, and measures of how close two results are."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red circle on a blue background"
SMALL, LARGE = "sana-0.6b-1024", "sana-1.6b-1024"
LOSS = 3.0  # dB by which a result may be worse than the plain network in the same precision


def described(
    model: str,
    size: str | None,
    device: str,
    folder: Path,
    dtype: str = "auto",
    settings: dict[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Return a recipe and the files of a model; all but the bundled one get random weights."""
    from sana_cli.bench.random_weights import random_model
    from sana_cli.resolve import Inputs, resolve
    from sana_cli.settings import Settings
    from sana_cli.weights.hub_cache import find_parts
    from sana_cli.weights.model_files import open_model

    words = {"steps": 2, "dtype": dtype, "text_precision": "auto"} | (settings or {})
    resolution = resolve(Settings(PROMPT, model=model, res=size, fit="exact", **words), Inputs())
    found = find_parts(resolution.model)
    if model == "demo" and found:
        files = open_model(found)
    else:
        files = random_model(resolution.model, found, folder, device)
    recipe = resolution.recipe(files, device, 1)
    return replace(recipe, text_dtype=wide(device)), files


def wide(device: str) -> str:
    from sana_cli.system.devices import wide_dtype

    return wide_dtype(device)


def snr(x: Tensor, reference: Tensor) -> float:
    """Signal-to-noise ratio in dB."""
    x, reference = x.double().cpu(), reference.double().cpu()
    noise = (x - reference).square().sum()
    return float(10 * torch.log10(reference.square().sum() / noise)) if noise else math.inf
