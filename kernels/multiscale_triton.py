"""`multiscale.py` in one pass: the result of the depthwise convolution never reaches memory.

A program computes one group of channels of a tile of pixels. Neighbouring taps read mostly the same
pixels, from the L1 cache; the 1x1 convolution within the group is one matrix product.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from sana_cli.kernels import multiscale
from sana_cli.kernels.cases import Case, like
from sana_cli.kernels.convolution import by_taps
from sana_cli.kernels.launch import launch, precision, trace_launches
from sana_cli.kernels.selfcheck import Check, Draw

ROWS, COLUMNS = 8, 16  # of a tile
MIN_GROUP = 16  # sides of the smallest matrix product


def aggregate(window: Tensor, depth: Tensor, point: Tensor, out: Tensor) -> Tensor:
    if window.stride(3) != 1:
        window = window.contiguous()
    if out.stride(3) != 1:
        return out.copy_(aggregate(window, depth, point, out.contiguous()))
    batch, height, width, channels = out.shape
    kernel, group = depth.shape[-1], point.shape[1]
    reach = (window.shape[1] - height) // 2
    tiles = triton.cdiv(height, ROWS) * triton.cdiv(width, COLUMNS)
    launch(
        aggregate_kernel,
        (channels // group, tiles, batch),
        *(window, by_taps(depth), point.contiguous(), out),
        *(reach - kernel // 2, height, width, channels),
        *(*window.stride()[:3], *out.stride()[:3]),
        HALO=reach > 0,
        KERNEL=kernel,
        GROUP=group,
        BLOCK=max(MIN_GROUP, triton.next_power_of_2(group)),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        PRECISION=precision(),
        num_warps=4,
    )
    return out


@triton.jit
def aggregate_kernel(
    window, depth, point, out, above, height, width, channels,
    window_image, window_row, window_pixel, out_image, out_row, out_pixel,
    HALO: tl.constexpr, KERNEL: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, COLUMNS)
    top = tl.program_id(1) // across * ROWS
    left = tl.program_id(1) % across * COLUMNS
    image = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * GROUP  # channel
    pixel, channel = tl.arange(0, ROWS * COLUMNS), tl.arange(0, BLOCK)
    row, column = pixel // COLUMNS, pixel % COLUMNS
    real = channel < GROUP
    inside = (row < height - top) & (column < width - left)
    # The origin of a tile has 64 bits, as maps may exceed 2^31 elements; offsets have 32.
    window += image * window_image + (top + above).to(tl.int64) * window_row + first
    window += (left - KERNEL // 2) * window_pixel
    at = (row * window_row + column * window_pixel)[:, None] + channel[None]
    taps = depth + first + channel
    total = tl.zeros((ROWS * COLUMNS, BLOCK), tl.float32)
    for down in range(KERNEL):
        for over in tl.static_range(KERNEL):
            near = left + column + (over - KERNEL // 2)
            seen = inside & (near >= 0) & (near < width)
            if not HALO:
                source = top + above + down + row
                seen &= (source >= 0) & (source < height)
            x = tl.load(
                window + over * window_pixel + at, mask=seen[:, None] & real[None], other=0.0
            )
            tap = tl.load(taps, mask=real, other=0.0)
            total += x.to(tl.float32) * tap.to(tl.float32)[None]
            taps += channels
        window += window_row
    # The weights of the group, with input channels as rows.
    weight = tl.load(
        point + (first + channel)[None] * GROUP + channel[:, None],
        mask=real[:, None] & real[None],
        other=0.0,
    )
    y = tl.dot(total.to(weight.dtype), weight, input_precision=PRECISION)
    out += image * out_image + top.to(tl.int64) * out_row + left * out_pixel + first
    at = (row * out_row + column * out_pixel)[:, None] + channel[None]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside[:, None] & real[None])


def cases(target: tuple[int, int]) -> Iterator[Case]:
    for channels, side in ((1024, 32), (512, 128)):  # of DC-AE's attention stages
        for roles, label in ((1, "queries"), (2, "keys and values")):
            c = roles * channels
            out = like(1, 16, side, 2 * c)[..., c:]
            weights = like(c, 1, 5, 5), like(c, 32, 1, 1)
            for rows, form in ((20, "strip"), (16, "whole")):
                of = f"{channels} {label} {form}"
                window = like(1, rows, side, c)
                yield from trace_launches(of, target, aggregate, window, *weights, out)


def checks(draw: Draw) -> Iterator[Check]:
    for height, width, groups, reach in ((9, 17, 3, 2), (16, 16, 2, 2), (9, 17, 2, 0)):
        c = 32 * groups
        weights = draw(c, 1, 5, 5, size=1 / 5), draw(c, 32, 1, 1, size=32**-0.5)
        out = draw(2, height, width, 2 * c)[..., c:]
        inputs = draw(2, height + 2 * reach, width, c), *weights, out
        yield Check("aggregate", aggregate, multiscale.aggregate, inputs)
