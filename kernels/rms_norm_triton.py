"""`rms_norm.py` in one pass: each program keeps a few whole rows in registers."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from sana_cli.kernels.cases import WIDTHS, Case, like
from sana_cli.kernels.launch import launch, trace_launches

VALUES = 4096  # per program


def rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    if not x.is_contiguous():
        raise ValueError("x is updated in place and must be contiguous")
    channels = x.shape[-1]
    rows, block = x.numel() // channels, triton.next_power_of_2(channels)
    rows_per_program = max(1, VALUES // block)
    launch(
        rms_norm_kernel,
        (triton.cdiv(rows, rows_per_program),),
        *(x, weight, bias, None if residual is None else residual.contiguous()),
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
    if bias is not None:
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
    for model in ("0.6B", "1.6B"):  # of Sana-Sprint and SANA-1.5
        x, weight = like(1, 1024, WIDTHS[model]), like(WIDTHS[model])
        of = f"queries {model}"
        yield from trace_launches(of, target, rms_norm, x, weight, None, 1e-5, None, None)
