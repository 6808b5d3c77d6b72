"""A picture on the imaginary card, told as JSON: `python draws.py MODEL RES [OPTION=VALUE …]`."""

import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from card import card
from torch import nn

from sana_cli.bench.random_weights import random_model
from sana_cli.pipeline import draw as stages
from sana_cli.pipeline.plan import Plan
from sana_cli.resolve import choose
from sana_cli.settings import Settings
from sana_cli.weights.hub_cache import find_parts
from sana_cli.weights.model_files import open_model


def devices_of(network: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*network.parameters(), *network.buffers())}


def main(model: str, res: str, *words: str) -> None:
    options: dict[str, Any] = {k: json.loads(v) for k, v in (word.split("=") for word in words)}
    planned = {name: options.pop(name) for name in ("together", "rows") if name in options}
    settings = Settings(
        "a red fox", model=model, res=res, fit="exact", steps=2, text_precision="bf16", **options
    )
    seen: list[Any] = []
    devices: set[str] = set()
    with (
        TemporaryDirectory() as folder,
        card() as launched,
        # Whether a picture is flat is a question of numbers.
        patch.object(stages, "fault_of", lambda drawn: seen.append(drawn)),
    ):
        choice = choose(settings)
        found = find_parts(choice.model)
        files = (
            open_model(found) if found else random_model(choice.model, None, Path(folder), "cpu")
        )
        recipe = choice.recipe(files, "cuda", 1)
        run = stages.Run([recipe], files, Plan("cuda", **planned), {}, None)
        for stage in (run.encode_texts, run.load_transformer, partial(run.denoise, 0)):
            remarks = [event for event in stage() if isinstance(event, stages.Remark)]
            assert not remarks, remarks
        devices |= devices_of(run.transformer)
        list(run.load_decoder())
        devices |= devices_of(run.decoder)
        next(run.decode(0))
        (drawn,) = set(seen)
        document = {
            "kernels": Counter(case.kernel.__name__ for case in launched),
            "networks": sorted(devices),
            "extremes": [drawn.low.device.type, drawn.high.device.type],
            "pixels": [drawn.pixels.device.type, *drawn.pixels.shape],
        }
    sys.stdout.write(json.dumps(document))


main(*sys.argv[1:])
