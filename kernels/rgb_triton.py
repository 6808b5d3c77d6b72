"""`rgb.py` in one pass, without a float image in memory.

A program computes some pixels of one row. The three colours use 3 of 16 columns of a tensor-core
product, but the kernel is bound by reading the channels. torch reduces the extremes of the
programs, and propagates NaN.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_cli.kernels import rgb
from sana_cli.kernels.cases import Case, like
from sana_cli.kernels.launch import launch, precision, trace_launches
from sana_cli.kernels.selfcheck import Check, Draw

PIXELS = 128
BYTES = 128  # of a pixel's channels, per step
COLOURS = 16  # three, padded to the narrowest matrix product
ROUNDS = tl.constexpr(1.5 * 2**23)  # adding it to a small float32 rounds to integer, ties to even


def conv_to_rgb(
    window: Tensor, weight: Tensor, bias: Tensor, left: int, width: int, halo: bool
) -> tuple[Tensor, Tensor, Tensor]:
    window = window.contiguous()
    _, height, whole, channels = window.shape
    above = 0 if halo else 1  # rows of zero padding
    rows = height - 2 + 2 * above
    tiles, step = triton.cdiv(width, PIXELS), BYTES // window.itemsize
    pixels = window.new_empty(rows, width, 3, dtype=torch.uint8)
    extremes = window.new_empty(2, rows * tiles, dtype=torch.float32)
    launch(
        conv_to_rgb_kernel,
        (tiles, rows),
        # In the order in which the kernel reads them.
        *(window, weight.permute(2, 3, 1, 0).contiguous(), bias.contiguous(), pixels, extremes),
        *(height, whole, channels, left, width),
        ABOVE=above,
        EVEN=channels % step == 0,
        PIXELS=PIXELS,
        CHANNELS=step,
        COLOURS=COLOURS,
        PRECISION=precision(),
        num_warps=4,
        num_stages=3,
    )
    return pixels, extremes[0].amin(), extremes[1].amax()


@triton.jit
def conv_to_rgb_kernel(
    window, weight, bias, pixels, extremes, height, whole, channels, left, width,
    ABOVE: tl.constexpr, EVEN: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    COLOURS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel, colour = tl.arange(0, CHANNELS), tl.arange(0, COLOURS)
    inside = (column < width)[:, None] & (colour < 3)[None]
    total = tl.zeros((PIXELS, COLOURS), tl.float32)
    steps = tl.cdiv(channels, CHANNELS)
    for step in range(9 * steps):
        tap, start = step // steps, step % steps * CHANNELS
        source = left + column + tap % 3 - 1
        line = row + tap // 3 - ABOVE
        seen = (column < width) & (source >= 0) & (source < whole)
        if ABOVE:
            seen &= (line + column * 0 >= 0) & (line + column * 0 < height)
        at = window + line * whole * channels + start
        at += (source * channels)[:, None] + channel[None]
        taps = weight + (tap * channels + start + channel)[:, None] * 3 + colour[None]
        if EVEN:
            x = tl.load(at, mask=seen[:, None], other=0.0)
            w = tl.load(taps, mask=(colour < 3)[None], other=0.0)
        else:
            more = channel < channels - start
            x = tl.load(at, mask=seen[:, None] & more[None], other=0.0)
            w = tl.load(taps, mask=more[:, None] & (colour < 3)[None], other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
    total += tl.load(bias + colour, mask=colour < 3, other=0.0).to(tl.float32)[None]
    unit = total * 0.5 + 0.5
    nan = unit != unit
    unit = tl.minimum(tl.maximum(tl.where(nan, 0.0, unit), 0.0), 1.0)
    level = (unit * 255 + ROUNDS) - ROUNDS
    at = (row * width + column)[:, None] * 3 + colour[None]
    tl.store(pixels + at, level.to(tl.uint8), mask=inside)
    low = tl.min(tl.where(inside, unit, 1.0))
    high = tl.max(tl.where(inside, unit, 0.0))
    any_nan = tl.max((nan & inside).to(tl.int32))
    place = row * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(0) * tl.num_programs(1)
    poison = tl.where(any_nan > 0, float("nan"), 0.0)
    tl.store(extremes + place, low + poison)
    tl.store(extremes + programs + place, high + poison)


def cases(target: tuple[int, int]) -> Iterator[Case]:
    for side in (1024, 4096):
        window, weight = like(1, 18, side, 128), like(3, 128, 3, 3)
        for halo, form in ((True, "strip"), (False, "whole")):
            inputs = window, weight, like(3), 0, side, halo
            yield from trace_launches(f"{side} {form}", target, conv_to_rgb, *inputs)


def checks(draw: Draw) -> Iterator[Check]:
    for height, width, channels, left, halo in (
        (5, 131, 41, 5, True),
        (4, 144, 128, 0, True),
        (3, 140, 128, 5, False),
    ):
        weight = draw(3, channels, 3, 3, size=0.1 * channels**-0.5)
        window, bias = draw(1, height, width, channels), draw(3, size=0.1)
        inputs = window, weight, bias, left, width - 2 * left, halo
        # A value between two levels may be rounded to either.
        yield Check("conv_to_rgb", conv_to_rgb, rgb.conv_to_rgb, inputs, least=50.0)
