"""`kv_state.py`: each program sums some tokens of a head; torch adds the sums in a fixed order."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_cli.kernels import kv_state as module
from sana_cli.kernels.cases import Case, like
from sana_cli.kernels.launch import launch, precision, trace_launches
from sana_cli.kernels.selfcheck import TENSOR_CORES, Check, Draw, least

TOKENS = 1024  # per program
# Tokens per step; 64 of float32 take too many registers on Blackwell.
STEP, FLOAT32_STEP = 64, 32
LEAST = 16  # sides of the smallest matrix product


def kv_state(kv: Tensor, d: int) -> Tensor:
    key, value = kv.contiguous().unflatten(-1, (-1, 2, d)).unbind(-2)
    return tile_sums(key, value).sum(1)


def tile_sums(key: Tensor, value: Tensor) -> Tensor:
    """key and value (B, N, heads, d) with equal strides -> (B, tiles, heads, d+1, d) float32."""
    batch, n, heads, d = key.shape
    tiles = triton.cdiv(n, TOKENS)
    sums = key.new_empty(batch, tiles, heads, d + 1, d, dtype=torch.float32)
    launch(
        kv_state_kernel,
        (heads, tiles, batch),
        *(key, value, sums, n, *key.stride()[1:3]),
        HEAD=d,
        BLOCK=max(LEAST, triton.next_power_of_2(d)),
        TOKENS=TOKENS,
        STEP=FLOAT32_STEP if key.dtype == torch.float32 else STEP,
        PRECISION=precision(),
        num_warps=4,
        num_stages=3,
    )
    return sums


@triton.jit
def kv_state_kernel(
    keys, values, sums, n, row, apart,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0), tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    token, channel = tl.arange(0, STEP), tl.arange(0, BLOCK)
    real = channel < HEAD
    first = tile * TOKENS
    keys += (image * n + first) * row + head * apart
    values += (image * n + first) * row + head * apart
    at = token[:, None] * row + channel[None]
    products = tl.zeros((BLOCK, BLOCK), tl.float32)
    total = tl.zeros((STEP, BLOCK), tl.float32)  # summed over its rows once, at the end
    for start in range(0, tl.minimum(TOKENS, n - first), STEP):
        inside = (token < n - first - start)[:, None] & real[None]
        key = tl.load(keys + at, mask=inside, other=0.0)
        value = tl.load(values + at, mask=inside, other=0.0)
        wide = tl.maximum(key.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
        total += wide
        key = wide.to(key.dtype)
        # Products of bfloat16 or float16 are exact in float32.
        products = tl.dot(tl.trans(value), key, products, input_precision=PRECISION)
        at += STEP * row
    at = (image * tl.num_programs(1) + tile) * tl.num_programs(0) + head
    at = sums + at * ((HEAD + 1) * HEAD) + channel
    tl.store(at[None] + channel[:, None] * HEAD, products, mask=real[:, None] & real[None])
    tl.store(at + HEAD * HEAD, tl.sum(total, 0), mask=real)


def cases(target: tuple[int, int]) -> Iterator[Case]:
    for heads in (32, 64):  # DC-AE's stages of 512 and 1024 channels, at two scales each
        yield from trace_launches(f"{heads} heads", target, kv_state, like(1, 8192, heads * 64), 32)


def checks(draw: Draw) -> Iterator[Check]:
    for tokens, heads in ((70, 3), (1030, 1), (128, 2)):
        kv = draw(2, tokens, heads * 64)
        needed = least(kv.dtype, tokens) if kv.dtype == torch.float32 else TENSOR_CORES
        yield Check("kv_state", kv_state, module.kv_state, (kv, 32), needed)
