"""The state of linear attention from keys and values that are interleaved by head."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_cli.kernels import dispatch


def kv_state(kv: Tensor, d: int) -> Tensor:
    """kv (B, N, heads·2·d), for each head k and then v -> (B, heads, d+1, d) float32.

    The result is `linear_attention.attention_state`: Σ v φ(k)ᵀ, with Σ φ(k)ᵀ as the last row.
    """
    if dispatch.uses_triton("kv_state", kv):
        from sana_cli.kernels import kv_state_triton

        return kv_state_triton.kv_state(kv, d)
    kv = kv.to(torch.promote_types(kv.dtype, torch.float32))
    key, value = kv.unflatten(-1, (-1, 2, d)).unbind(-2)  # (B, N, heads, d)
    key = F.relu(key)
    products = value.permute(0, 2, 3, 1) @ key.permute(0, 2, 1, 3)
    return torch.cat([products, key.sum(1)[:, :, None]], dim=2)
