"""Chooses the block shape of a matrix product: predicted from the GPU's facts, then measured.

A multiprocessor computes its share of the tiles, and all wait for the one with the largest share.
Large tiles read less for each result; small ones can be shared out evenly. `Product.cycles` weighs
the two. On a GPU the best few by that prediction are timed when a size first occurs, and the
fastest is kept in the cache folder, beside the outcomes of the check (`selfcheck.py`).
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from sana_cli.kernels import launch, selfcheck
from sana_cli.system import disk
from sana_cli.system.devices import is_out_of_memory

# Multiplications of a multiprocessor in a clock, of 16-bit numbers with float32 sums and of int8
# (NVIDIA's white papers of A100, GA102, Ada, H100 and Blackwell).
MULTIPLICATIONS = {
    (8, 0): (1024, 2048),
    (8, 6): (256, 1024),
    (8, 9): (256, 1024),
    (9, 0): (2048, 4096),
    (10, 0): (4096, 8192),
    (12, 0): (256, 1024),
}
L2_BYTES = 40  # that a multiprocessor reads in a clock, roughly
EXPOSED = 0.25  # of the shorter of computing and reading, while the longer one runs
START = 1000  # cycles until the first product of a tile and after the last
CANDIDATES = 3  # that are measured
# A prediction may be off by more than this, and larger tiles certainly move fewer bytes.
UNSURE = 1.05
# A measurement scatters by a few per cent, so the predicted shape has to be beaten by more.
MARGIN = 1.03
REPEATS = 4


class Shape(Protocol):
    """A block shape of any kernel."""

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns."""

    @property
    def resident(self) -> int:
        """How many programs fit on a multiprocessor, at least, by `aot`."""


AnyShape = TypeVar("AnyShape", bound=Shape)


class Product(NamedTuple):
    """`batch` products of m x k and k x n."""

    batch: int
    m: int
    n: int
    k: int
    itemsize: int  # bytes of a factor
    half_sums: bool = False  # of `launch.sums_in_half`

    def cycles(self, shape: Shape, capability: tuple[int, int], multiprocessors: int) -> float:
        """Predict the clock cycles that a GPU takes."""
        m, n = shape.tile
        tiles = self.batch * math.ceil(self.m / m) * math.ceil(self.n / n)
        share = math.ceil(tiles / multiprocessors)
        floats, integers = MULTIPLICATIONS.get(capability, MULTIPLICATIONS[8, 0])
        floats *= 1 + self.half_sums
        computing = m * n * self.k / (integers if self.itemsize == 1 else floats)
        reading = (m + n) * self.k * self.itemsize / L2_BYTES
        each = max(computing, reading) + EXPOSED * min(computing, reading)
        ends = START + 4 * m * n / L2_BYTES  # a result is read or biased, and written, in 16 bits
        # Beside another program on the same multiprocessor these are hidden, but the last ones.
        return share * each + (ends if min(share, shape.resident) > 1 else share * ends)


def choose(
    kernel: str,
    product: Product,
    shapes: Sequence[AnyShape],
    x: Tensor,
    run: Callable[[AnyShape], object] | None = None,
) -> AnyShape:
    """Choose one of the shapes for a product on the GPU of x; `run` launches it with a shape.

    Without `run` nothing is measured: an image has the same bits every time, so only shapes that
    give the same results may depend on a measurement.
    """
    if len(shapes) == 1:
        return shapes[0]
    facts = launch.capability(x.device), launch.multiprocessors(x.device)
    best = sorted(shapes, key=lambda shape: product.cycles(shape, *facts))[:CANDIDATES]
    if run is None:
        enough = UNSURE * product.cycles(best[0], *facts)
        good = [shape for shape in best if product.cycles(shape, *facts) <= enough]
        return max(good, key=lambda shape: math.prod(shape.tile))
    if not _runs(x.device):
        return best[0]
    kept, size = _kept(x.device), " ".join(map(str, (kernel, *product)))
    for shape in best:
        if list(shape.tile) == kept.get(size):
            return shape
    # The pass before it has measured what a graph contains, and loaded it, which capture forbids.
    if torch.cuda.is_current_stream_capturing():
        return best[0]
    try:
        seconds = {shape: _seconds(partial(run, shape), x.device) for shape in best}
    except Exception as error:
        if is_out_of_memory(error):  # the operation itself needs less
            return best[0]
        raise
    seconds[best[0]] /= MARGIN
    fastest = min(best, key=lambda shape: seconds[shape])
    kept[size] = list(fastest.tile)
    _keep(x.device, kept)
    return fastest


def _runs(device: torch.device) -> bool:
    """Whether kernels run, on a GPU, and are not just recorded."""
    return device.type == "cuda" and not launch.is_traced()


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time a launch: the least of a few, each behind others, so that the GPU never waits."""
    best = math.inf
    with torch.cuda.device(device):
        run()  # compiles
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            run()
            begin.record()
            for _ in range(REPEATS):
                run()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1000 / REPEATS)
    return best


# The tile that is fastest, by the kernel and its product, of each GPU.
_fastest: dict[torch.device, dict[str, list[int]]] = {}


def _kept(device: torch.device) -> dict[str, list[int]]:
    if device not in _fastest:
        try:
            found = json.loads(_kept_at(device).read_bytes())
        except (OSError, ValueError):  # absent or broken
            found = {}
        _fastest[device] = found if isinstance(found, dict) else {}
    return _fastest[device]


def _keep(device: torch.device, kept: dict[str, list[int]]) -> None:
    try:
        disk.replace(_kept_at(device), json.dumps(kept).encode())
    except OSError as error:
        selfcheck.could_not_keep("the fastest block shapes", _kept_at(device), error)


def _kept_at(device: torch.device) -> Path:
    return selfcheck.kept_at(device, "tiles")
