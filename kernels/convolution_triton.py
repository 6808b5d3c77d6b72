"""`convolution.py` as matrix products whose left operand is never built (implicit GEMM).

A row of the product is a pixel, a column an output channel, and the sum runs over the taps and
their channels. Every step reads STEP channels of one tap: the same rows of the map, shifted.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_cli.kernels import convolution
from sana_cli.kernels.cases import Case, like
from sana_cli.kernels.convolution import NORMED, STEP, TILE, new_map
from sana_cli.kernels.launch import launch, precision, trace_launches
from sana_cli.kernels.projection_triton import GROUP, Blocks, tile_origin
from sana_cli.kernels.selfcheck import Check, Draw, least

USUAL, USUAL32 = Blocks(128, TILE, STEP, 8, 3), Blocks(32, TILE, 32, 8, 2)
# All channels of a pixel, for the norm.
WIDE, WIDE32 = Blocks(64, 256, STEP, 8, 3), Blocks(16, 256, 32, 8, 2)


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _launch(x, weight, bias, None, None, None, 0.0, (USUAL, USUAL32))


def conv_norm_add(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, eps: float, residual: Tensor
) -> Tensor:
    residual = residual.contiguous(memory_format=torch.channels_last)
    blocks = (USUAL, USUAL32) if len(weight) == TILE else (WIDE, WIDE32)
    return _launch(x, weight, None, scale, shift, residual, eps, blocks)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    eps: float,
    tiles: tuple[Blocks, Blocks],
) -> Tensor:
    """Launch with one of `tiles`: in 16 bits and in float32."""
    blocks = tiles[x.dtype == torch.float32]
    batch, channels, height, width = x.shape
    n, m = len(weight), batch * height * width
    out = new_map(x, (batch, n, height, width))
    launch(
        conv_kernel,
        (triton.cdiv(m, blocks.m) * triton.cdiv(n, blocks.n),),
        x.contiguous(memory_format=torch.channels_last),
        weight.contiguous(memory_format=torch.channels_last),
        *(bias, scale, shift, residual, out, m, n, height, width, channels, eps),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        GROUP=GROUP,
        PRECISION=precision(),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return out


def upsample(x: Tensor, upper: Tensor, lower: Tensor, bias: Tensor, repeats: int | None) -> Tensor:
    blocks = USUAL32 if x.dtype == torch.float32 else USUAL
    batch, channels, height, width = x.shape
    n, m = len(upper) // 2, batch * height * width
    out = new_map(x, (batch, n, 2 * height, 2 * width))
    x = x.contiguous(memory_format=torch.channels_last)
    for below, weight in enumerate((upper, lower)):
        launch(
            upsample_kernel,
            (triton.cdiv(m, blocks.m) * (2 * n // blocks.n),),
            *(x, weight.contiguous(memory_format=torch.channels_last), bias.contiguous()),
            *(out[:, :, below::2], m, n, height, width, channels, repeats),
            BELOW=below,
            BLOCK_M=blocks.m,
            BLOCK_N=blocks.n,
            BLOCK_K=blocks.k,
            GROUP=GROUP,
            PRECISION=precision(),
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return out


@triton.jit
def conv_kernel(
    x, weight, bias, scale, shift, residual, out, m, n, height, width, channels, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """With `residual`, of which a tile has all channels, normalise and add; else apply SiLU."""
    row, column = tile_origin(m, n, BLOCK_M, BLOCK_N, GROUP)
    y = add_taps(
        x, weight, row, column, m, n, height, width, channels, 0, 0, 3, BLOCK_M, BLOCK_N, BLOCK_K,
        PRECISION,
    )  # fmt: skip
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    right = columns < n - column
    inside = (rows < m - row)[:, None] & right[None]
    at = row.to(tl.int64) * n + column + rows[:, None] * n + columns[None]
    if residual is not None:
        factor = tl.rsqrt(tl.sum(y * y, 1) / n + eps)
        y *= factor[:, None] * tl.load(scale + columns).to(tl.float32)[None]
        y += tl.load(shift + columns).to(tl.float32)[None]
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    else:
        y += tl.load(bias + column + columns, mask=right, other=0.0).to(tl.float32)[None]
        y = y / (1 + tl.exp(-y))
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def upsample_kernel(
    x, weight, bias, out, m, n, height, width, channels, repeats,
    BELOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Make every second row, those that BELOW of a pixel (0 or 1), whose first element is at `out`.

    A tile has even or odd columns only.
    """
    row, column = tile_origin(m, 2 * n, BLOCK_M, BLOCK_N, GROUP)
    odd = column // n
    y = add_taps(
        x, weight, row, column, m, 2 * n, height, width, channels, BELOW, odd, 2, BLOCK_M, BLOCK_N,
        BLOCK_K, PRECISION,
    )  # fmt: skip
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = (rows < m - row)[:, None]
    y += tl.load(bias + column + columns).to(tl.float32)[None]
    columns += column - odd * n
    if repeats is not None:
        channel = (4 * columns + 2 * BELOW + odd) // repeats
        at = x + row.to(tl.int64) * channels + rows[:, None] * channels + channel[None]
        y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    pixel = (row + rows).to(tl.int64)
    at = (4 * pixel - 2 * (pixel % width) + odd)[:, None] * n + columns[None]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_taps(
    x, weight, row, column, m, n, height, width, channels, down, right, SIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute a tile of a SIDE x SIDE convolution whose first tap is at (down - 1, right - 1)."""
    rows, columns, steps = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # Indices beyond the end are clamped: see `projection_triton.matmul_tile`.
    near = tl.minimum(rows, m - 1 - row)
    pixel = row + near
    line, place = pixel // width % height, pixel % width
    total_k = SIDE * SIDE * channels
    x_at = x + row.to(tl.int64) * channels + near[:, None] * channels + steps[None]
    weight_at = weight + column.to(tl.int64) * total_k + steps[:, None]
    weight_at += tl.minimum(columns, n - 1 - column)[None] * total_k
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, total_k, BLOCK_K):
        tap = start // channels
        below, beside = down - 1 + tap // SIDE, right - 1 + tap % SIDE
        seen = (line + below >= 0) & (line + below < height)
        seen &= (place + beside >= 0) & (place + beside < width)
        away = (below * width + beside - tap) * channels + start
        a = tl.load(x_at + away, mask=seen[:, None], other=0.0)
        y = tl.dot(a, tl.load(weight_at), y, input_precision=PRECISION)
        weight_at += BLOCK_K
    return y


def cases(target: tuple[int, int]) -> Iterator[Case]:
    for c, side in ((128, 1024), (256, 512), (512, 256)):  # DC-AE's residual blocks, at 1024²
        x = like(1, c, side, side).contiguous(memory_format=torch.channels_last)
        weight, vector = like(c, c, 3, 3), like(c)
        yield from trace_launches(f"silu {c}", target, conv_silu, x, weight, vector)
        if c in NORMED:
            inputs = x, weight, vector, vector, 1e-5, x
            yield from trace_launches(f"norm {c}", target, conv_norm_add, *inputs)
    for c, side in ((256, 512), (512, 256), (1024, 128)):
        x = like(1, c, side, side).contiguous(memory_format=torch.channels_last)
        weight = like(c, c, 2, 2)
        yield from trace_launches(f"{c} {side}", target, upsample, x, weight, weight, like(c), 2)


def checks(draw: Draw) -> Iterator[Check]:
    for channels, out, height, width in ((64, 128, 5, 7), (64, 40, 3, 50), (64, 256, 2, 33)):
        x, residual = (
            draw(2, c, height, width).contiguous(memory_format=torch.channels_last)
            for c in (channels, out)
        )
        weight, bias = draw(out, channels, 3, 3, size=(9 * channels) ** -0.5), draw(out)
        needed, inputs = least(x.dtype, 9 * channels), (x, weight, bias)
        yield Check("conv_silu", conv_silu, convolution.conv_silu, inputs, needed)
        if out in NORMED:
            more = x, weight, bias, draw(out), 1e-5, residual
            yield Check("conv_norm_add", conv_norm_add, convolution.conv_norm_add, more, needed)
    for out, height, width, repeats in ((128, 5, 7, 8), (256, 9, 16, None), (128, 2, 33, 4)):
        channels = 64 if repeats is None else 4 * out // repeats
        x = draw(2, channels, height, width).contiguous(memory_format=torch.channels_last)
        size = (4 * channels) ** -0.5
        weights = draw(2 * out, channels, 2, 2, size=size), draw(2 * out, channels, 2, 2, size=size)
        rest, needed = (draw(2 * out), repeats), least(x.dtype, 4 * channels)
        yield Check("upsample", upsample, convolution.upsample, (x, *weights, *rest), needed)
