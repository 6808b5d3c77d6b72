"""Softmax attention of image tokens to the keys and values of a text."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_cli.kernels import dispatch
from sana_cli.kernels.linear import linear


def attend_text(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Tensor,
    eps: float,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Attend with the queries RMSNorm(x·weightᵀ + bias), whose norm spans all heads.

    x (B, N, D), weight (D, D), bias and norm (D,) -> (B, N, D). The whole batch attends to the keys
    and values (heads, L, D/heads) of one text, fastest as views of (L, heads, D/heads). mask (1, L)
    is added to the scores, or None. The mean square is computed in float32 (float64 for float64).
    """
    if dispatch.uses_triton("attend_text", x):
        from sana_cli.kernels import text_attention_triton

        return text_attention_triton.attend_text(x, weight, bias, norm, eps, keys, values, mask)
    q = linear(x, weight, bias)
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = torch.rsqrt(q.to(wide).square().mean(-1, keepdim=True) + eps)
    return attend_keys((q * scale).to(norm.dtype) * norm, keys, values, mask)


def attend_keys(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with queries (B, N, D) as they are; the other arguments are those of `attend_text`."""
    if q.is_meta:  # on meta, torch would count a score matrix that no device materialises
        return torch.empty_like(q)
    q = q.unflatten(-1, (len(keys), -1)).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, keys[None], values[None], attn_mask=mask)
    return y.transpose(1, 2).flatten(2)
