"""Latents of the pipeline against the plain transformer in float32: signal to noise in dB."""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu.report import Report
from benchmarks.gpu.subjects import LARGE, LOSS, SMALL, described, snr


def fused_dit(options: argparse.Namespace, report: Report) -> None:
    cases: list[tuple[str, str, dict[str, Any]]]
    if options.quick:
        cases = [("demo", "256x256", {}), ("demo", "128x160", {"negative": "green"})]
    else:
        cases = [
            (SMALL, "1024x1024", {}),
            (SMALL, "992x416", {"negative": "dull colours"}),
            (LARGE, "1024x1024", {}),
            (LARGE, "1024x1024", {"guidance": 1.0}),
            ("sana-sprint-0.6b", "1024x1024", {}),
            ("sana-1.6b-4k", "2048x1024", {}),
        ]
    dtypes = ["float32"] if options.device == "cpu" else ["bfloat16", "float16"]
    for model, size, settings in cases:
        for dtype in dtypes if model in (SMALL, "demo") else dtypes[:1]:
            try:
                facts = fidelity(model, size, dtype, settings, options.device)
            except Exception as error:
                facts = {"failed": f"{type(error).__name__}: {error}"[:300]}
            report.add("fused_dit", model=model, size=size, dtype=dtype, **settings, **facts)


@torch.inference_mode()
def fidelity(
    model: str, size: str, dtype: str, settings: dict[str, Any], device: str
) -> dict[str, Any]:
    """Signal to noise of the latents after two steps, in dB, against the plain network in float32.

    Measured for the pipeline, and for the plain network in the precision of the pipeline.
    """
    from sana_cli.models.streaming.graphed_decoder import GraphedDecoder
    from sana_cli.pipeline.draw import Failure, draw
    from sana_cli.pipeline.plan import Plan, is_guided
    from sana_cli.pipeline.text_encoder import TextEncoder

    with tempfile.TemporaryDirectory() as folder:
        recipe, files = described(model, size, device, Path(folder), dtype, settings)
        encoder = TextEncoder(files.parts, recipe.text_dtype, device)
        texts = [encoder.encode(recipe.prompt, recipe.instruction)]
        if is_guided(recipe, files):
            texts.insert(0, encoder.encode(recipe.negative))
        del encoder
        reference = plain(recipe, files, texts, device, torch.float32)
        rounded = plain(recipe, files, texts, device, getattr(torch, recipe.dit_dtype))
        decoded: list[Tensor] = []
        decode = GraphedDecoder.decode

        def record(decoder: GraphedDecoder, latent: Tensor, **words: Any) -> Any:
            decoded.append(latent.float().cpu() * files.vae.scaling_factor)
            return decode(decoder, latent, **words)

        # With a float32 decoder, the latents are not rounded before they are recorded.
        with patch.object(GraphedDecoder, "decode", record):
            for event in draw([replace(recipe, vae_dtype="float32")], files, Plan(device)):
                if isinstance(event, Failure):
                    raise event.error
    ours, theirs = snr(decoded[0], reference), snr(rounded, reference)
    return {"snr": ours, "plain_snr": theirs, "ok": ours >= min(theirs - LOSS, 100)}


def plain(recipe: Any, files: Any, texts: list[Tensor], device: str, dtype: torch.dtype) -> Tensor:
    """Return latents, float32 (1, 32, h, w) on the CPU, sampled with the plain network."""
    from sana_cli.models.dit import DiT
    from sana_cli.pipeline.solver import SOLVERS, advance
    from sana_cli.weights.checkpoint import load_weights, on_meta

    part = files.parts["transformer"]
    dit = on_meta(DiT, files.dit, part.config)
    load_weights(dit, part.weights, dtype)
    dit.to(device)
    shape = (1, files.dit.in_channels, recipe.native_height // 32, recipe.native_width // 32)
    generator = torch.Generator("cpu").manual_seed(recipe.seed)
    sample, previous = torch.randn(shape, generator=generator).to(device), None
    captions = [dit.project_text(text.to(device, dtype)) for text in texts]
    guidance = None
    if files.is_sprint:
        guidance = torch.full((1,), recipe.guidance, dtype=texts[0].dtype, device=device)
        guidance = guidance * files.dit.guidance_embeds_scale
    solver = SOLVERS[recipe.solver]
    schedule = solver.schedule(recipe.steps, recipe.flow_shift)
    unit = 1.0 if files.is_sprint else files.dit.timestep_scale
    for step in range(recipe.steps):
        at = torch.full((1,), schedule.timesteps[step] * unit, device=device)
        streams = [
            dit(sample.to(dtype), at, caption, None, guidance).float() for caption in captions
        ]
        velocity = streams[-1]
        if len(streams) == 2:
            velocity = streams[0] + recipe.guidance * (streams[1] - streams[0])
        fresh = torch.randn(shape, generator=generator).to(device) if solver.stochastic else None
        update = solver.update(schedule, step)
        sample, previous = advance(update, sample, velocity, previous, fresh)
    return sample.float().cpu()
