"""Images decoded in strips against an untiled decode in float32."""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.report import Report, Row
from benchmarks.gpu.subjects import LOSS, SMALL, described


@torch.inference_mode()
def strips(options: argparse.Namespace, report: Report) -> None:
    from sana_cli.bench.competitor import psnr
    from sana_cli.models.dc_ae import DCAE
    from sana_cli.models.streaming.autoencoder import decode, prepare
    from sana_cli.system.devices import release_unused_memory
    from sana_cli.weights.checkpoint import load_weights, on_meta

    device = options.device
    with tempfile.TemporaryDirectory() as folder:
        _, files = described("demo" if options.quick else SMALL, None, device, Path(folder))
        part = files.parts["vae"]

        def decoder(dtype: torch.dtype, prepared: bool) -> Any:
            network = on_meta(DCAE, files.vae, part.config).decoder
            load_weights(network, part.weights, None, only="decoder.")
            if prepared:
                prepare(network, dtype)
                return network.to(device)
            return network.to(device, dtype, memory_format=torch.channels_last)

        def untiled(network: Any, z: Tensor) -> np.ndarray:
            image = network(z.to(device, network.norm_out.weight.dtype)).float()
            levels = image.mul(0.5).add(0.5).clamp(0, 1).mul(255).round()
            return levels[0].movedim(0, -1).cpu().numpy()

        for side in (128, 256) if options.quick else (512, 1024, 2048, 4096):
            shape = (1, 32, side // 32, side // 32)
            generator = torch.Generator().manual_seed(7)
            z = torch.randn(shape, generator=generator) / files.vae.scaling_factor
            reference = untiled(decoder(torch.float32, False), z) if side < 4096 else None
            for dtype in (torch.bfloat16, torch.float32):
                network = decoder(dtype, True)
                decode(network, z.to(device))
                release_unused_memory(device)
                facts: Row = {"side": side, "dtype": str(dtype).removeprefix("torch.")}
                with peak(device) as held:
                    began = time.perf_counter()
                    image = decode(network, z.to(device)).pixels
                    facts["seconds"] = time.perf_counter() - began
                facts["peak_bytes"] = held()
                if reference is not None:
                    facts["psnr"] = psnr(image.numpy(), reference)
                    if dtype != torch.float32:
                        facts["untiled_psnr"] = psnr(untiled(decoder(dtype, False), z), reference)
                    reached, expected = facts["psnr"], facts.get("untiled_psnr", 60.0)
                    facts["ok"] = reached is None or (
                        expected is not None and reached >= expected - LOSS
                    )
                report.add("strips", **facts)


@contextmanager
def peak(device: str) -> Iterator[Callable[[], int | None]]:
    """Yield a function that returns the peak of allocated CUDA memory, None on other devices."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    yield lambda: torch.cuda.max_memory_allocated() if cuda else None
