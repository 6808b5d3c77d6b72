"""Token-major linear attention of `linear_attention.py`: three projections and the sums in one.

The programs that compute k and v also compute Σ v φ(k)ᵀ, before either reaches memory. A program
has CHANNELS channels of both, which are a few whole heads. It multiplies all by all and keeps the
diagonal blocks of the product, where both channels belong to one head. Every program writes to its
own location and a second kernel adds them up in a fixed order, so equal inputs give equal bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_cli.kernels import linear_attention
from sana_cli.kernels.cases import TOKENS, WIDTHS, Case, like, like_rows8, like_weight8
from sana_cli.kernels.launch import (
    HALVED,
    capability,
    launch,
    precision,
    sums_in_half,
    trace_launches,
)
from sana_cli.kernels.linear_attention import EPS
from sana_cli.kernels.projection_triton import (
    GROUP,
    beyond_half,
    least_of_sums,
    leaves_range,
    tile_origin,
)
from sana_cli.kernels.rows8 import Rows8, Weight8, quantise, quantise_weight
from sana_cli.kernels.rows8_triton import new_rows8, round_rows
from sana_cli.kernels.selfcheck import QUANTISED, Check, Draw
from sana_cli.kernels.tiles import Product, choose

CHANNELS = 64  # also those that share a scale in 8 bits


class QKVBlocks(NamedTuple):
    """Rows of a tile, channels of x per step, warps and stages."""

    m: int
    k: int
    warps: int
    stages: int
    resident: int = 1  # see `tiles.Shape`

    @property
    def tile(self) -> tuple[int, int]:
        return self.m, 3 * CHANNELS


# `tiles.choose` takes one of them for a size.
CONSUMER = (QKVBlocks(128, 32, 8, 3), QKVBlocks(64, 64, 4, 3))
LARGE = (QKVBlocks(128, 64, 8, 3), QKVBlocks(64, 64, 4, 3))
BY_CAPABILITY = {(8, 0): LARGE, (9, 0): LARGE, (10, 0): LARGE}
HALF_SUMS = (QKVBlocks(128, 32, 8, 3), QKVBlocks(64, 32, 4, 3))  # for `launch.sums_in_half`
FLOAT32 = QKVBlocks(32, 32, 8, 2)


def qkv_shapes(x: Tensor | Rows8, target: tuple[int, int]) -> tuple[QKVBlocks, ...]:
    """Return the block shapes for tokens x on a GPU of capability `target`."""
    if x.dtype == torch.float32:
        return (FLOAT32,)
    if isinstance(x, Rows8):
        return LARGE
    if x.dtype == torch.float16 and target in HALVED:
        return HALF_SUMS
    return BY_CAPABILITY.get(target, CONSUMER)


def choose_qkv_blocks(x: Tensor | Rows8, features: int) -> QKVBlocks:
    """Choose the block shape for three projections of x (B, N, D) to a number of channels."""
    eight = isinstance(x, Rows8)
    values = x.values if isinstance(x, Rows8) else x
    batch, n, width = values.shape
    half_sums = sums_in_half(values)
    product = Product(batch, n, 3 * features, width, values.itemsize, half_sums)
    shapes, name = qkv_shapes(x, capability(values.device)), "project_qkv" + "8" * eight
    return choose(name, product, shapes, values)


def project_qkv(
    x: Tensor | Rows8,
    weight: Tensor | Weight8,
    heads: int,
    norm_k: Tensor | None,
    eps: float,
    shape: QKVBlocks | None = None,
) -> tuple[Tensor, Tensor]:
    """`shape` is chosen for the size of x unless given."""
    features = len(weight.values if isinstance(weight, Weight8) else weight) // 3
    if shape is None:
        shape = choose_qkv_blocks(x, features)
    dtype, x_scales, weight_scales = x.dtype, None, None
    if isinstance(x, Rows8):
        x_scales = x.scales.contiguous()
        x = x.values
    if isinstance(weight, Weight8):
        weight, weight_scales = weight
    x, weight = x.contiguous(), weight.contiguous()
    batch, n, width = x.shape
    d = features // heads
    blocks = triton.cdiv(features, CHANNELS)
    m, step, warps, stages, _ = shape
    tiles = triton.cdiv(n, m)
    q = x.new_empty(batch, n, features, dtype=dtype)
    sums = x.new_empty(batch, tiles, heads, d + 1, d, dtype=torch.float32)
    k = v = squares = None
    if norm_k is not None:
        k, v = torch.empty_like(q), torch.empty_like(q)
        squares = x.new_empty(batch, blocks, n, dtype=torch.float32)
    launch(
        project_qkv_kernel,
        (tiles * blocks, batch),
        *(x, x_scales, weight, weight_scales, q, k, v, squares),
        *(None if norm_k is not None else sums, n, width, features),
        HEAD=d,
        BLOCK_M=m,
        CHANNELS=CHANNELS,
        BLOCK_K=step,
        EVEN=width % step == 0,
        GROUP=GROUP,
        HALF_SUMS=sums_in_half(x),
        PRECISION=precision(),
        num_warps=warps,
        num_stages=stages,
    )
    if norm_k is not None:
        launch(
            sum_normed_kernel,
            (blocks, tiles, batch),
            *(k, v, squares, norm_k.contiguous(), sums, n, features, eps),
            HEAD=d,
            BLOCK_M=32,
            CHANNELS=CHANNELS,
            BLOCKS=triton.next_power_of_2(blocks),
            STEPS=m // 32,
            PRECISION=precision(),
            num_warps=4,
        )
    return q, sum_tiles(sums)


def sum_tiles(sums: Tensor) -> Tensor:
    """(B, tiles, heads, d+1, d) -> (B, heads, d+1, d)."""
    batch, tiles = sums.shape[:2]
    if tiles == 1:
        return sums[:, 0]
    state = sums.new_empty(batch, *sums.shape[2:])
    size, block = state[0].numel(), 256
    launch(
        sum_tiles_kernel,
        (triton.cdiv(size, block), batch),
        *(sums, state, tiles, size),
        BLOCK=block,
        num_warps=4,
    )
    return state


def attend_tokens(q: Tensor, state: Tensor) -> Tensor:
    out = q.new_empty(q.shape)
    _attend(q, state, out, None)
    return out


def attend_tokens8(q: Tensor, state: Tensor) -> Rows8:
    rows = new_rows8(q, tuple(q.shape[:2]), q.shape[2], grouped=True)
    _attend(q, state, rows.values, rows.scales)
    return rows


def _attend(q: Tensor, state: Tensor, out: Tensor, scales: Tensor | None) -> None:
    q, state = q.contiguous(), state.contiguous()
    batch, n, features = q.shape
    m = 16 if q.dtype == torch.float32 else 64
    launch(
        attend_tokens_kernel,
        (triton.cdiv(features, CHANNELS), triton.cdiv(n, m), batch),
        *(q, state, out, scales, n, features, EPS),
        HEAD=state.shape[-1],
        BLOCK_M=m,
        CHANNELS=CHANNELS,
        # tf32 holds 16-bit values exactly; rounding the state to it leaves 80 dB.
        PRECISION=precision() if q.dtype == torch.float32 else "tf32",
        num_warps=4,
    )


@triton.jit
def project_qkv_kernel(
    x, x_scales, weight, weight_scales, q, k, v, squares, sums, n, width, features,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, GROUP: tl.constexpr, HALF_SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute q, k and v of BLOCK_M tokens and CHANNELS channels.

    With `x_scales` (batch, n) and `weight_scales` (3·features,), x and weight are int8. HALF_SUMS
    is that of `projection_triton.matmul_tile`. With `squares`, k and v are stored, and `squares`
    receives Σ k² over these channels. Without, only the sums over k and v are.
    """
    row, column = tile_origin(n, features, BLOCK_M, CHANNELS, GROUP)
    image = tl.program_id(1).to(tl.int64)
    q_sum, k_sum, v_sum = add_qkv(
        x, weight, image, row, column, n, width, features, BLOCK_M, CHANNELS, BLOCK_K, EVEN,
        HALF_SUMS, PRECISION,
    )  # fmt: skip
    if HALF_SUMS:
        again = leaves_range(q_sum) or leaves_range(k_sum) or leaves_range(v_sum)
        if again:
            q_sum, k_sum, v_sum = add_qkv(
                x, weight, image, row, column, n, width, features, BLOCK_M, CHANNELS, BLOCK_K, EVEN,
                False, PRECISION,
            )  # fmt: skip
    rows, channels = tl.arange(0, BLOCK_M), tl.arange(0, CHANNELS)
    inside = (rows < n - row)[:, None] & (channels < features - column)[None]
    if x_scales is not None:
        near = tl.minimum(channels, features - 1 - column)
        of_rows = tl.load(x_scales + image * n + row + tl.minimum(rows, n - 1 - row))[:, None]
        of_columns = weight_scales + column + near
        q_sum = q_sum.to(tl.float32) * of_rows * tl.load(of_columns)[None]
        k_sum = k_sum.to(tl.float32) * of_rows * tl.load(of_columns + features)[None]
        v_sum = v_sum.to(tl.float32) * of_rows * tl.load(of_columns + 2 * features)[None]
    origin = (image * n + row) * features + column
    at = rows[:, None] * features + channels[None]
    dtype = q.dtype.element_ty
    tl.store(q + origin + at, q_sum.to(dtype), mask=inside)
    k_tile = tl.where(inside, k_sum, 0.0).to(dtype)
    v_tile = tl.where(inside, v_sum, 0.0).to(dtype)
    if squares is not None:
        tl.store(k + origin + at, k_tile, mask=inside)
        tl.store(v + origin + at, v_tile, mask=inside)
        square = k_tile.to(tl.float32) * k_tile.to(tl.float32)
        blocks = tl.cdiv(features, CHANNELS)
        squares += (image * blocks + column // CHANNELS) * n + row
        tl.store(squares + rows, tl.sum(square, 1), mask=rows < n - row)
    else:
        tile = image * tl.cdiv(n, BLOCK_M) + row // BLOCK_M
        sums += tile * (features * (HEAD + 1))
        k_tile = tl.maximum(k_tile.to(tl.float32), 0.0)
        total = tl.sum(k_tile, 0)
        products = tl.dot(tl.trans(v_tile), k_tile.to(dtype), input_precision=PRECISION)
        store_heads(products, total, sums, column, features, HEAD, CHANNELS)


@triton.jit
def add_qkv(
    x, weight, image, row, column, n, width, features,
    BLOCK_M: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    HALF_SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute tiles (BLOCK_M, CHANNELS) of three products in float32, or of int8 in int32."""
    rows, channels, steps = tl.arange(0, BLOCK_M), tl.arange(0, CHANNELS), tl.arange(0, BLOCK_K)
    # Indices beyond the end are clamped: see `projection_triton.matmul_tile`.
    x_at = x + (image * n + row) * width + tl.minimum(rows, n - 1 - row)[:, None] * width
    x_at += steps[None]
    near = tl.minimum(channels, features - 1 - column)
    q_at = weight + column.to(tl.int64) * width + near[None] * width + steps[:, None]
    k_at = q_at + features.to(tl.int64) * width
    v_at = k_at + features.to(tl.int64) * width
    SUM: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    q_sum = tl.zeros((BLOCK_M, CHANNELS), SUM)
    k_sum = tl.zeros((BLOCK_M, CHANNELS), SUM)
    v_sum = tl.zeros((BLOCK_M, CHANNELS), SUM)
    for start in range(0, width, BLOCK_K):
        if EVEN:
            a, q_b, k_b, v_b = tl.load(x_at), tl.load(q_at), tl.load(k_at), tl.load(v_at)
        else:
            left = steps < width - start
            a = tl.load(x_at, mask=left[None], other=0.0)
            q_b = tl.load(q_at, mask=left[:, None], other=0.0)
            k_b = tl.load(k_at, mask=left[:, None], other=0.0)
            v_b = tl.load(v_at, mask=left[:, None], other=0.0)
        if HALF_SUMS:
            q_sum += tl.dot(a, q_b, out_dtype=tl.float16).to(tl.float32)
            k_sum += tl.dot(a, k_b, out_dtype=tl.float16).to(tl.float32)
            v_sum += tl.dot(a, v_b, out_dtype=tl.float16).to(tl.float32)
        else:
            q_sum = tl.dot(a, q_b, q_sum, input_precision=PRECISION, out_dtype=SUM)
            k_sum = tl.dot(a, k_b, k_sum, input_precision=PRECISION, out_dtype=SUM)
            v_sum = tl.dot(a, v_b, v_sum, input_precision=PRECISION, out_dtype=SUM)
        x_at += BLOCK_K
        q_at += BLOCK_K
        k_at += BLOCK_K
        v_at += BLOCK_K
    return q_sum, k_sum, v_sum


@triton.jit
def sum_normed_kernel(
    k, v, squares, norm, sums, n, features, eps,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr,
    STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum k and v over STEPS tiles, with k after its RMSNorm, rounded as torch rounds."""
    column = tl.program_id(0) * CHANNELS
    image = tl.program_id(2).to(tl.int64)
    channels, block = tl.arange(0, CHANNELS), tl.arange(0, BLOCKS)
    blocks = tl.cdiv(features, CHANNELS)
    real = channels < features - column
    dtype = k.dtype.element_ty
    weight = tl.load(norm + column + channels, mask=real, other=0.0).to(tl.float32)
    products = tl.zeros((CHANNELS, CHANNELS), tl.float32)
    total = tl.zeros((CHANNELS,), tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(1) * STEPS + step) * BLOCK_M
        rows = tl.arange(0, BLOCK_M)
        square = tl.load(
            squares + image * blocks * n + row + block[:, None] * n + rows[None],
            mask=(block < blocks)[:, None] & (rows < n - row)[None],
            other=0.0,
        )
        scale = tl.rsqrt(tl.sum(square, 0) / features + eps)
        inside = (rows < n - row)[:, None] & real[None]
        origin = (image * n + row) * features + column
        at = rows[:, None] * features + channels[None]
        k_tile = tl.load(k + origin + at, mask=inside, other=0.0).to(tl.float32)
        v_tile = tl.load(v + origin + at, mask=inside, other=0.0)
        k_tile = (k_tile * scale[:, None]).to(dtype).to(tl.float32)
        k_tile = (k_tile * weight[None]).to(dtype).to(tl.float32)
        k_tile = tl.maximum(k_tile, 0.0)
        total += tl.sum(k_tile, 0)
        products = tl.dot(tl.trans(v_tile), k_tile.to(dtype), products, input_precision=PRECISION)
    sums += (image * tl.num_programs(1) + tl.program_id(1)) * (features * (HEAD + 1))
    store_heads(products, total, sums, column, features, HEAD, CHANNELS)


@triton.jit
def store_heads(
    products, total, sums, column, features, HEAD: tl.constexpr, CHANNELS: tl.constexpr
):
    """Store the diagonal blocks of v·kᵀ (CHANNELS, CHANNELS), one per head, and Σ kᵀ below each.

    sums: (heads, HEAD+1, HEAD), as in `attention_state`.
    """
    channel = tl.arange(0, CHANNELS)
    head, place = channel // HEAD, channel % HEAD
    sums += column * (HEAD + 1)
    real = channel < features - column
    same = (head[:, None] == head[None]) & real[:, None] & real[None]
    at = sums + head * (HEAD * (HEAD + 1)) + place
    tl.store(at[None] + place[:, None] * HEAD, products, mask=same)
    tl.store(at + HEAD * HEAD, total, mask=real)


@triton.jit
def sum_tiles_kernel(sums, state, tiles, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(1).to(tl.int64)
    at = sums + image * tiles * size + place
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(tiles):
        total += tl.load(at, mask=place < size, other=0.0)
        at += size
    tl.store(state + image * size + place, total, mask=place < size)


@triton.jit
def attend_tokens_kernel(
    q, state, out, scales, n, features, eps,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute numerators and denominators of several heads by two block-diagonal products.

    With `scales`, (batch, n, blocks of CHANNELS), out is int8 and as wide as all blocks.
    """
    column, row = tl.program_id(0) * CHANNELS, tl.program_id(1) * BLOCK_M
    image = tl.program_id(2).to(tl.int64)
    rows, channel = tl.arange(0, BLOCK_M), tl.arange(0, CHANNELS)
    head, place = channel // HEAD, channel % HEAD
    real = channel < features - column
    same = (head[:, None] == head[None]) & real[:, None] & real[None]
    state += image * (features * (HEAD + 1)) + column * (HEAD + 1)
    at = state + head * (HEAD * (HEAD + 1)) + place  # rows are channels of k
    values = tl.load(at[:, None] + place[None] * HEAD, mask=same, other=0.0)
    totals = tl.load(at[:, None] + place[None] * 0 + HEAD * HEAD, mask=same, other=0.0)
    inside = (rows < n - row)[:, None] & real[None]
    origin = (image * n + row) * features + column
    at = rows[:, None] * features + channel[None]
    query = tl.maximum(tl.load(q + origin + at, mask=inside, other=0.0).to(tl.float32), 0.0)
    above = tl.dot(query, values, input_precision=PRECISION)
    below = tl.dot(query, totals, input_precision=PRECISION) + eps
    if scales is None:
        tl.store(out + origin + at, (above / below).to(out.dtype.element_ty), mask=inside)
    else:
        values, of_rows = round_rows(above / below)
        blocks = tl.num_programs(0)
        first = image * n + row
        at = rows[:, None] * (blocks * CHANNELS) + channel[None]
        mask = rows < n - row
        tl.store(out + first * (blocks * CHANNELS) + column + at, values, mask=mask[:, None])
        scales += first * blocks + tl.program_id(0)
        tl.store(scales + rows * blocks, of_rows, mask=mask)


def cases(target: tuple[int, int]) -> Iterator[Case]:
    """Yield every block shape, as any may be chosen for a size."""
    for model, d in WIDTHS.items():
        heads, x, weight, norm = d // 32, like(1, TOKENS, d), like(3 * d, d), like(d)
        for kind, tokens, matrix in (
            ("", x, weight),
            ("int8 ", like_rows8(x), like_weight8(weight)),
        ):
            for shape in qkv_shapes(tokens, target):
                for of, norm_k in ((f"{kind}{model}", None), (f"{kind}normed {model}", norm)):
                    inputs = tokens, matrix, heads, norm_k, 1e-5, shape
                    yield from trace_launches(f"{of} {shape.m}", target, project_qkv, *inputs)
        state = like(1, heads, 33, 32, dtype=torch.float32)
        yield from trace_launches(model, target, attend_tokens, x, state)
        yield from trace_launches(f"int8 {model}", target, attend_tokens8, x, state)


def checks(draw: Draw) -> Iterator[Check]:
    # As many heads as the models have: `sum_normed_kernel` reads the squares of all of them.
    for tokens, width, heads in ((135, 81, 7), (160, 192, 36), (3, 192, 70)):
        x, norm = draw(1, tokens, width), draw(32 * heads)
        weight = draw(3 * 32 * heads, width, size=width**-0.5)
        rows, weight8 = quantise(x, grouped=False), quantise_weight(weight)
        for name, tokens_, matrix, shapes in (
            ("project_qkv", x, weight, qkv_shapes(x, capability(x.device))),
            ("project_qkv8", rows, weight8, qkv_shapes(rows, capability(x.device))),
        ):
            for shape in shapes:
                fused, definition = partial(project_qkv, shape=shape), linear_attention.project_qkv
                needed = least_of_sums(x) if name == "project_qkv" else None
                yield Check(name, fused, definition, (tokens_, matrix, heads, None, 0.0), needed)
                yield Check(name, fused, definition, (tokens_, matrix, heads, norm, 1e-5), needed)
    x, weight = beyond_half(draw, 3 * 32 * 2)
    definition, given = linear_attention.project_qkv, (x, weight, 2, None, 0.0)
    yield Check("project_qkv", project_qkv, definition, given, least_of_sums(x, True))
    for tokens, heads in ((135, 3), (160, 4)):
        state = draw(2, heads, 33, 32).float()
        state[:, :, -1] = state[:, :, -1].abs() * 10
        inputs = draw(2, tokens, 32 * heads), state
        yield Check("attend_tokens", attend_tokens, linear_attention.attend_tokens, inputs)
        rest = linear_attention.attend_tokens8, inputs, QUANTISED
        yield Check("attend_tokens8", attend_tokens8, *rest)
