"""RMSNorm over channels (arXiv 1910.07467), alone or with the activation or residual after it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_cli.kernels import dispatch

ACTIVATIONS = {"relu": F.relu, "silu": F.silu}


def rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """act(x / rms(x) · weight + bias) + residual, in place; x is returned.

    x and residual (..., C), of any float dtype and layout, fastest if contiguous; weight and bias
    (C,). The mean square is computed in float32 (float64 for float64). `activation` is one of
    ACTIVATIONS.
    """
    if dispatch.uses_triton("rms_norm", x):
        from sana_cli.kernels import rms_norm_triton

        return rms_norm_triton.rms_norm(x, weight, bias, eps, residual, activation)
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    x.mul_(norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_())
    torch.addcmul(bias, x, weight, out=x)
    if activation:
        ACTIVATIONS[activation](x, inplace=True)
    return x if residual is None else x.add_(residual)
