"""ReLU linear attention: attention without a softmax, linear in the number of tokens.

For one head with features φ = ReLU (Sana, arXiv 2410.10629, section 2.2):

    out_i = Σ_j v_j (φ(k_j)·φ(q_i)) / Σ_j φ(k_j)·φ(q_i)

The sums over j do not depend on i, so they are taken once: a (d+1) x d state per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-15  # as diffusers; only reached where every feature of a query is zero


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v (B, heads, d, N) in any float dtype -> (B, heads, d, N) in the dtype of v.

    The sums run over thousands of positions, so they are taken in float32.
    """
    query, key, value = F.relu(q).float(), F.relu(k).float(), v.float()
    ones = torch.ones_like(value[:, :, :1])
    state = torch.cat([value, ones], dim=2) @ key.transpose(-1, -2)  # (B, heads, d+1, d)
    weighted = state @ query
    return (weighted[:, :, :-1] / (weighted[:, :, -1:] + EPS)).to(v.dtype)
