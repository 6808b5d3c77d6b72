"""Whether packed weights make products faster on this CPU, measured once and kept.

Packing is used only where it leaves every bit as it is, so that images do not depend on what was
measured. MKL, which sums in another order, does not compete for that reason.
"""

import time
from functools import partial
from pathlib import Path

import torch

from sana_cli.kernels.linear import linear, pack, uses_onednn
from sana_cli.pipeline.timings import machine_key
from sana_cli.system.json_cache import JsonCache

FILE = "packing.json"  # in the cache folder
LIMIT = 20  # machines, or numbers of threads
ENOUGH_STEPS = 8  # for packing to save more time than it takes
# Rows, width and outputs: of `demo`, and of the smallest released model.
SHAPES = ((128, 224, 672), (256, 1152, 1152))
REPEATS = 3


def pays(steps: int, folder: Path | None) -> bool:
    """Return whether to pack weights in float32 for so many steps on the CPU."""
    return steps >= ENOUGH_STEPS and (gain(folder) or 0) > 1


def gain(folder: Path | None) -> float | None:
    """Return how many times as fast products are with packed weights; None where bits differ.

    What was measured before is found in `folder`, unless that is None.
    """
    cache = JsonCache(folder and folder / FILE, LIMIT)
    found = cache.get(*machine_key("cpu"))
    if not isinstance(found, dict):
        found = {"gain": _measure()}
        cache.put(found, *machine_key("cpu"))
    return found.get("gain")


@torch.inference_mode()
def _measure() -> float | None:
    if not uses_onednn(torch.empty(0)):
        return None
    total = [0.0, 0.0]
    for rows, width, outputs in SHAPES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((1, rows, width), generator=generator)
        weight = torch.randn((outputs, width), generator=generator)
        ways = [partial(linear, x, one) for one in (weight, pack(weight))]
        plain, packed = (way() for way in ways)
        if not plain.equal(packed):
            return None
        least = [float("inf")] * 2
        for _ in range(REPEATS):
            for i, way in enumerate(ways):
                began = time.perf_counter()
                way()
                least[i] = min(least[i], time.perf_counter() - began)
        total = [sum(pair) for pair in zip(total, least, strict=True)]
    return total[0] / total[1]
