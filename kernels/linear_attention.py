"""ReLU linear attention: attention without a softmax, linear in the number of tokens.

For one head with features φ = ReLU (Sana, arXiv 2410.10629, section 2.2):

    out_i = Σ_j v_j (φ(k_j)·φ(q_i)) / Σ_j φ(k_j)·φ(q_i)

The sums over j do not depend on i, so they are computed once: a (d+1) x d state per head. The
states of disjoint sets of tokens add up to the state of their union.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_cli.kernels import dispatch
from sana_cli.kernels.linear import is_packed, linear
from sana_cli.kernels.rows8 import Rows8, Weight8, linear8, quantise

EPS = 1e-15  # as in diffusers; matters only where every feature of a query is zero
TRITON_HEADS = (16, 32, 64)  # head widths that the Triton kernels support; Sana has 32


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v (B, heads, d, N) in any float dtype -> (B, heads, d, N) in the dtype of v."""
    return attend(q, attention_state(k, v)).to(v.dtype)


def attention_state(k: Tensor, v: Tensor) -> Tensor:
    """k, v (B, heads, d, N) -> (B, heads, d+1, d) float32: Σ v φ(k)ᵀ, with Σ φ(k)ᵀ as last row.

    The sums run over thousands of positions, so they are accumulated in float32.
    """
    key, value = F.relu(k).float(), v.float()
    ones = torch.ones_like(value[:, :, :1])
    return torch.cat([value, ones], dim=2) @ key.transpose(-1, -2)


def attend(q: Tensor, state: Tensor) -> Tensor:
    """q (B, heads, d, N) and the state of all tokens -> (B, heads, d, N) float32."""
    weighted = state @ F.relu(q).float()
    return weighted[:, :, :-1] / (weighted[:, :, -1:] + EPS)


# --- token-major, as the fused transformer runs it -------------------------------------------


def project_qkv(
    x: Tensor | Rows8,
    weight: Tensor | Weight8,
    heads: int,
    norm_k: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Project tokens x (B, N, D) by weight (3D, D), the rows of q, k and v in this order.

    Both are quantised or neither is; the weight may be packed.

    -> q (B, N, D) in the dtype of x, and the state of k and v, (B, heads, d+1, d) float32.
    With `norm_k` (D,), k passes through an RMSNorm over all of D. Of the matching norm of q only
    the weight matters, and the caller folds it into the projection: the scale that the norm gives
    a token cancels in the quotient of `attend`.
    """
    data = x.values if isinstance(x, Rows8) else x
    matrix = weight.values if isinstance(weight, Weight8) else weight
    width = len(matrix) // 3
    operation = "project_qkv8" if isinstance(x, Rows8) else "project_qkv"
    if dispatch.uses_triton(operation, data, x.dtype) and width // heads in TRITON_HEADS:
        from sana_cli.kernels import linear_attention_triton

        return linear_attention_triton.project_qkv(x, weight, heads, norm_k, eps)
    if isinstance(x, Rows8):
        assert isinstance(weight, Weight8)
        q, k, v = linear8(x, weight).chunk(3, dim=-1)
        q = q.contiguous()  # frees k and v, when they are no longer needed
    else:
        assert isinstance(weight, Tensor)
        if is_packed(weight):
            q, k, v = linear(x, weight).chunk(3, dim=-1)
        else:
            q = linear(x, weight[:width])
            k, v = linear(x, weight[width:]).chunk(2, dim=-1)
    if norm_k is not None:
        scale = torch.rsqrt(_wide(k).pow(2).mean(-1, keepdim=True) + eps)
        k = (k * scale).to(k.dtype) * norm_k
    k = F.relu(k, inplace=True)
    d = width // heads
    state = torch.empty((len(k), heads, d + 1, d), dtype=_wide(k[:0]).dtype, device=k.device)
    for keys, values, target in zip(k, v, state, strict=True):  # as views instead of copies
        keys = _wide(keys)
        products = _heads(_wide(values), heads).transpose(1, 2) @ _heads(keys, heads)
        sums = keys.sum(0).unflatten(0, (heads, 1, -1))
        torch.cat([products, sums], dim=1, out=target)
    return q, state


def attend_tokens(q: Tensor, state: Tensor) -> Tensor:
    """q (B, N, D) before its ReLU and the state of all tokens -> (B, N, D) in the dtype of q."""
    if dispatch.uses_triton("attend_tokens", q) and state.shape[-1] in TRITON_HEADS:
        from sana_cli.kernels import linear_attention_triton

        return linear_attention_triton.attend_tokens(q, state)
    out = torch.empty_like(q)
    for queries, sums, target in zip(q, state, out, strict=True):
        heads = len(sums)
        weighted = _heads(_wide(F.relu(queries)), heads) @ sums.transpose(1, 2)
        torch.div(weighted[..., :-1], weighted[..., -1:].add_(EPS), out=_heads(target, heads))
    return out


def attend_tokens8(q: Tensor, state: Tensor) -> Rows8:
    """`attend_tokens`, quantised with a scale for each group of channels."""
    if dispatch.uses_triton("attend_tokens8", q) and state.shape[-1] in TRITON_HEADS:
        from sana_cli.kernels import linear_attention_triton

        return linear_attention_triton.attend_tokens8(q, state)
    return quantise(attend_tokens(q, state), grouped=True)


def _heads(x: Tensor, heads: int) -> Tensor:
    """View (N, D) as (heads, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def _wide(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it has that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
