"""What kernels on `rows8.py` share: rounding to 8 bits, and the matrix product of a tile.

The product has two forms. With one scale a token the sums are integers to the end. With a scale
for each GROUP channels a step of the product covers one group, whose sum is scaled and added in
float32.

On GPUs of capability 8.x a tile may have two PARTS of columns, which share their rows. Triton
prefetches the operands of such GPUs into registers, those of a wide int8 product as single bytes,
with more instructions than the product itself has; two products of half the width have none.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_cli.kernels.cases import Case
from sana_cli.kernels.rows8 import GROUP, LARGEST, TINY, Rows8
from sana_cli.kernels.selfcheck import Check, Draw

LARGEST_: tl.constexpr = tl.constexpr(float(LARGEST))
TINY_: tl.constexpr = tl.constexpr(TINY)
# Added to a number below 2²² in float32 and subtracted again, it rounds to nearest, half to even.
ROUNDER: tl.constexpr = tl.constexpr(float(3 << 22))


class Blocks8(NamedTuple):
    """A tile of m x (parts·n), computed in steps of k."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    parts: int = 1
    resident: int = 1  # see `tiles.Shape`

    @property
    def tile(self) -> tuple[int, int]:
        return self.m, self.n * self.parts


# With steps of 128 channels, where there may be; with steps of one GROUP; for few tiles.
AMPERE = (
    Blocks8(128, 64, 128, 8, 3, 2),
    Blocks8(128, 64, 64, 8, 3, 2),
    Blocks8(64, 32, 64, 4, 4, 2, 4),
)
LATER = Blocks8(128, 128, 128, 8, 3), Blocks8(128, 128, 64, 8, 3), Blocks8(64, 64, 64, 4, 4, 1, 4)


def block_shapes8(x: Rows8, target: tuple[int, int]) -> tuple[Blocks8, Blocks8]:
    """Return the block shapes for products of rows on a GPU of capability `target`."""
    k, groups = x.values.shape[-1], x.scales.shape[-1]
    wide, narrow, small = AMPERE if target[0] == 8 else LATER
    if x.dtype == torch.float32:  # its results leave no registers for more columns
        narrow = narrow._replace(n=64)
    return (wide if groups == 1 and k % wide.k == 0 else narrow), small


def new_rows8(like: Tensor, shape: tuple[int, ...], width: int, grouped: bool) -> Rows8:
    """Allocate rows of `width` channels, which are padded, on the device of a tensor."""
    padded = triton.cdiv(width, GROUP) * GROUP
    scales = padded // GROUP if grouped else 1
    return Rows8(
        like.new_empty(*shape, padded, dtype=torch.int8),
        like.new_empty(*shape, scales, dtype=torch.float32),
        like.dtype,
    )


@triton.jit
def round_rows(x):
    """Quantise each row of x, float32 (M, K) -> int8 (M, K) and scales (M,).

    The largest magnitude is found among bits, which order like numbers, with NaN above all.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(bits, 1).to(tl.float32, bitcast=True)
    factor = LARGEST_ / tl.where(largest < TINY_, TINY_, largest)
    values = (x * factor[:, None] + ROUNDER) - ROUNDER
    return values.to(tl.int8), largest / LARGEST_


@triton.jit
def matmul_tile8(
    x, x_scales, weight, row, column, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    """Compute x·weightᵀ of one or two PARTS of BLOCK_N columns in float32, without the weight's
    scales; with one part the second result is the first.

    x (m, k) and weight (n, k) in int8, where k is a multiple of BLOCK_K; x_scales (m, k/BLOCK_K) if
    GROUPED, else (m, 1). Indices beyond the end are clamped: see `projection_triton.matmul_tile`.
    """
    steps = tl.arange(0, BLOCK_K)
    rows = tl.minimum(tl.arange(0, BLOCK_M), m - 1 - row)
    columns = tl.arange(0, BLOCK_N)
    x_at = x + row.to(tl.int64) * k + rows[:, None] * k + steps[None]
    weight += column.to(tl.int64) * k
    left = weight + tl.minimum(columns, n - 1 - column)[None] * k + steps[:, None]
    right = weight + tl.minimum(columns + BLOCK_N, n - 1 - column)[None] * k + steps[:, None]
    groups = k // BLOCK_K if GROUPED else 1
    scales_at = x_scales + row.to(tl.int64) * groups + rows * groups
    ACC: tl.constexpr = tl.float32 if GROUPED else tl.int32
    one = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    two = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for _ in range(0, k, BLOCK_K):
        a, b = tl.load(x_at), tl.load(left)
        if PARTS == 2:
            c = tl.load(right)
        if GROUPED:
            scales = tl.load(scales_at)[:, None]
            one += tl.dot(a, b, out_dtype=tl.int32).to(tl.float32) * scales
            if PARTS == 2:
                two += tl.dot(a, c, out_dtype=tl.int32).to(tl.float32) * scales
            scales_at += 1
        else:
            one = tl.dot(a, b, one, out_dtype=tl.int32)
            if PARTS == 2:
                two = tl.dot(a, c, two, out_dtype=tl.int32)
        x_at += BLOCK_K
        left += BLOCK_K
        right += BLOCK_K
    if GROUPED:
        return one, two
    else:
        scales = tl.load(scales_at)[:, None]
        return one.to(tl.float32) * scales, two.to(tl.float32) * scales


def cases(target: tuple[int, int]) -> Iterator[Case]:
    """Yield nothing: these functions are compiled as parts of the kernels that call them."""
    return iter(())


def checks(draw: Draw) -> Iterator[Check]:
    """Yield nothing, for the same reason."""
    return iter(())
