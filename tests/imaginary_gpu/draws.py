"""A picture on the imaginary card, told as JSON: `python draws.py MODEL RES [OPTION=VALUE …]`."""

import json
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from torch import nn

from card import MEMORY, Cards, card
from sana_cli.bench.random_weights import random_model
from sana_cli.pipeline import draw
from sana_cli.pipeline.events import Notice, Progress
from sana_cli.pipeline.networks import Networks
from sana_cli.pipeline.plan import Plan
from sana_cli.resolve import Inputs, resolve
from sana_cli.settings import Settings
from sana_cli.weights.hub_cache import find_parts
from sana_cli.weights.model_files import open_model

BUDGET = MEMORY // 2


def devices_of(network: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*network.parameters(), *network.buffers())}


def main(model: str, res: str, *words: str) -> None:
    options: dict[str, Any] = {k: json.loads(v) for k, v in (word.split("=") for word in words)}
    planned = {name: options.pop(name) for name in ("batched_cfg", "row_chunk") if name in options}
    settings = Settings(
        "a red fox", model=model, res=res, fit="exact", steps=2, text_precision="bf16", **options
    )
    seen: list[Any] = []
    with (
        TemporaryDirectory() as folder,
        card() as launched,
        # Whether a picture is flat is a question of numbers.
        patch.object(draw, "fault_of", lambda drawn: seen.append(drawn)),
    ):
        resolution = resolve(settings, Inputs())
        found = find_parts(resolution.model)
        files = (
            open_model(found)
            if found
            else random_model(resolution.model, None, Path(folder), "cpu")
        )
        recipe = resolution.recipe(files, "cuda", 1)
        bounds = dict.fromkeys(("encode", "denoise", "decode"), 0)  # so every network stays
        plan = Plan("cuda", budget=BUDGET, bounds=bounds, **planned)
        drawing = draw.Drawing([recipe], files, plan, Networks(), None, None)
        for event in drawing.events():
            assert not isinstance(event, Notice), event
            if isinstance(event, Progress) and event.stage == "decode":
                break  # the pixels have no numbers
        assert Cards.capped == {0: BUDGET / MEMORY}
        devices: set[str] = set()
        for part in ("transformer", "decoder"):
            devices |= devices_of(drawing.networks.find(drawing.key(part)))
        (drawn,) = set(seen)
        document = {
            "checked": Cards.checked,
            "kernels": Counter(case.kernel.__name__ for case in launched),
            "networks": sorted(devices),
            "extremes": [drawn.low.device.type, drawn.high.device.type],
            "pixels": [drawn.pixels.device.type, *drawn.pixels.shape],
        }
    sys.stdout.write(json.dumps(document))


main(*sys.argv[1:])
