"""Cross-attention with normed queries, in two launches.

The norm of a query spans all heads, and so no tile of the projection has it. The projection stores
the sum of squares of each of its tiles, and every program of the attention adds them up for its
tokens. Keys are read in blocks and the softmax is kept up to date (arXiv 2205.14135).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import math
from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_cli.kernels import text_attention
from sana_cli.kernels.cases import TOKENS, WIDTHS, Case, like
from sana_cli.kernels.launch import (
    capability,
    launch,
    precision,
    sums_in_half,
    trace_launches,
)
from sana_cli.kernels.projection_triton import (
    GROUP,
    RESIDUAL_WIDEST,
    Blocks,
    block_shapes,
    choose_blocks,
    least_of_sums,
    matmul_tile,
    tile_origin,
)
from sana_cli.kernels.selfcheck import Check, Draw

MOST_BLOCKS = 64  # of columns of the projection: 4096 channels in the narrowest tiles
HEADS = {"0.6B": 16, "1.6B": 20}  # of the models whose queries have a norm


def attend_text(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Tensor,
    eps: float,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    blocks: Blocks | None = None,
) -> Tensor:
    """`blocks` are chosen for the size of the queries unless given."""
    if blocks is None:
        blocks = choose_blocks("attend_text", x, weight, RESIDUAL_WIDEST)
    x, width = x.contiguous(), len(weight)
    m, heads, length = x.numel() // x.shape[-1], *keys.shape[:2]
    across = triton.cdiv(width, blocks.n)
    assert across <= MOST_BLOCKS
    q = x.new_empty(*x.shape[:-1], width)
    squares = x.new_empty(across, m, dtype=torch.float32)
    launch(
        project_queries_kernel,
        (triton.cdiv(m, blocks.m) * across,),
        *(x, weight.contiguous(), bias.contiguous(), q, squares, m, width, x.shape[-1]),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        EVEN=x.shape[-1] % blocks.k == 0,
        GROUP=GROUP,
        HALF_SUMS=sums_in_half(x),
        PRECISION=precision(),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    # The heads of a token lie side by side, as they leave the projections of the text.
    keys, values = (t.transpose(0, 1).contiguous() for t in (keys, values))
    out, head = torch.empty_like(q), width // heads
    block = 16 if x.dtype == torch.float32 else 32  # tokens of a program, and keys at once
    launch(
        attend_text_kernel,
        (triton.cdiv(m, block), heads),
        *(q, squares, norm.contiguous(), keys, values),
        *(None if mask is None else mask.contiguous(), out),
        *(m, width, across, length, eps, head**-0.5),
        HEAD=head,
        CHANNELS=triton.next_power_of_2(head),
        BLOCK_M=block,
        KEYS=block,
        BLOCKS=MOST_BLOCKS,
        PRECISION=precision(),
        num_warps=4,
    )
    return out


@triton.jit
def project_queries_kernel(
    x, weight, bias, q, squares, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    GROUP: tl.constexpr, HALF_SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store q = x·weightᵀ + bias (m, n), and Σ q² of each row of a tile: (blocks of n, m)."""
    row, column = tile_origin(m, n, BLOCK_M, BLOCK_N, GROUP)
    y = matmul_tile(
        x, weight, row, column, m, n, k, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, HALF_SUMS, PRECISION
    )  # fmt: skip
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    right = columns < n - column
    y += tl.load(bias + column + columns, mask=right, other=0.0).to(tl.float32)[None]
    y = y.to(q.dtype.element_ty)
    at = q + row.to(tl.int64) * n + column + rows[:, None] * n + columns[None]
    tl.store(at, y, mask=(rows < m - row)[:, None] & right[None])
    y = tl.where(right[None], y.to(tl.float32), 0.0)
    at = squares + (column // BLOCK_N).to(tl.int64) * m + row + rows
    tl.store(at, tl.sum(y * y, 1), mask=rows < m - row)


@triton.jit
def attend_text_kernel(
    q, squares, norm, keys, values, mask, out, m, width, blocks, length, eps, scale,
    HEAD: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, KEYS: tl.constexpr,
    BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend from BLOCK_M tokens in one head, of HEAD channels, whose queries are rounded as torch
    rounds them."""
    row, column = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.program_id(1) * HEAD
    rows, channels, block = tl.arange(0, BLOCK_M), tl.arange(0, CHANNELS), tl.arange(0, BLOCKS)
    there, real = rows < m - row, channels < HEAD
    square = tl.load(
        squares + row + block[:, None] * m + rows[None],
        mask=(block < blocks)[:, None] & there[None],
        other=0.0,
    )
    factor = tl.rsqrt(tl.sum(square, 0) / width + eps)
    at = row * width + column + rows[:, None] * width + channels[None]
    inside = there[:, None] & real[None]
    dtype = out.dtype.element_ty
    query = tl.load(q + at, mask=inside, other=0.0).to(tl.float32)
    query = (query * factor[:, None]).to(dtype).to(tl.float32)
    weight = tl.load(norm + column + channels, mask=real, other=0.0).to(tl.float32)
    query = (query * weight[None]).to(dtype)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, CHANNELS), tl.float32)
    for start in range(0, length, KEYS):
        token = start + tl.arange(0, KEYS)
        known = token < length
        key = tl.load(
            keys + column + token[None] * width + channels[:, None],
            mask=known[None] & real[:, None],
            other=0.0,
        )
        value = tl.load(
            values + column + token[:, None] * width + channels[None],
            mask=known[:, None] & real[None],
            other=0.0,
        )
        scores = tl.dot(query, key, input_precision=PRECISION) * scale
        if mask is not None:
            scores += tl.load(mask + token, mask=known, other=0.0).to(tl.float32)[None]
        scores = tl.where(known[None], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        before, weights = tl.exp(highest - higher), tl.exp(scores - higher[:, None])
        total = total * before + tl.sum(weights, 1)
        result *= before[:, None]
        result = tl.dot(weights.to(dtype), value, result, input_precision=PRECISION)
        highest = higher
    tl.store(out + at, (result / total[:, None]).to(dtype), mask=inside)


def cases(target: tuple[int, int]) -> Iterator[Case]:
    for model, heads in HEADS.items():
        d = WIDTHS[model]
        x, weight, vector = like(1, TOKENS, d), like(d, d), like(d)
        for blocks in block_shapes(x.dtype, target, RESIDUAL_WIDEST):
            for length in (30, 304):
                text = like(length, heads, d // heads).transpose(0, 1)
                for mask in (None, like(1, length)):
                    inputs = x, weight, vector, vector, 1e-5, text, text, mask, blocks
                    label = f"{model} {blocks.m}x{blocks.n} {length}"
                    yield from trace_launches(label, target, attend_text, *inputs)


def checks(draw: Draw) -> Iterator[Check]:
    definition = text_attention.attend_text
    for tokens, k, heads, head, length in ((35, 97, 2, 72, 45), (40, 192, 3, 112, 64)):
        d = heads * head
        x, weight = draw(2, tokens, k), draw(d, k, size=k**-0.5)
        keys, values = (draw(length, heads, head).transpose(0, 1) for _ in range(2))
        mask = draw(1, length)
        mask[:, length // 2 :] = -math.inf
        for blocks in block_shapes(x.dtype, capability(x.device), RESIDUAL_WIDEST):
            fused = partial(attend_text, blocks=blocks)
            for bias in (None, mask):
                inputs = x, weight, draw(d), draw(d), 1e-5, keys, values, bias
                yield Check("attend_text", fused, definition, inputs, least_of_sums(x))
