"""ReLU linear attention: attention without a softmax, linear in the number of tokens.

For one head with features φ = ReLU (Sana, arXiv 2410.10629, section 2.2):

    out_i = Σ_j v_j (φ(k_j)·φ(q_i)) / Σ_j φ(k_j)·φ(q_i)

The sums over j do not depend on i, so they are taken once: a (d+1) x d state per head. States of
disjoint sets of tokens add up to the state of all of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-15  # as diffusers; only reached where every feature of a query is zero


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v (B, heads, d, N) in any float dtype -> (B, heads, d, N) in the dtype of v."""
    return attend(q, attention_state(k, v)).to(v.dtype)


def attention_state(k: Tensor, v: Tensor) -> Tensor:
    """k, v (B, heads, d, N) -> (B, heads, d+1, d) float32: Σ v φ(k)ᵀ, and Σ φ(k)ᵀ in the last row.

    The sums run over thousands of positions, so they are taken in float32.
    """
    key, value = F.relu(k).float(), v.float()
    ones = torch.ones_like(value[:, :, :1])
    return torch.cat([value, ones], dim=2) @ key.transpose(-1, -2)


def attend(q: Tensor, state: Tensor) -> Tensor:
    """q (B, heads, d, N) and the state of all tokens -> (B, heads, d, N) float32."""
    weighted = state @ F.relu(q).float()
    return weighted[:, :, :-1] / (weighted[:, :, -1:] + EPS)


# --- token-major, as the transformer runs it -------------------------------------------------


def project_qkv(
    x: Tensor, weight: Tensor, heads: int, norm_k: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Tokens x (B, N, D) and weight (3D, D), of q, k and v in this order.

    -> q (B, N, D) in the dtype of x, and the state of k and v, (B, heads, d+1, d) float32.
    With `norm_k` (D,), k first goes through an RMSNorm over all of D. The one of q that goes
    with it changes nothing but its weight, which belongs into the projection: its scale of a
    token cancels in the quotient of `attend`.
    """
    q, k, v = F.linear(x, weight).chunk(3, dim=-1)
    if norm_k is not None:
        scale = torch.rsqrt(k.float().pow(2).mean(-1, keepdim=True) + eps)
        k = (k * scale).to(k.dtype) * norm_k
    return q, attention_state(_heads(k, heads), _heads(v, heads))


def attend_tokens(q: Tensor, state: Tensor) -> Tensor:
    """q (B, N, D) before its ReLU, and the state of all tokens -> (B, N, D), in the dtype of q."""
    out = attend(_heads(q, state.shape[1]), state).to(q.dtype)
    return out.flatten(1, 2).transpose(1, 2)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, D) -> (B, heads, d, N)."""
    return x.transpose(1, 2).unflatten(1, (heads, -1))
