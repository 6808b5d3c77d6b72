"""Gradients of `kernels/depthwise_glu.py` in two passes over token-major pixels.

The first pass recomputes value and gate, as the forward kernel does, and writes their gradients,
which are the gradient of the convolution's result. The second pass propagates it through the 3x3:
each element is spread over nine pixels, and its products with the same nine pixels are its part of
the gradients of the nine weights. A program sums them over many strips and writes them once; torch
sums over the programs in a fixed order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_cli.kernels.cases import WIDTHS, Case, like
from sana_cli.kernels.convolution import by_taps
from sana_cli.kernels.depthwise_glu_triton import (
    CHANNELS,
    COLUMNS,
    ROWS,
    WARPS,
    add_row,
    depthwise_glu,
    strip_origin,
    taps,
)
from sana_cli.kernels.launch import launch, trace_launches

PROGRAMS = 2048  # approximate: enough for a large GPU, with few sums to write


def gradients(
    x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias from that of the result, (B, h, w, E)."""
    x, by_tap = x.contiguous(), by_taps(weight)
    batch, height, width, channels = x.shape
    of_y = gate_gradient(x, by_tap, bias, gradient)
    of_x = torch.empty_like(x)
    strips = batch * triton.cdiv(height, ROWS) * triton.cdiv(width, COLUMNS)
    blocks = triton.cdiv(channels, CHANNELS)
    each = triton.cdiv(strips * blocks, PROGRAMS)
    groups = triton.cdiv(strips, each)
    sums = x.new_empty(groups, 10, channels, dtype=torch.float32)
    launch(
        depthwise_gradient_kernel,
        (blocks, groups),
        *(x, by_tap, of_y, of_x, sums, height, width, channels, strips, each),
        COLUMNS=COLUMNS,
        ROWS=ROWS,
        CHANNELS=CHANNELS,
        num_warps=WARPS,
    )
    total = sums.sum(0)
    of_weight = total[:9].t().reshape(weight.shape)
    return of_x, of_weight.to(weight.dtype), total[9].to(bias.dtype)


def gate_gradient(x: Tensor, by_tap: Tensor, bias: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of the convolution, (B, h, w, 2E), from that of the gate's result.

    by_tap (9, 2E) are the weights."""
    batch, height, width, channels = x.shape
    half = channels // 2
    of_y = torch.empty_like(x)
    strips = triton.cdiv(half, CHANNELS) * triton.cdiv(width, COLUMNS)
    launch(
        gate_gradient_kernel,
        (strips, triton.cdiv(height, ROWS), batch),
        *(x, by_tap, bias.contiguous(), gradient.contiguous(), of_y, height, width, half),
        COLUMNS=COLUMNS,
        ROWS=ROWS,
        CHANNELS=CHANNELS,
        num_warps=WARPS,
    )
    return of_y


@triton.jit
def gate_gradient_kernel(
    x, weight, bias, gradient, of_y, height, width, half,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Recompute value and gate of a strip, as `depthwise_glu_kernel`, and write their gradients."""
    channel, column, first, image = strip_origin(half, COLUMNS, ROWS, CHANNELS)
    real = channel < half
    v_weights = taps(weight, channel, 2 * half, real)
    g_weights = taps(weight + half, channel, 2 * half, real)
    none = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    v_bias = none + tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    g_bias = none + tl.load(bias + half + channel, mask=real, other=0.0).to(tl.float32)
    v_above, v_here, v_below = v_bias, v_bias, v_bias
    g_above, g_here, g_below = g_bias, g_bias, g_bias
    for step in range(tl.minimum(ROWS, height - first) + 2):
        row = first + step - 1
        v_above, v_here, v_below, g_above, g_here, g_below = add_row(
            x, image, row, column, channel, height, width, half, v_weights, g_weights,
            v_above, v_here, v_below, g_above, g_here, g_below,
        )  # fmt: skip
        to = (image * height + row - 1) * width * half + column * half
        whole = real & (column < width) & (column * 0 + step >= 2)
        given = tl.load(gradient + to + channel, mask=whole, other=0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-g_above))
        v_given = given * g_above * sigmoid
        g_given = given * v_above * sigmoid * (1 + g_above * (1 - sigmoid))
        at = of_y + 2 * to + channel
        tl.store(at, v_given.to(of_y.dtype.element_ty), mask=whole)
        tl.store(at + half, g_given.to(of_y.dtype.element_ty), mask=whole)
        v_above, v_here, v_below = v_here, v_below, v_bias
        g_above, g_here, g_below = g_here, g_below, g_bias


