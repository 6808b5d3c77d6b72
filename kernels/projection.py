"""Linear maps fused with the elementwise operations after them.

Tokens and weight are both quantised or neither is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_cli.kernels import dispatch
from sana_cli.kernels.linear import linear
from sana_cli.kernels.rows8 import Rows8, Weight8, linear8

HALF_MAX = torch.finfo(torch.float16).max


def linear_silu(x: Tensor | Rows8, weight: Tensor | Weight8, bias: Tensor) -> Tensor:
    """x (B, N, D), weight (E, D), bias (E,) -> silu(x·weightᵀ + bias), (B, N, E)."""
    eight = isinstance(x, Rows8)
    if dispatch.uses_triton("linear_silu8" if eight else "linear_silu", bias):
        from sana_cli.kernels import projection_triton

        return projection_triton.linear_silu(x, weight, bias)
    if isinstance(x, Rows8):
        assert isinstance(weight, Weight8)
        return F.silu(linear8(x, weight, bias), inplace=True)
    assert isinstance(weight, Tensor)
    return linear(x, weight, bias, silu=True)


def gated_residual_linear_(
    x: Tensor,
    y: Tensor | Rows8,
    weight: Tensor | Weight8,
    bias: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """x += gate·(y·weightᵀ + bias), in place; x is returned.

    x (B, N, D), y (B, N, E), weight (D, E), bias (D,) or None, gate (D,) or None for 1. In
    float16 the projection is clamped to the range of the dtype, as in diffusers.
    """
    eight = isinstance(y, Rows8)
    if dispatch.uses_triton("gated_residual_linear8_" if eight else "gated_residual_linear_", x):
        from sana_cli.kernels import projection_triton

        return projection_triton.gated_residual_linear_(x, y, weight, bias, gate)
    if isinstance(y, Rows8):
        assert isinstance(weight, Weight8)
        projected = linear8(y, weight, bias)
    else:
        assert isinstance(weight, Tensor)
        projected = linear(y, weight, bias)
    if projected.dtype == torch.float16:
        projected.clamp_(-HALF_MAX, HALF_MAX)
    return x.add_(projected) if gate is None else x.addcmul_(projected, gate)
