"""`modulation.py` in one pass: each program keeps a whole row in registers."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from sana_cli.kernels import modulation
from sana_cli.kernels.cases import WIDTHS, Case, like
from sana_cli.kernels.launch import launch, trace_launches
from sana_cli.kernels.rows8 import Rows8
from sana_cli.kernels.rows8_triton import new_rows8, round_rows
from sana_cli.kernels.selfcheck import QUANTISED, Check, Draw


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    out = x.new_empty(x.shape)
    _launch(x, shift, scale, out, None, eps)
    return out


def modulate8(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Rows8:
    rows = new_rows8(x, tuple(x.shape[:-1]), x.shape[-1], grouped=False)
    _launch(x, shift, scale, rows.values, rows.scales, eps)
    return rows


def _launch(
    x: Tensor, shift: Tensor, scale: Tensor, out: Tensor, scales: Tensor | None, eps: float
) -> None:
    x, width = x.contiguous(), x.shape[-1]
    launch(
        modulate_kernel,
        (x.numel() // width,),
        *(x, shift.contiguous(), scale.contiguous(), out, scales, width, out.shape[-1], eps),
        BLOCK=triton.next_power_of_2(out.shape[-1]),
        num_warps=4 if width <= 2048 else 8,
    )


@triton.jit
def modulate_kernel(x, shift, scale, out, scales, width, out_width, eps, BLOCK: tl.constexpr):
    """With `scales`, out is int8, and has zeros from `width` to `out_width`."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    start = tl.program_id(0).to(tl.int64) * width
    row = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
    row = tl.where(inside, row - tl.sum(row, 0) / width, 0.0)
    row *= tl.rsqrt(tl.sum(row * row, 0) / width + eps)
    factor = 1 + tl.load(scale + columns, mask=inside, other=0.0).to(tl.float32)
    row = row * factor + tl.load(shift + columns, mask=inside, other=0.0).to(tl.float32)
    if scales is None:
        tl.store(out + start + columns, row.to(out.dtype.element_ty), mask=inside)
    else:
        values, scale_of_row = round_rows(row[None])
        at = out + tl.program_id(0).to(tl.int64) * out_width + columns[None]
        tl.store(at, values, mask=(columns < out_width)[None])
        tl.store(scales + tl.program_id(0) + tl.arange(0, 1), scale_of_row)


def cases(target: tuple[int, int]) -> Iterator[Case]:
    for model, d in WIDTHS.items():
        x = like(2, 1024, d)
        inputs = x, like(d), like(d), 1e-6
        yield from trace_launches(model, target, modulate, *inputs)
        yield from trace_launches(f"int8 {model}", target, modulate8, *inputs)


def checks(draw: Draw) -> Iterator[Check]:
    for tokens, d in ((7, 99), *((2, d) for d in WIDTHS.values())):
        x, scale = draw(2, tokens, d) + 3, draw(d)  # LayerNorm removes the mean
        inputs = x, draw(d), scale, 1e-6
        yield Check("modulate", modulate, modulation.modulate, inputs)
        yield Check("modulate8", modulate8, modulation.modulate8, inputs, QUANTISED)
