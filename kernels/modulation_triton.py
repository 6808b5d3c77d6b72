"""`modulation.py` in one pass: each program keeps a whole row in registers."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from sana_cli.kernels import modulation
from sana_cli.kernels.cases import WIDTHS, Case, like
from sana_cli.kernels.launch import launch, trace_launches
from sana_cli.kernels.selfcheck import Check, Draw


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    out = x.new_empty(x.shape)
    width = x.shape[-1]
    launch(
        modulate_kernel,
        (x.numel() // width,),
        *(x, shift.contiguous(), scale.contiguous(), out, width, eps),
        BLOCK=triton.next_power_of_2(width),
        num_warps=4 if width <= 2048 else 8,
    )
    return out


@triton.jit
def modulate_kernel(x, shift, scale, out, width, eps, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    start = tl.program_id(0).to(tl.int64) * width
    row = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
    row = tl.where(inside, row - tl.sum(row, 0) / width, 0.0)
    row *= tl.rsqrt(tl.sum(row * row, 0) / width + eps)
    factor = 1 + tl.load(scale + columns, mask=inside, other=0.0).to(tl.float32)
    row = row * factor + tl.load(shift + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + columns, row.to(out.dtype.element_ty), mask=inside)


def cases(target: tuple[int, int]) -> Iterator[Case]:
    for model, d in WIDTHS.items():
        x = like(2, 1024, d)
        yield from trace_launches(model, target, modulate, x, like(d), like(d), 1e-6)


def checks(draw: Draw) -> Iterator[Check]:
    for tokens, d in ((7, 99), *((2, d) for d in WIDTHS.values())):
        x, scale = draw(2, tokens, d) + 3, draw(d)  # LayerNorm removes the mean
        inputs = x, draw(d), scale, 1e-6
        yield Check("modulate", modulate, modulation.modulate, inputs)
