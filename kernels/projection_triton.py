"""Matrix products with the elementwise operations of `projection.py` in their epilogue.

Every program computes one tile of the result, in float32 until it is stored. Programs are numbered
so that those that run at the same time share rows and columns, which they then find in the L2.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_cli.kernels import projection
from sana_cli.kernels.cases import TOKENS, WIDTHS, Case, like, like_rows8, like_weight8
from sana_cli.kernels.launch import (
    capability,
    launch,
    precision,
    sums_in_half,
    trace_launches,
)
from sana_cli.kernels.rows8 import Rows8, Weight8, quantise, quantise_weight
from sana_cli.kernels.rows8_triton import Blocks8, block_shapes8, matmul_tile8
from sana_cli.kernels.selfcheck import HALF_SUMS, Check, Draw, least
from sana_cli.kernels.tiles import Product, choose


class Blocks(NamedTuple):
    """A tile of m x n, computed in steps of k."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    resident: int = 1  # see `tiles.Shape`

    @property
    def tile(self) -> tuple[int, int]:
        return self.m, self.n


# `tiles.choose` takes one of them for a size. They fit: no register spills, and the operands of as
# many steps as there are stages (before Hopper one fewer) in shared memory, which has 99 KB on
# consumer GPUs, 163 KB on A100, and 227 KB on Hopper and data-centre Blackwell.
SMALL = (Blocks(128, 64, 64, 4, 3, 2), Blocks(64, 64, 64, 4, 4, 2))
CONSUMER = (Blocks(128, 128, 64, 8, 4), *SMALL)
LARGE = (Blocks(128, 256, 64, 8, 3), Blocks(128, 128, 64, 8, 4), *SMALL)
BY_CAPABILITY = {(8, 0): LARGE, (9, 0): LARGE, (10, 0): LARGE}
FLOAT32 = Blocks(64, 64, 32, 4, 3)
SILU_WIDEST = 256  # columns of a tile
RESIDUAL_WIDEST = 128  # the tile of x leaves no registers for more
HALF_MAX: tl.constexpr = tl.constexpr(65504.0)
GROUP = 8  # rows of tiles that are traversed together


def block_shapes(dtype: torch.dtype, target: tuple[int, int], widest: int) -> list[Blocks]:
    """Return the block shapes on a GPU of capability `target`, of at most `widest` columns."""
    if dtype == torch.float32:
        return [FLOAT32]
    shapes = BY_CAPABILITY.get(target, CONSUMER)
    return [blocks for blocks in shapes if blocks.n <= widest]


