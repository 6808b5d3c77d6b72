"""Decodes on the second of the cards, and their graphs, as JSON: `python decodes.py CONFIGS`.

CONFIGS is JSON: those of autoencoders by name."""

import json
import sys
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import torch

from card import Cards, card
from sana_cli.models import cuda_graph
from sana_cli.models.configs import DCAEConfig
from sana_cli.models.dc_ae import DCAE
from sana_cli.models.streaming import graphed_decoder
from sana_cli.models.streaming.autoencoder import prepare
from sana_cli.models.streaming.graphed_decoder import GraphedDecoder

DEVICE, DTYPE = "cuda:1", torch.bfloat16  # while cuda:0 is the current one
FAST, SLOW = 1e-3, 1e9  # milliseconds that the card takes, beside which Python is slow, or fast
captured = []


class Counted(cuda_graph.GraphedCall):
    def __init__(self, *arguments) -> None:
        captured.append(arguments)
        super().__init__(*arguments)


def decodes(decoder: GraphedDecoder, times: int, milliseconds: float, **changes: Any) -> dict:
    """Decode so many times; what each decode does, and the graph after the last."""
    Cards.milliseconds = milliseconds
    grid = changes.pop("grid", (4, 4))
    words = {"resized": None, "size": None, "strip_bytes": 1 << 30, "graphed": True} | changes
    told: dict[str, Any] = {"captures": [], "launches": [], "waits": []}
    for _ in range(times):
        before = len(captured), len(launched), Cards.waits
        made = decoder.decode(torch.empty(1, 32, *grid, dtype=DTYPE, device=DEVICE), **words)
        now = len(captured), len(launched), Cards.waits
        for name, b, n in zip(told, before, now, strict=True):
            told[name].append(n - b)
    told["made"] = [[made.pixels.device.type, *made.pixels.shape], made.low.device.type]
    return told | {"error": decoder.graph.error, "bytes": decoder.graph.nbytes}


def interrupted(decoder: GraphedDecoder) -> list[int]:
    """Captures of what follows a decode of new shapes that fails after one that was captured."""
    decodes(decoder, 3, FAST)
    error = torch.OutOfMemoryError
    with suppress(error), patch.object(graphed_decoder, "decode_pipeline", side_effect=error):
        decodes(decoder, 1, FAST, grid=(2, 2))
    return decodes(decoder, 3, FAST, grid=(2, 2))["captures"]


other: dict[str, Any] = {"grid": (4, 3), "size": (100, 90)}
document = {}
with card() as launched:
    cuda_graph.GraphedCall = Counted
    for name, config in json.loads(sys.argv[1]).items():
        plain = DCAE(DCAEConfig(**config)).decoder.requires_grad_(False)
        prepare(plain, DTYPE)
        decoder = GraphedDecoder(plain)
        decoder.place(DEVICE, DTYPE)
        told = document[name] = {"bound by launches": decodes(decoder, 4, FAST)}
        told["without room"] = decodes(decoder, 3, FAST, graphed=False)
        decodes(decoder, 2, FAST)
        told["of another shape"] = decodes(decoder, 1, FAST, **other)
        told["cropped"] = decodes(decoder, 2, FAST, **other)
        decoder.place(DEVICE, DTYPE)
        told["already in place"] = decodes(decoder, 1, FAST, **other)
        decoder.place(DEVICE, torch.float32)
        told["moved"] = decoder.graph.nbytes
        decoder.place(DEVICE, DTYPE)
        told["in strips"] = decodes(decoder, 3, FAST, grid=(2, 2), strip_bytes=1 << 18)
        told["bound by the card"] = decodes(decoder, 3, SLOW)
        Cards.fail = torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")
        told["out of memory"] = decodes(decoder, 4, FAST, **other)
        Cards.fail = None
        told["interrupted"] = interrupted(decoder)
sys.stdout.write(json.dumps(document))
