"""Linear maps with what always follows them."""

from torch import Tensor

from sana_cli.kernels import dispatch
from sana_cli.kernels.linear import linear


def expand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, N, D), weight (E, D), bias (E,) -> silu(x·weightᵀ + bias), (B, N, E)."""
    if dispatch.uses_triton(x):
        from sana_cli.kernels import projection_triton

        return projection_triton.expand(x, weight, bias)
    return linear(x, weight, bias, silu=True)


def add_projected(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None
) -> Tensor:
    """x += gate·(y·weightᵀ + bias), in place; the same tensor is returned.

    x (B, N, D), y (B, N, E), weight (D, E), bias (D,) or None, gate (D,) or None for 1.
    """
    if dispatch.uses_triton(x):
        from sana_cli.kernels import projection_triton

        return projection_triton.add_projected(x, y, weight, bias, gate)
    projected = linear(y, weight, bias)
    return x.add_(projected) if gate is None else x.addcmul_(projected, gate)
