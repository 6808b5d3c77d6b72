"""The last convolution of a decoder, and the conversion to 8-bit RGB."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_cli.kernels import dispatch


def conv_to_rgb(
    window: Tensor, weight: Tensor, bias: Tensor, left: int, width: int, halo: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """A 3x3 convolution to RGB in [-1, 1], then `to_rgb8` of the columns left … left + width - 1.

    window (1, h, W, C), token-major; weight (3, C, 3, 3), bias (3,). The borders are padded with
    zeros. With `halo` the first and last rows of the window serve as padding above and below.
    """
    if dispatch.uses_triton("conv_to_rgb", window):
        from sana_cli.kernels import rgb_triton

        return rgb_triton.conv_to_rgb(window, weight, bias, left, width, halo)
    y = F.conv2d(window.movedim(-1, 1), weight, bias, padding=(0 if halo else 1, 1))
    return to_rgb8(y[..., left : left + width])


def to_rgb8(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (1, 3, h, w) in [-1, 1] -> uint8 (h, w, 3), and its extremes in [0, 1].

    The extremes are float32 scalars taken before rounding, both NaN if any value is.
    """
    unit = x[0].permute(1, 2, 0).float().mul(0.5).add_(0.5).clamp_(0, 1)
    low, high = unit.amin(), unit.amax()
    return unit.mul_(255).round_().to(torch.uint8), low, high
