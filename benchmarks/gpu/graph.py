"""Decodes through a CUDA graph beside decodes without one: the same image, and the times."""

import argparse
import math
import time
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu.report import Report, Row
from benchmarks.gpu.subjects import wide

TIMES = 20


def graph(options: argparse.Namespace, report: Report) -> None:
    from sana_cli.models.architectures import DC_AE_F32C32
    from sana_cli.models.dc_ae import DCAE
    from sana_cli.models.streaming import graphed_decoder
    from sana_cli.models.streaming.autoencoder import prepare
    from sana_cli.pipeline.plan import GPU_STRIP_BYTES

    device, dtype = options.device, getattr(torch, wide(options.device))
    with torch.device(device):
        plain = DCAE(DC_AE_F32C32).decoder.requires_grad_(False)
    prepare(plain, dtype)
    decoder = graphed_decoder.GraphedDecoder(plain)
    for side in (32,) if options.quick else (256, 512):
        shape = (1, 32, side // 32, side // 32)
        latent = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(device, dtype)

        def decodes(bound: float, latent: Any = latent) -> tuple[Any, float]:
            """The last of several images, and the least seconds. Infinity forbids the graph, and 0
            forces one after the first."""
            least = math.inf
            with patch.object(graphed_decoder, "LAUNCH_BOUND", bound):
                for _ in range(3 if options.quick else TIMES):
                    began = time.perf_counter()
                    made = decoder.decode(
                        *(latent,),
                        resized=None,
                        size=None,
                        strip_bytes=GPU_STRIP_BYTES,
                        graphed=True,
                    )
                    least = min(least, time.perf_counter() - began)
            return made, least

        without, seconds = decodes(math.inf)
        share = decoder.launch_share
        made, graph_seconds = decodes(0.0)
        facts: Row = {"side": side, "seconds": seconds, "graph_seconds": graph_seconds}
        facts |= {"launch_share": share, "pays": share >= graphed_decoder.LAUNCH_BOUND}
        facts |= {"graph_bytes": decoder.graph.nbytes, "error": decoder.graph.error}
        equal = all(torch.equal(*pair) for pair in zip(made, without, strict=True))
        captured = decoder.graph.nbytes > 0 or not device.startswith("cuda")
        report.add("graph", **facts, ok=equal and captured)
