"""`rms_norm.py` in one pass: each program keeps a few whole rows in registers."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from sana_cli.kernels import rms_norm as module
from sana_cli.kernels.cases import Case, like
from sana_cli.kernels.launch import launch, trace_launches
from sana_cli.kernels.selfcheck import Check, Draw

VALUES = 4096  # per program


def rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    if not x.is_contiguous():  # as convolutions may return it
        return x.copy_(rms_norm(x.contiguous(), weight, bias, eps, residual, activation))
    channels = x.shape[-1]
    rows, block = x.numel() // channels, triton.next_power_of_2(channels)
    rows_per_program = max(1, VALUES // block)
    launch(
        rms_norm_kernel,
        (triton.cdiv(rows, rows_per_program),),
        *(x, weight.contiguous(), bias.contiguous()),
        None if residual is None else residual.contiguous(),
        *(rows, channels, eps),
        ACTIVATION=activation,
        ROWS=rows_per_program,
        BLOCK=block,
        num_warps=4,
    )
    return x


@triton.jit
def rms_norm_kernel(
    x, weight, bias, residual, rows, channels, eps,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    column, row = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    real = column < channels
    inside = (row < rows - first)[:, None] & real[None]
    at = first * channels + row[:, None] * channels + column[None]
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(y * y, 1) / channels + eps)
    y = y * scale[:, None] * tl.load(weight + column, mask=real, other=0.0).to(tl.float32)[None]
    y += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None]
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)  # NaN stays
    if ACTIVATION == "silu":
        y = y / (1 + tl.exp(-y))
    if residual is not None:
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + at, y.to(x.dtype.element_ty), mask=inside)


def cases(target: tuple[int, int]) -> Iterator[Case]:
    for channels in (128, 256, 512, 1024):  # DC-AE's stages
        x, weight = like(1, 16, 512, channels), like(channels)
        yield from trace_launches(str(channels), target, rms_norm, x, weight, weight, 1e-5, x, None)
    x, weight = like(1, 16, 4096, 128), like(128)
    yield from trace_launches("head", target, rms_norm, x, weight, weight, 1e-5, None, "relu")


def checks(draw: Draw) -> Iterator[Check]:
    for pixels, c in ((7, 101), (33, 128), (16, 256), (5, 512), (3, 1024)):
        x, weight, bias = draw(1, 2, pixels, c, size=3.0), draw(c), draw(c)
        inputs = x, weight, bias, 1e-5
        for rest in ((draw(*x.shape), None), (None, "relu"), (None, "silu")):
            yield Check("rms_norm", rms_norm, module.rms_norm, (*inputs, *rest))
    # Channels first, as a convolution may return it.
    x = draw(1, 64, 3, 5).movedim(1, -1)
    yield Check("rms_norm", rms_norm, module.rms_norm, (x, draw(64), draw(64), 1e-5, None, None))
