"""What 8 bits in the transformer (`--quant w8a8`) do to images, beside bfloat16, on the CPU.

    python -m benchmarks.w8a8 likeness   # latents and pixels of the bundled model against float32
    python -m benchmarks.w8a8 obedience  # its 500 prompts, drawn in float32 and in 8 bits
    python -m benchmarks.w8a8 layers     # one block of the released widths on random weights

Each writes its part of `w8a8.json`. Prompts that are done are kept in runs/w8a8.jsonl: killed and
started again, `obedience` goes on, and with --minutes it stops after a while. Decibels are signal
to noise for latents and layers, and PSNR for pixels.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sana_cli.bench.competitor import psnr
from sana_cli.kernels.rows8 import (
    dequantise,
    dequantise_weight,
    fast_instructions,
    quantise,
    quantise_weight,
)
from sana_cli.models import fused_layers
from sana_cli.models.architectures import NARROW, WIDE
from sana_cli.models.configs import DiTConfig
from sana_cli.models.dit import Block, DiT
from sana_cli.models.fused_dit import FusedDiT
from sana_cli.pipeline.draw import Drawing, ImageDone, draw
from sana_cli.pipeline.networks import Networks
from sana_cli.pipeline.plan import Plan
from sana_cli.recipe import Recipe
from sana_cli.weights.layout import folder_parts
from sana_cli.weights.model_files import ModelFiles, open_model
from training.evaluate import interval, recipe, scene_questions

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "runs" / "w8a8.jsonl"
SIDE, STEPS, GUIDANCE = 256, 20, 4.5
WAYS: dict[str, dict[str, str]] = {
    "float32": {},
    "bfloat16": {"dit_dtype": "bfloat16", "vae_dtype": "bfloat16"},
    "w8a8": {"quant": "w8a8"},
}
AMPLE = 2**34  # bytes
OUTLIERS = 4  # channels of each planted kind
TOKENS = 16  # of a side of the latent grid of `layers`


# --- likeness ------------------------------------------------------------------------------------


def drawn(one: Recipe, files: ModelFiles) -> tuple[Tensor, np.ndarray]:
    """Draw a recipe; its latents and its pixels."""
    drawing = Drawing([one], files, Plan("cpu"), Networks(), None, None)
    list(drawing.encode_texts())
    transformer = _result(drawing.load_transformer())
    list(drawing.denoise(0, transformer))
    latents = drawing.latents[0]
    decoder = _result(drawing.load_decoder())
    (image,) = (e for e in drawing.decode(0, decoder) if isinstance(e, ImageDone))
    return latents, image.pixels


def _result(events: Iterator[Any]) -> Any:
    while True:
        try:
            next(events)
        except StopIteration as stop:
            return stop.value


def decibels(found: Tensor, true: Tensor) -> float:
    noise = (found.double() - true.double()).square().sum()
    return (10 * torch.log10(true.double().square().sum() / noise)).item()


def likeness(files: ModelFiles, images: int) -> dict[str, Any]:
    questions = scene_questions()
    found: dict[str, dict[str, list[float]]] = {}
    for i in np.linspace(0, len(questions) - 1, images).astype(int).tolist():
        first = recipe(questions[i].prompt, i, files.flow_shift, STEPS, GUIDANCE, side=SIDE)
        latents, pixels = drawn(first, files)
        for way in ("bfloat16", "w8a8"):
            other_latents, other = drawn(replace(first, **WAYS[way]), files)
            row = found.setdefault(way, {"latents": [], "pixels": []})
            row["latents"].append(decibels(other_latents, latents))
            row["pixels"].append(psnr(other, pixels) or 99.0)
    return {"images": images, "side": SIDE, "steps": STEPS, "decibels": found}


# --- obedience -----------------------------------------------------------------------------------


def obedience(files: ModelFiles, minutes: float) -> dict[str, Any]:
    """Ask all prompts in both ways, or for some minutes; the summary of what there is."""
    KEPT.parent.mkdir(exist_ok=True)
    kept = [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []
    known = {row["prompt"] for row in kept}
    began, questions = time.perf_counter(), list(enumerate(scene_questions()))
    networks, plan = Networks(), Plan("cpu", budget=AMPLE)  # both transformers stay loaded
    # In a spread order, so that a part of the prompts is of all categories.
    for at, question in sorted(questions, key=lambda pair: pair[0] * 191 % len(questions)):
        if at in known or time.perf_counter() - began > 60 * minutes:
            continue
        row: dict[str, Any] = {"prompt": at, "category": question.category}
        images = []
        for way in ("float32", "w8a8"):
            start = time.perf_counter()
            one = recipe(question.prompt, at, files.flow_shift, STEPS, GUIDANCE, side=SIDE)
            events = draw([replace(one, **WAYS[way])], files, plan, networks=networks)
            (pixels,) = (event.pixels for event in events if isinstance(event, ImageDone))
            row[f"seconds {way}"] = time.perf_counter() - start
            row[way] = all(question.judge(pixels).values())
            images.append(pixels)
        row["psnr"] = psnr(images[1], images[0]) or 99.0
        kept.append(row)
        with KEPT.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    count = len(kept)
    shares = {
        way: {
            "obeyed": sum(row[way] for row in kept) / count,
            "interval": interval(sum(row[way] for row in kept), count),
        }
        for way in ("float32", "w8a8")
    }
    return {
        "prompts": count,
        "of": len(questions),
        "side": SIDE,
        **shares,
        "lost": sum(row["float32"] and not row["w8a8"] for row in kept),
        "won": sum(row["w8a8"] and not row["float32"] for row in kept),
        "median psnr": statistics.median(row["psnr"] for row in kept),
    }


# --- layers --------------------------------------------------------------------------------------


def plant(dit: DiT, generator: torch.Generator) -> None:
    """Give a block of random weights activations with outliers, 20 times as large as the others.

    They come out of modulation, of the values of self-attention and of the depthwise convolution,
    in OUTLIERS channels each, as large language and diffusion models have them.
    """
    block = dit.transformer_blocks[0]
    assert isinstance(block, Block)
    width = block.scale_shift_table.shape[1]
    block.scale_shift_table.copy_(0.3 * torch.randn(6, width, generator=generator))

    def some(count: int) -> Tensor:
        return torch.randperm(count, generator=generator)[:OUTLIERS]

    for row in (1, 4):  # the scales of both modulations
        block.scale_shift_table[row, some(width)] += 20
    block.attn1.to_v.weight[some(width)] *= 20
    hidden = len(block.ff.conv_depth.weight) // 2
    block.ff.conv_depth.weight[some(hidden)] *= 20


def captured(config: DiTConfig) -> list[tuple[str, Tensor, Tensor, bool]]:
    """Run a block in float32; name, input, weight, and whether the input is quantised in groups,
    of each of its four projections."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    dit = DiT(replace(config, num_layers=1)).eval().requires_grad_(False)
    plant(dit, generator)
    fused = FusedDiT(dit)
    block = fused.blocks[0]
    x = torch.randn(1, TOKENS**2, config.width, generator=generator)
    text = [fused.encode_text(torch.randn(1, 30, config.caption_channels, generator=generator))[0]]
    inputs: list[Tensor] = []

    def listening(function: Any, at: int) -> Any:
        def call(*given: Any) -> Any:
            inputs.append(given[at].clone())
            return function(*given)

        return call

    names = {"project_qkv": 0, "gated_residual_linear_": 1, "linear_silu": 0}
    before = {name: getattr(fused_layers, name) for name in names}
    try:
        for name, at in names.items():
            setattr(fused_layers, name, listening(before[name], at))
        block(x, torch.zeros(6, config.width).add(fused.tables[0]), text, (TOKENS, TOKENS), None)
    finally:
        for name, function in before.items():
            setattr(fused_layers, name, function)
    projections = fused_layers.PROJECTIONS
    assert len(inputs) == len(projections)
    grouped = {"out", "down"}
    return [
        (name, tokens, block.projection(name), name in grouped)
        for name, tokens in zip(projections, inputs, strict=True)
    ]


