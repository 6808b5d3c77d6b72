"""LayerNorm without weights, then scale and shift (adaLN-single, PixArt-α, section 2.3)."""

import torch.nn.functional as F
from torch import Tensor

from sana_cli.kernels import dispatch
from sana_cli.kernels.rows8 import Rows8, quantise


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x (B, N, D), shift and scale (D,) -> LayerNorm(x)·(1 + scale) + shift, in the dtype of x."""
    if dispatch.uses_triton("modulate", x):
        from sana_cli.kernels import modulation_triton

        return modulation_triton.modulate(x, shift, scale, eps)
    return F.layer_norm(x, x.shape[-1:], 1 + scale, shift, eps)


def modulate8(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Rows8:
    """`modulate`, quantised with one scale a token."""
    if dispatch.uses_triton("modulate8", x):
        from sana_cli.kernels import modulation_triton

        return modulation_triton.modulate8(x, shift, scale, eps)
    return quantise(modulate(x, shift, scale, eps), grouped=False)