@triton.jit
def depthwise_gradient_kernel(
    x, weight, of_y, of_x, sums, height, width, channels, strips, each,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of x in `each` strips, and sums of those of the weights and the bias."""
    channel = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS))[None]
    real = channel < channels
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    # Named by kernel row and column; s are the sums of the gradients of w.
    w00, w01, w02, w10, w11, w12, w20, w21, w22 = taps(weight, channel, channels, real)
    none = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    s00, s01, s02, s10, s11, s12, s20, s21, s22 = (
        none, none, none, none, none, none, none, none, none,
    )  # fmt: skip
    of_bias = none
    begin = tl.program_id(1) * each
    for strip in range(begin, tl.minimum(begin + each, strips)):
        column = (strip % across * COLUMNS + tl.arange(0, COLUMNS))[:, None]
        first = strip // across % down * ROWS
        image = (strip // (across * down)).to(tl.int64)
        rows = tl.minimum(ROWS, height - first)
        inside = real & (column < width)
        left, right = inside & (column > 0), real & (column + 1 < width)
        at = (image * height + first - 1) * width * channels + column * channels + channel
        # Of the row above the one whose gradient is read, of this row, and of the row below.
        above, here, below = none, none, none
        x_above, x_here, x_below = none, none, none
        for step in range(rows + 2):
            row = first + step - 1
            seen = (column * 0 + row >= 0) & (column * 0 + row < height)
            d0 = tl.load(of_y + at - channels, mask=left & seen, other=0.0).to(tl.float32)
            d1 = tl.load(of_y + at, mask=inside & seen, other=0.0).to(tl.float32)
            d2 = tl.load(of_y + at + channels, mask=right & seen, other=0.0).to(tl.float32)
            mine = inside & (column * 0 + step < rows)
            x_below = tl.load(x + at + width * channels, mask=mine, other=0.0).to(tl.float32)
            above += d2 * w00 + d1 * w01 + d0 * w02
            here += d2 * w10 + d1 * w11 + d0 * w12
            below += d2 * w20 + d1 * w21 + d0 * w22
            s00 += d2 * x_above
            s01 += d1 * x_above
            s02 += d0 * x_above
            s10 += d2 * x_here
            s11 += d1 * x_here
            s12 += d0 * x_here
            s20 += d2 * x_below
            s21 += d1 * x_below
            s22 += d0 * x_below
            of_bias += tl.where((step > 0) & (step <= rows), d1, 0.0)
            made = inside & (column * 0 + step >= 2)
            tl.store(of_x + at - width * channels, above.to(of_x.dtype.element_ty), mask=made)
            above, here, below = here, below, none
            x_above, x_here = x_here, x_below
            at += width * channels
    to = sums + tl.program_id(1) * 10 * channels + channel
    keep(to, s00, real)
    keep(to + channels, s01, real)
    keep(to + 2 * channels, s02, real)
    keep(to + 3 * channels, s10, real)
    keep(to + 4 * channels, s11, real)
    keep(to + 5 * channels, s12, real)
    keep(to + 6 * channels, s20, real)
    keep(to + 7 * channels, s21, real)
    keep(to + 8 * channels, s22, real)
    keep(to + 9 * channels, of_bias, real)


@triton.jit
def keep(at, columns, real):
    tl.store(at, tl.sum(columns, 0)[None], mask=real)


# Batch, height, width and E of the bundled model at both sizes, and of the 0.6B.
SHAPES = {"demo 256²": (512, 8, 8, 560), "demo 512²": (192, 16, 16, 560)}
SHAPES["0.6B 1024²"] = (8, 32, 32, 5 * WIDTHS["0.6B"] // 2)


def cases(target: tuple[int, int]) -> Iterator[Case]:
    for model, (batch, height, width, e) in SHAPES.items():
        narrow = torch.bfloat16
        x = like(batch, height, width, 2 * e, dtype=narrow)
        gradient = like(batch, height, width, e, dtype=narrow)
        # A model with float32 weights under autocast.
        weight = like(2 * e, 1, 3, 3, dtype=torch.float32)
        bias = like(2 * e, dtype=torch.float32)
        label = f"training {model}"
        yield from trace_launches(label, target, depthwise_glu, x, weight, bias, False)
        yield from trace_launches(label, target, gradients, x, weight, bias, gradient)
