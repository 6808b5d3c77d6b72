"""Whether packed weights make products faster on this CPU, measured once and kept.

Packing is used only where it leaves every bit as it is, so that images do not depend on what was
measured. MKL is measured for comparison: it sums in another order, so it cannot be chosen.
"""

import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sana_cli.kernels.linear import linear, pack, uses_onednn
from sana_cli.pipeline.timings import machine_key
from sana_cli.system.json_cache import JsonCache

FILE = "packing.json"  # in the cache folder
LIMIT = 20  # machines, or numbers of threads
ENOUGH_STEPS = 8  # for packing to save more time than it takes
# Rows, width and outputs: of `demo`, and of the smallest released model.
SHAPES = ((128, 224, 672), (256, 1152, 1152))
REPEATS = 3


class Rates(NamedTuple):
    """FLOPs a second of float32 products on the CPU."""

    onednn: float
    packed: float
    mkl: float
    exact: bool  # whether packing leaves every bit as it is

    @property
    def packs(self) -> bool:
        return self.exact and self.packed > self.onednn

    def __str__(self) -> str:
        named = {"oneDNN": self.onednn, "with packed weights": self.packed, "MKL": self.mkl}
        rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in named.items())
        chosen = f"packed for {ENOUGH_STEPS} steps or more" if self.packs else "not packed"
        return f"{rates} GFLOP/s in float32; weights are {chosen}"


def pays(steps: int, folder: Path | None) -> bool:
    """Return whether to pack weights in float32 for so many steps on the CPU."""
    if steps < ENOUGH_STEPS:
        return False
    found = rates(folder)
    return found is not None and found.packs


def rates(folder: Path | None) -> Rates | None:
    """Return how fast each way is; None if this torch has no oneDNN beside MKL.

    What was measured before is found in `folder`, unless that is None.
    """
    if not uses_onednn(torch.empty(0)):
        return None
    cache = JsonCache(folder and folder / FILE, LIMIT)
    try:
        onednn, packed, mkl, exact = cache.get(*machine_key("cpu"))
        return Rates(float(onednn), float(packed), float(mkl), bool(exact))
    except (TypeError, ValueError):  # nothing, or broken
        found = _measure()
        cache.put(found, *machine_key("cpu"))
        return found


@torch.inference_mode()
def _measure() -> Rates:
    seconds, work, exact = [0.0] * 3, 0, True
    for rows, width, outputs in SHAPES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((1, rows, width), generator=generator)
        weight = torch.randn((outputs, width), generator=generator)
        ways = [partial(linear, x, one) for one in (weight, pack(weight))]
        ways.append(partial(F.linear, x, weight))
        results = [way() for way in ways]
        exact = exact and results[0].equal(results[1])
        least = [float("inf")] * 3
        for _ in range(REPEATS):
            for i, way in enumerate(ways):
                began = time.perf_counter()
                way()
                least[i] = min(least[i], time.perf_counter() - began)
        seconds = [sum(pair) for pair in zip(seconds, least, strict=True)]
        work += 2 * rows * width * outputs
    onednn, packed, mkl = (work / each for each in seconds)
    return Rates(onednn, packed, mkl, exact)