def choose_blocks(
    kernel: str,
    x: Tensor | Rows8,
    weight: Tensor | Weight8,
    widest: int,
    run: Callable[[Any], object] | None = None,
) -> Any:
    """Choose the block shape for x·weightᵀ, with tiles of at most `widest` columns; see
    `tiles.choose`."""
    shapes: Sequence[Blocks | Blocks8]
    if isinstance(x, Rows8):
        kernel, values = f"{kernel}8", x.values
        shapes = block_shapes8(x, capability(values.device))
    else:
        values = x
        shapes = block_shapes(x.dtype, capability(x.device), widest)
    n, k = (weight.values if isinstance(weight, Weight8) else weight).shape
    half_sums = sums_in_half(values)
    product = Product(1, values.numel() // k, n, k, values.itemsize, half_sums)
    if half_sums:  # which elements are computed again depends on the shape
        run = None
    return choose(kernel, product, shapes, values, run)


def linear_silu(
    x: Tensor | Rows8,
    weight: Tensor | Weight8,
    bias: Tensor,
    blocks: Blocks | Blocks8 | None = None,
) -> Tensor:
    """`blocks` are chosen for the size unless given."""
    if blocks is None:
        run = partial(linear_silu, x, weight, bias)
        blocks = choose_blocks("linear_silu", x, weight, SILU_WIDEST, run)
    bias = bias.contiguous()
    if isinstance(x, Rows8):
        assert isinstance(weight, Weight8)
        out = bias.new_empty(*x.values.shape[:-1], len(weight.values))
        _launch8(linear_silu8_kernel, x, weight, (bias, out), blocks)
        return out
    assert isinstance(weight, Tensor)
    out = x.new_empty(*x.shape[:-1], len(weight))
    _launch(linear_silu_kernel, x.contiguous(), weight, (bias, out), blocks)
    return out


def gated_residual_linear_(
    x: Tensor,
    y: Tensor | Rows8,
    weight: Tensor | Weight8,
    bias: Tensor | None,
    gate: Tensor | None,
    blocks: Blocks | Blocks8 | None = None,
) -> Tensor:
    """`blocks` are chosen for the size unless given."""
    if not x.is_contiguous():
        return x.copy_(gated_residual_linear_(x.contiguous(), y, weight, bias, gate, blocks))
    if blocks is None:

        def run(blocks: Blocks | Blocks8) -> None:
            gated_residual_linear_(torch.empty_like(x), y, weight, bias, gate, blocks)

        blocks = choose_blocks("gated_residual_linear_", y, weight, RESIDUAL_WIDEST, run)
    bias, gate = (None if part is None else part.contiguous() for part in (bias, gate))
    rest = bias, gate, x
    if isinstance(y, Rows8):
        assert isinstance(weight, Weight8)
        _launch8(gated_residual_linear8_kernel, y, weight, rest, blocks)
        return x
    assert isinstance(weight, Tensor)
    _launch(gated_residual_linear_kernel, y.contiguous(), weight, rest, blocks)
    return x


def _launch(
    kernel: triton.JITFunction,
    x: Tensor,
    weight: Tensor,
    rest: tuple,
    blocks: Blocks | Blocks8,
) -> None:
    n, k = weight.shape
    m = x.numel() // k
    launch(
        kernel,
        (triton.cdiv(m, blocks.m) * triton.cdiv(n, blocks.n),),
        *(x, weight.contiguous(), *rest, m, n, k),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        EVEN=k % blocks.k == 0,
        GROUP=GROUP,
        HALF_SUMS=sums_in_half(x),
        PRECISION=precision(),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


def _launch8(
    kernel: triton.JITFunction,
    x: Rows8,
    weight: Weight8,
    rest: tuple,
    blocks: Blocks | Blocks8,
) -> None:
    n, k = weight.values.shape
    m = x.values.numel() // k
    assert isinstance(blocks, Blocks8)
    launch(
        kernel,
        (triton.cdiv(m, blocks.m) * triton.cdiv(n, blocks.n * blocks.parts),),
        *(x.values.contiguous(), x.scales.contiguous(), weight.values, weight.scales),
        *(*rest, m, n, k),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        PARTS=blocks.parts,
        GROUPED=x.scales.shape[-1] > 1,
        GROUP=GROUP,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


@triton.jit
def linear_silu_kernel(
    x, weight, bias, out, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    GROUP: tl.constexpr, HALF_SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, column = tile_origin(m, n, BLOCK_M, BLOCK_N, GROUP)
    y = matmul_tile(
        x, weight, row, column, m, n, k, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, HALF_SUMS, PRECISION
    )  # fmt: skip
    store_silu(y, bias, out, row, column, m, n, BLOCK_M, BLOCK_N)


@triton.jit
def linear_silu8_kernel(
    x, x_scales, weight, weight_scales, bias, out, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    GROUPED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = tile_origin(m, n, BLOCK_M, BLOCK_N * PARTS, GROUP)
    y, z = matmul_tile8(
        x, x_scales, weight, row, column, m, n, k, BLOCK_M, BLOCK_N, BLOCK_K, PARTS, GROUPED
    )  # fmt: skip
    y = scaled(y, weight_scales, column, n, BLOCK_N)
    store_silu(y, bias, out, row, column, m, n, BLOCK_M, BLOCK_N)
    if PARTS == 2:
        z = scaled(z, weight_scales, column + BLOCK_N, n, BLOCK_N)
        store_silu(z, bias, out, row, column + BLOCK_N, m, n, BLOCK_M, BLOCK_N)


@triton.jit
def scaled(y, weight_scales, column, n, BLOCK_N: tl.constexpr):
    """Multiply a tile by the scales of its columns."""
    columns = tl.arange(0, BLOCK_N)
    return y * tl.load(weight_scales + column + columns, mask=columns < n - column, other=0.0)[None]


@triton.jit
def store_silu(y, bias, out, row, column, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    columns = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    right = columns < n - column
    y += tl.load(bias + column + columns, mask=right, other=0.0).to(tl.float32)[None]
    y = y / (1 + tl.exp(-y))
    at = out + row.to(tl.int64) * n + column + rows[:, None] * n + columns[None]
    tl.store(at, y.to(out.dtype.element_ty), mask=(rows < m - row)[:, None] & right[None])


@triton.jit
def gated_residual_linear_kernel(
    y, weight, bias, gate, x, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    GROUP: tl.constexpr, HALF_SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, column = tile_origin(m, n, BLOCK_M, BLOCK_N, GROUP)
    z = matmul_tile(
        y, weight, row, column, m, n, k, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, HALF_SUMS, PRECISION
    )  # fmt: skip
    add_gated(z, bias, gate, x, row, column, m, n, BLOCK_M, BLOCK_N)


@triton.jit
def gated_residual_linear8_kernel(
    y, y_scales, weight, weight_scales, bias, gate, x, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    GROUPED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = tile_origin(m, n, BLOCK_M, BLOCK_N * PARTS, GROUP)
    a, b = matmul_tile8(
        y, y_scales, weight, row, column, m, n, k, BLOCK_M, BLOCK_N, BLOCK_K, PARTS, GROUPED
    )  # fmt: skip
    a = scaled(a, weight_scales, column, n, BLOCK_N)
    add_gated(a, bias, gate, x, row, column, m, n, BLOCK_M, BLOCK_N)
    if PARTS == 2:
        b = scaled(b, weight_scales, column + BLOCK_N, n, BLOCK_N)
        add_gated(b, bias, gate, x, row, column + BLOCK_N, m, n, BLOCK_M, BLOCK_N)


@triton.jit
def add_gated(
    z, bias, gate, x, row, column, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    columns = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    right = columns < n - column
    if bias is not None:
        z += tl.load(bias + column + columns, mask=right, other=0.0).to(tl.float32)[None]
    if x.dtype.element_ty == tl.float16:  # clamp; NaN stays NaN
        z = tl.clamp(z, -HALF_MAX, HALF_MAX, propagate_nan=tl.PropagateNan.ALL)
    if gate is not None:
        z *= tl.load(gate + column + columns, mask=right, other=0.0).to(tl.float32)[None]
    at = x + row.to(tl.int64) * n + column + rows[:, None] * n + columns[None]
    inside = (rows < m - row)[:, None] & right[None]
    z += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, z.to(x.dtype.element_ty), mask=inside)


@triton.jit
def tile_origin(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Return the first row and column of this program's tile: down GROUP tiles, then right."""
    down, right = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    group, index = tl.program_id(0) // (GROUP * right), tl.program_id(0) % (GROUP * right)
    height = tl.minimum(down - group * GROUP, GROUP)
    return (group * GROUP + index % height) * BLOCK_M, index // height * BLOCK_N


@triton.jit
def matmul_tile(
    x, weight, row, column, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    HALF_SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute a tile of x·weightᵀ in float32, with x (m, k) and weight (n, k).

    With HALF_SUMS every step is summed in float16, and the steps in float32. A tile of which a step
    leaves the range of float16 is computed again in float32.
    """
    total = add_steps(
        x, weight, row, column, m, n, k, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, HALF_SUMS, PRECISION
    )  # fmt: skip
    if HALF_SUMS:
        again = leaves_range(total)
        if again:
            total = add_steps(
                x, weight, row, column, m, n, k, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, False, PRECISION
            )  # fmt: skip
    return total


@triton.jit
def leaves_range(total):
    """Whether an element of (M, N) is infinite or NaN."""
    beyond = tl.where(tl.abs(total) < float("inf"), 0, 1)
    return tl.max(tl.max(beyond, 1), 0) == 1


@triton.jit
def add_steps(
    x, weight, row, column, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    HALF_SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum up the steps of `matmul_tile`.

    Row indices beyond the end are clamped, which saves a mask; the caller discards those results.
    Tensors may exceed 2^31 elements, so the origin of a tile has 64 bits; offsets have 32.
    """
    steps = tl.arange(0, BLOCK_K)
    rows = tl.minimum(tl.arange(0, BLOCK_M), m - 1 - row)
    columns = tl.minimum(tl.arange(0, BLOCK_N), n - 1 - column)
    x_at = x + row.to(tl.int64) * k + rows[:, None] * k + steps[None]
    weight_at = weight + column.to(tl.int64) * k + columns[None] * k + steps[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        if EVEN:
            a, b = tl.load(x_at), tl.load(weight_at)
        else:
            left = steps < k - start
            a = tl.load(x_at, mask=left[None], other=0.0)
            b = tl.load(weight_at, mask=left[:, None], other=0.0)
        if HALF_SUMS:
            total += tl.dot(a, b, out_dtype=tl.float16).to(tl.float32)
        else:
            total = tl.dot(a, b, total, input_precision=PRECISION)
        x_at += BLOCK_K
        weight_at += BLOCK_K
    return total


def cases(target: tuple[int, int]) -> Iterator[Case]:
    """Yield every block shape, as any may be chosen for a size."""
    for model, d in WIDTHS.items():
        x, wide = like(1, TOKENS, d), like(1, TOKENS, 5 * d // 2)
        up = x, like(5 * d, d), like(5 * d)
        for blocks in block_shapes(x.dtype, target, SILU_WIDEST):
            label = f"{model} {blocks.m}x{blocks.n}"
            yield from trace_launches(label, target, linear_silu, *up, blocks)
        up8 = like_rows8(x), like_weight8(up[1]), up[2]
        for blocks8 in block_shapes8(up8[0], target):
            label = f"int8 {model} {blocks8.m}x{blocks8.tile[1]}"
            yield from trace_launches(label, target, linear_silu, *up8, blocks8)
        for name, y, bias, gate in (
            ("self", x, like(d), like(d)),
            ("cross", x, like(d), None),
            ("down", wide, None, like(d)),
        ):
            weight = like(d, y.shape[-1])
            for blocks in block_shapes(x.dtype, target, RESIDUAL_WIDEST):
                inputs = x, y, weight, bias, gate, blocks
                label = f"{name} {model} {blocks.m}x{blocks.n}"
                yield from trace_launches(label, target, gated_residual_linear_, *inputs)
            if name == "cross":
                continue
            y8, weight8 = like_rows8(y, grouped=True), like_weight8(weight)
            for blocks8 in block_shapes8(y8, target):
                inputs8 = x, y8, weight8, bias, gate, blocks8
                label = f"int8 {name} {model} {blocks8.m}x{blocks8.tile[1]}"
                yield from trace_launches(label, target, gated_residual_linear_, *inputs8)


def checks(draw: Draw) -> Iterator[Check]:
    # No tile and no step of the sum is full, then every step is; and sizes are multiples of 16.
    for tokens, width, wide in ((35, 97, 131), (40, 192, 144)):
        x, weight, bias = draw(2, tokens, width), draw(wide, width, size=width**-0.5), draw(wide)
        needed = least_of_sums(x)
        for blocks in block_shapes(x.dtype, capability(x.device), SILU_WIDEST):
            fused = partial(linear_silu, blocks=blocks)
            yield Check("linear_silu", fused, projection.linear_silu, (x, weight, bias), needed)
        y, x, gate = x, draw(2, tokens, wide), draw(wide)
        for blocks in block_shapes(x.dtype, capability(x.device), RESIDUAL_WIDEST):
            fused = partial(gated_residual_linear_, blocks=blocks)
            definition = projection.gated_residual_linear_
            for b, g in ((bias, gate), (bias, None), (None, gate), (None, None)):
                inputs = x, y, weight, b, g
                yield Check("gated_residual_linear_", fused, definition, inputs, needed)
    x, weight = beyond_half(draw, 80)
    needed, bias, y = least_of_sums(x, True), draw(80), draw(2, 40, 80)
    blocks = block_shapes(x.dtype, capability(x.device), RESIDUAL_WIDEST)[0]
    fused = partial(linear_silu, blocks=blocks)
    yield Check("linear_silu", fused, projection.linear_silu, (x, weight, bias), needed)
    fused = partial(gated_residual_linear_, blocks=blocks)
    inputs = y, x, weight, None, None
    yield Check("gated_residual_linear_", fused, projection.gated_residual_linear_, inputs, needed)
    yield from checks8(draw)


def least_of_sums(x: Tensor, cancelling: bool = False) -> float:
    """Return `Check.least` of products with x, perhaps of large terms that leave small sums."""
    usual = least(x.dtype)
    return min(usual, HALF_SUMS) if cancelling or sums_in_half(x) else usual


def beyond_half(draw: Draw, features: int) -> tuple[Tensor, Tensor]:
    """Return x and a weight of whose product some steps leave float16's range, and no sum does."""
    x, weight = draw(2, 40, 64, size=500.0), draw(features, 64, size=10.0)
    return torch.cat([x, -0.75 * x], -1), torch.cat([weight, weight], -1)


def checks8(draw: Draw) -> Iterator[Check]:
    # Rows in 8 bits end with whole groups. A step has one, or two where the scales allow it.
    for tokens, width, wide in ((35, 100, 131), (40, 150, 144)):
        y, weight = draw(2, tokens, width), quantise_weight(draw(wide, width, size=width**-0.5))
        x, bias, gate = draw(2, tokens, wide), draw(wide), draw(wide)
        rows = quantise(y, grouped=False)
        for blocks in block_shapes8(rows, capability(x.device)):
            fused = partial(linear_silu, blocks=blocks)
            yield Check("linear_silu8", fused, projection.linear_silu, (rows, weight, bias))
        rows, definition = quantise(y, grouped=True), projection.gated_residual_linear_
        for blocks in block_shapes8(rows, capability(x.device)):
            fused = partial(gated_residual_linear_, blocks=blocks)
            for b, g in ((bias, gate), (None, gate)):
                inputs = x, rows, weight, b, g
                yield Check("gated_residual_linear8_", fused, definition, inputs)
