"""3x3 convolutions of channels-last maps, with what follows them in DC-AE's residual blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_cli.kernels import dispatch, launch
from sana_cli.kernels.rms_norm import rms_norm

STEP = 64  # channels; the fused kernel takes multiples of it
NORMED = (128, 256)  # channels out, of which a tile of the fused kernel spans all


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: tuple[int, int] = (0, 0),
    stride: tuple[int, int] = (1, 1),
) -> Tensor:
    """A convolution of x (B, C, h, w), channels-last, as the result is.

    cuDNN and oneDNN return it so for such an x; where another library does not, it is copied.
    """
    y = F.conv2d(x, weight, bias, stride, padding)
    return y if y.is_meta else y.contiguous(memory_format=torch.channels_last)


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU(conv(x)) with zeros around x (B, C, h, w), channels-last -> (B, N, h, w), the same.

    weight (N, C, 3, 3), bias (N,).
    """
    if _is_fused("conv_silu", x):
        from sana_cli.kernels import convolution_triton

        return convolution_triton.conv_silu(x, weight, bias)
    return F.silu(convolve(x, weight, bias, (1, 1)), inplace=True)


def conv_norm_add(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, eps: float, residual: Tensor
) -> Tensor:
    """RMSNorm(conv(x)) + residual with zeros around x (B, C, h, w) -> (B, N, h, w).

    All maps are channels-last; weight (N, C, 3, 3); scale and shift (N,) are those of `rms_norm`.
    """
    if len(weight) in NORMED and _is_fused("conv_norm_add", x):
        from sana_cli.kernels import convolution_triton

        return convolution_triton.conv_norm_add(x, weight, scale, shift, eps, residual)
    y = convolve(x, weight, None, (1, 1))
    rms_norm(y.movedim(1, -1), scale, shift, eps, residual.movedim(1, -1))
    return y


def _is_fused(operation: str, x: Tensor) -> bool:
    """Whether the fused kernel runs. In float32 cuDNN has faster algorithms than such a product.

    A GPU that multiplies at half rate gains even if the kernel is slower than cuDNN's: see the
    README.
    """
    if x.itemsize != 2 or x.shape[1] % STEP or not launch.halves_float32_sums(x.device):
        return False
    return dispatch.uses_triton(operation, x)
