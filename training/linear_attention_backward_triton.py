"""Linear attention of given q, k and v, and the gradients of all three.

In the notation of `kernels/linear_attention.py`, the state is S = Σ v φ(k)ᵀ and z = Σ φ(k), and
for a query a = S φ(q), c = z·φ(q), out = a / c. From the gradient g of out follow

    da = g / c,  dc = -da·out,  dφ(q) = Sᵀ da + z dc,

and, summed over all tokens, the gradients of the state, dS = Σ da φ(q)ᵀ and dz = Σ dc φ(q). From
these follow the gradients of each key and value, dφ(k) = dSᵀ v + dz and dv = dS φ(k). This takes
one pass over the queries and one over keys and values, with a sum over tiles in a fixed order in
between.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_cli.kernels.cases import WIDTHS, Case, like
from sana_cli.kernels.kv_state_triton import LEAST, tile_sums
from sana_cli.kernels.launch import launch, precision, trace_launches
from sana_cli.kernels.linear_attention import EPS
from sana_cli.kernels.linear_attention_triton import attend_tokens, sum_tiles

TOKENS, STEP = 512, 32  # of a program that sums over tokens, and of one step of its loop


def linear_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Attend with q, k, v (B, N, heads·d); return the result and the state for `gradients`.

    d is one of `TRITON_HEADS`, and q, k and v have the same dtype.
    """
    key, value = (x.contiguous().unflatten(-1, (heads, -1)) for x in (k, v))
    state = sum_tiles(tile_sums(key, value))
    return attend_tokens(q, state), state


def gradients(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v from that of the result of `linear_attention`."""
    q, k, v, state = (x.contiguous() for x in (q, k, v, state))
    batch, n, features = q.shape
    heads, d = len(state[0]), state.shape[-1]
    narrow = q.dtype != torch.float32
    constants = {
        "HEAD": d,
        "BLOCK": max(LEAST, triton.next_power_of_2(d)),
        # tf32 holds 16-bit values exactly; da is unbounded and would not fit into 16 bits.
        "PRECISION": "tf32" if narrow else precision(),
    }
    tiles = triton.cdiv(n, TOKENS)
    of_q, of_k, of_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    sums = q.new_empty(batch, tiles, heads, d + 1, d, dtype=torch.float32)
    launch(
        query_gradient_kernel,
        (heads, tiles, batch),
        *(q, gradient.contiguous(), state, of_q, sums, n, features, EPS),
        **constants,
        TOKENS=TOKENS,
        STEP=STEP,
        num_warps=d // 16,  # more warps would not save registers
    )
    m = 64 if narrow else 32
    launch(
        key_value_gradient_kernel,
        (heads, triton.cdiv(n, m), batch),
        *(k, v, sum_tiles(sums), of_k, of_v, n, features),
        **constants,
        BLOCK_M=m,
        num_warps=4,
    )
    return of_q, of_k, of_v


@triton.jit
def query_gradient_kernel(
    q, gradient, state, of_q, sums, n, features, eps,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of TOKENS queries of a head, and their part of the state's gradient."""
    head, tile = tl.program_id(0), tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    token, channel = tl.arange(0, STEP), tl.arange(0, BLOCK)
    real = channel < HEAD
    values, totals = load_state(state, image * tl.num_programs(0) + head, channel, HEAD)
    # Sᵀ da + z dc = (S - m zᵀ)ᵀ da + z (dc + da·m) for any m. With m the mean of the values, it is
    # not a small difference of large terms. dc + da·m = -da·(out - m) does not need S either.
    mean = tl.sum(values * totals, 1) / (tl.sum(totals * totals, 1) + eps)
    values -= mean[:, None] * totals
    products = tl.zeros((BLOCK, BLOCK), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    first = tile * TOKENS
    origin = (image * n + first) * features + head * HEAD
    q, gradient, of_q = q + origin, gradient + origin, of_q + origin
    at = token[:, None] * features + channel[None]
    for start in range(0, tl.minimum(TOKENS, n - first), STEP):
        inside = (token < n - first - start)[:, None] & real[None]
        query = tl.load(q + at, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        positive = tl.where(query < 0, 0.0, query)  # NaN stays
        below = tl.sum(positive * totals, 1)[:, None] + eps
        above = tl.dot(positive, tl.trans(values), input_precision=PRECISION)
        of_above = given / below
        of_below = -tl.sum(of_above * (above / below), 1)[:, None]
        made = tl.dot(of_above, values, input_precision=PRECISION) + of_below * totals
        made = tl.where(query <= 0, 0.0, made)
        of_below -= tl.sum(of_above * mean[None], 1)[:, None]
        tl.store(of_q + at, made.to(of_q.dtype.element_ty), mask=inside)
        products = tl.dot(tl.trans(of_above), positive, products, input_precision=PRECISION)
        total += tl.sum(of_below * positive, 0)
        at += STEP * features
    place = (image * tl.num_programs(1) + tile) * tl.num_programs(0) + head
    sums += place * ((HEAD + 1) * HEAD) + channel
    tl.store(sums[None] + channel[:, None] * HEAD, products, mask=real[:, None] & real[None])
    tl.store(sums + HEAD * HEAD, total, mask=real)


@triton.jit
def key_value_gradient_kernel(
    k, v, of_state, of_k, of_v, n, features,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1) * BLOCK_M
    image = tl.program_id(2).to(tl.int64)
    token, channel = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK)
    real = channel < HEAD
    of_values, of_totals = load_state(of_state, image * tl.num_programs(0) + head, channel, HEAD)
    inside = (token < n - row)[:, None] & real[None]
    origin = (image * n + row) * features + head * HEAD
    at = token[:, None] * features + channel[None]
    key = tl.load(k + origin + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(v + origin + at, mask=inside, other=0.0).to(tl.float32)
    made = tl.dot(value, of_values, input_precision=PRECISION) + of_totals
    made = tl.where(key <= 0, 0.0, made)
    tl.store(of_k + origin + at, made.to(of_k.dtype.element_ty), mask=inside)
    positive = tl.where(key < 0, 0.0, key)
    made = tl.dot(positive, tl.trans(of_values), input_precision=PRECISION)
    tl.store(of_v + origin + at, made.to(of_v.dtype.element_ty), mask=inside)


@triton.jit
def load_state(state, index, channel, HEAD: tl.constexpr):
    """Load Σ v φ(k)ᵀ of a head, with a row for each channel of v, and Σ φ(k) as one row."""
    real = channel < HEAD
    state += index * ((HEAD + 1) * HEAD) + channel
    inside = real[:, None] & real[None]
    values = tl.load(state[None] + channel[:, None] * HEAD, mask=inside, other=0.0)
    return values, tl.load(state + HEAD * HEAD, mask=real, other=0.0)[None]


# Batch, tokens and width of the bundled model at both sizes, and of the 0.6B.
SHAPES = {"demo 256²": (512, 64, 224), "demo 512²": (192, 256, 224)}
SHAPES["0.6B 1024²"] = (8, 1024, WIDTHS["0.6B"])


def cases(target: tuple[int, int]) -> Iterator[Case]:
    for model, (batch, n, d) in SHAPES.items():
        q, k, v, gradient = (like(batch, n, d, dtype=torch.bfloat16) for _ in range(4))
        label, heads = f"training {model}", d // 32
        state = like(batch, heads, 33, 32, dtype=torch.float32)
        yield from trace_launches(label, target, linear_attention, q, k, v, heads)
        yield from trace_launches(label, target, gradients, q, k, v, state, gradient)
