"""8 bits in the transformer beside bfloat16: how alike the images are, and how fast the steps."""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import Report
from benchmarks.gpu.speed import measured
from benchmarks.gpu.subjects import LOSS, SMALL, described

SEEDS = (1, 2, 3, 4)
WAYS: dict[str, dict[str, Any]] = {
    "float32": {"dit_dtype": "float32", "vae_dtype": "float32"},
    "bfloat16": {"dit_dtype": "bfloat16", "vae_dtype": "bfloat16"},
    "w8a8": {"dit_dtype": "bfloat16", "vae_dtype": "bfloat16", "quant": "w8a8"},
}


def w8a8(options: argparse.Namespace, report: Report) -> None:
    likeness(options, report)
    common = ["--device", options.device, "--random-weights"]
    if options.quick:
        words = ["-m", "demo", "--res", "256", "--steps", "2", "--runs", "1", *common]
    else:
        words = ["-m", SMALL, "--res", "1024", *common]
    for quant in ("none", "w8a8"):
        report.add("w8a8", quant=quant, **measured([*words, "--quant", quant]))


def likeness(options: argparse.Namespace, report: Report) -> None:
    """Compare images of the bundled model with those in float32."""
    from sana_cli.bench.competitor import psnr
    from sana_cli.pipeline.draw import Failure, ImageDone, draw
    from sana_cli.pipeline.plan import make_plan

    steps = {"steps": 2 if options.quick else 20}
    images: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        recipe, files = described("demo", "256x256", options.device, Path(folder), "auto", steps)
        for way, changes in WAYS.items():
            recipes = [replace(recipe, seed=seed, **changes) for seed in SEEDS]
            images[way] = []
            for event in draw(recipes, files, make_plan(recipes, files, options.device)):
                if isinstance(event, Failure):
                    raise event.error
                if isinstance(event, ImageDone):
                    images[way].append(event.pixels)
    found = {
        way: [psnr(*pair) for pair in zip(images[way], images["float32"], strict=True)]
        for way in ("bfloat16", "w8a8")
    }
    worst = {way: min(99.0 if one is None else one for one in found[way]) for way in found}
    report.add("w8a8", psnr=worst, ok=worst["w8a8"] >= worst["bfloat16"] - LOSS)
