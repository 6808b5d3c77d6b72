"""`depthwise_glu.py` in one pass over token-major pixels.

A program moves down a strip of columns. Each row it reads contributes to three output rows, so a
pixel is loaded for its left, middle and right neighbour once and not again for the rows above.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from sana_cli.kernels import depthwise_glu as module
from sana_cli.kernels.cases import WIDTHS, Case, like
from sana_cli.kernels.convolution import by_taps
from sana_cli.kernels.launch import launch, trace_launches
from sana_cli.kernels.rows8 import GROUP, Rows8
from sana_cli.kernels.rows8_triton import new_rows8, round_rows
from sana_cli.kernels.selfcheck import QUANTISED, Check, Draw

# Per program. A thread has two channels and keeps their 36 weights in registers. With four
# channels it would need 150 registers instead of 95, and three programs instead of five would fit.
COLUMNS, ROWS, CHANNELS, WARPS = 8, 8, 32, 4


def depthwise_glu(x: Tensor, weight: Tensor, bias: Tensor, halo: bool) -> Tensor:
    batch, height, width, channels = x.shape
    above = 0 if halo else 1  # rows of zero padding
    out = x.new_empty(batch, height - 2 + 2 * above, width, channels // 2)
    _launch(x, weight, bias, out, None, above, (COLUMNS, CHANNELS))
    return out


def depthwise_glu8(x: Tensor, weight: Tensor, bias: Tensor) -> Rows8:
    batch, height, width, channels = x.shape
    rows = new_rows8(x, (batch, height * width), channels // 2, grouped=True)
    out = rows.values.view(batch, height, width, -1)
    # A program has all channels of a scale, and as many pixels as without.
    _launch(x, weight, bias, out, rows.scales, 1, (COLUMNS * CHANNELS // GROUP, GROUP))
    return rows


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    scales: Tensor | None,
    above: int,
    tile: tuple[int, int],
) -> None:
    batch, height, width, channels = x.shape
    columns, block = tile
    blocks = triton.cdiv(channels // 2, block)
    launch(
        depthwise_glu_kernel,
        (blocks * triton.cdiv(width, columns), triton.cdiv(out.shape[1], ROWS), batch),
        *(x.contiguous(), by_taps(weight), bias.contiguous(), out, scales),
        *(height, width, channels // 2),
        ABOVE=above,
        COLUMNS=columns,
        ROWS=ROWS,
        CHANNELS=block,
        num_warps=WARPS,
    )


@triton.jit
def depthwise_glu_kernel(
    x, weight, bias, out, scales, height, width, half,
    ABOVE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """With `scales`, one for each pixel and CHANNELS channels, out is int8 and padded to whole
    blocks of channels."""
    channel, column, first, image = strip_origin(half, COLUMNS, ROWS, CHANNELS)
    real = channel < half
    v_weights = taps(weight, channel, 2 * half, real)
    g_weights = taps(weight + half, channel, 2 * half, real)
    none = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    v_bias = none + tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    g_bias = none + tl.load(bias + half + channel, mask=real, other=0.0).to(tl.float32)
    # Sums of the output rows above, at and below the row being read.
    v_above, v_here, v_below = v_bias, v_bias, v_bias
    g_above, g_here, g_below = g_bias, g_bias, g_bias
    rows_out = height - 2 + 2 * ABOVE
    for step in range(tl.minimum(ROWS, rows_out - first) + 2):
        row = first + step - ABOVE
        v_above, v_here, v_below, g_above, g_here, g_below = add_row(
            x, image, row, column, channel, height, width, half, v_weights, g_weights,
            v_above, v_here, v_below, g_above, g_here, g_below,
        )  # fmt: skip
        y = v_above * (g_above / (1 + tl.exp(-g_above)))
        row_out = (image * rows_out + first + step - 2) * width
        whole = (column < width) & (column * 0 + step >= 2)
        if scales is None:
            to = out + row_out * half + column * half + channel
            tl.store(to, y.to(out.dtype.element_ty), mask=real & whole)
        else:
            values, of_pixels = round_rows(y)
            blocks = tl.cdiv(half, CHANNELS)
            to = out + (row_out + column) * (blocks * CHANNELS) + channel
            tl.store(to, values, mask=whole & (channel >= 0))
            to = scales + (row_out + column) * blocks + tl.program_id(0) % blocks
            tl.store(to, of_pixels[:, None], mask=whole)
        v_above, v_here, v_below = v_here, v_below, v_bias
        g_above, g_here, g_below = g_here, g_below, g_bias


@triton.jit
def strip_origin(half, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return channels (1, CHANNELS), columns (COLUMNS, 1), first row and image of a strip."""
    blocks = tl.cdiv(half, CHANNELS)
    channel = (tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS))[None]
    column = (tl.program_id(0) // blocks * COLUMNS + tl.arange(0, COLUMNS))[:, None]
    return channel, column, tl.program_id(1) * ROWS, tl.program_id(2).to(tl.int64)


@triton.jit
def add_row(
    x, image, row, column, channel, height, width, half, v_weights, g_weights,
    v_above, v_here, v_below, g_above, g_here, g_below,
):  # fmt: skip
    """Add a row of pixels to the sums of the three output rows that it contributes to."""
    at = x + (image * height + row) * width * (2 * half) + column * (2 * half) + channel
    inside = (channel < half) & (column < width)
    inside &= (column * 0 + row >= 0) & (column * 0 + row < height)
    left, right = inside & (column > 0), inside & (column + 1 < width)
    v0 = tl.load(at - 2 * half, mask=left, other=0.0).to(tl.float32)
    g0 = tl.load(at - half, mask=left, other=0.0).to(tl.float32)
    v1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    g1 = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    v2 = tl.load(at + 2 * half, mask=right, other=0.0).to(tl.float32)
    g2 = tl.load(at + 3 * half, mask=right, other=0.0).to(tl.float32)
    v00, v01, v02, v10, v11, v12, v20, v21, v22 = v_weights
    g00, g01, g02, g10, g11, g12, g20, g21, g22 = g_weights
    v_above += v0 * v20 + v1 * v21 + v2 * v22
    g_above += g0 * g20 + g1 * g21 + g2 * g22
    v_here += v0 * v10 + v1 * v11 + v2 * v12
    g_here += g0 * g10 + g1 * g11 + g2 * g12
    v_below += v0 * v00 + v1 * v01 + v2 * v02
    g_below += g0 * g00 + g1 * g01 + g2 * g02
    return v_above, v_here, v_below, g_above, g_here, g_below


@triton.jit
def taps(weight, channel, channels, real):
    """Return the nine weights of each channel, row by row of the 3x3; weight is (9, channels)."""
    at = weight + channel
    return (
        tl.load(at, mask=real, other=0.0).to(tl.float32),
        tl.load(at + channels, mask=real, other=0.0).to(tl.float32),
        tl.load(at + 2 * channels, mask=real, other=0.0).to(tl.float32),
        tl.load(at + 3 * channels, mask=real, other=0.0).to(tl.float32),
        tl.load(at + 4 * channels, mask=real, other=0.0).to(tl.float32),
        tl.load(at + 5 * channels, mask=real, other=0.0).to(tl.float32),
        tl.load(at + 6 * channels, mask=real, other=0.0).to(tl.float32),
        tl.load(at + 7 * channels, mask=real, other=0.0).to(tl.float32),
        tl.load(at + 8 * channels, mask=real, other=0.0).to(tl.float32),
    )


def cases(target: tuple[int, int]) -> Iterator[Case]:
    for model, d in WIDTHS.items():
        e = 5 * d // 2
        x, weight, bias = like(2, 32, 32, 2 * e), like(2 * e, 1, 3, 3), like(2 * e)
        for halo in (False, True):
            label = f"{model}, halo" if halo else model
            yield from trace_launches(label, target, depthwise_glu, x, weight, bias, halo)
        yield from trace_launches(f"int8 {model}", target, depthwise_glu8, x, weight, bias)


def checks(draw: Draw) -> Iterator[Check]:
    for height, width, half in ((3, 5, 41), (9, 16, 64)):
        weight, bias = draw(2 * half, 1, 3, 3, size=1 / 3), draw(2 * half)
        for halo in (False, True):
            x = draw(2, height + 2 * halo, width, 2 * half)
            inputs = x, weight, bias, halo
            yield Check("depthwise_glu", depthwise_glu, module.depthwise_glu, inputs)
        rest = module.depthwise_glu8, (draw(2, height, width, 2 * half), weight, bias)
        yield Check("depthwise_glu8", depthwise_glu8, *rest, QUANTISED)