def layers() -> list[dict[str, Any]]:
    rows = []
    for model, config in (("0.6B", NARROW), ("1.6B", WIDE)):
        for name, x, weight, grouped in captured(config):
            true = x.double() @ weight.double().T
            rounded = x.bfloat16().double() @ weight.bfloat16().double().T
            rows8, weight8 = quantise(x, grouped), quantise_weight(weight)
            width = x.shape[-1]
            wide = dequantise_weight(weight8, width, torch.float64)
            found = dequantise(rows8)[..., :width].double() @ wide.T
            only = x.double() @ wide.T
            rows.append(
                {
                    "model": model,
                    "layer": name,
                    "largest": (x.abs().max() / x.square().mean().sqrt()).item(),
                    "bfloat16": decibels(rounded.bfloat16(), true),
                    "w8a8": decibels(found.bfloat16(), true),
                    "weights": decibels(only.bfloat16(), true),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.w8a8", description=__doc__)
    parser.add_argument("what", choices=("likeness", "obedience", "layers"))
    parser.add_argument("--images", type=int, default=12, help="of likeness")
    parser.add_argument("--minutes", type=float, default=1e9, help="of obedience")
    parser.add_argument("--save", type=Path, default=ROOT / "benchmarks" / "w8a8.json")
    options = parser.parse_args()
    files = open_model(folder_parts(ROOT / "sana_cli" / "demo"))
    with torch.inference_mode():
        if options.what == "likeness":
            part: Any = likeness(files, options.images)
        elif options.what == "obedience":
            part = obedience(files, options.minutes)
        else:
            part = layers()
    whole = json.loads(options.save.read_text()) if options.save.exists() else {}
    whole |= {"torch": torch.__version__, "instructions": fast_instructions(), options.what: part}
    options.save.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
