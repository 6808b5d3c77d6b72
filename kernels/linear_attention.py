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
