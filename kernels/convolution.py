"""Convolutions of channels-last maps, with what follows them in DC-AE's decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_cli.kernels import dispatch, launch
from sana_cli.kernels.rms_norm import rms_norm

STEP = 64  # channels; the fused kernels take multiples of it
NORMED = (128, 256)  # channels out, of which a tile of the fused kernel spans all
TILE = 128  # channels out of a tile of the fused upsampling


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


def new_map(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Allocate a map (B, C, h, w), channels-last, of the dtype and on the device of another."""
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def lay_out_by_taps(weight: Tensor) -> Tensor:
    """Copy depthwise weight (C, 1, k, k) so that one tap of neighbouring channels is contiguous.

    Kernels read it like this; any other layout is copied at every call.
    """
    return by_taps(weight).t().view(weight.shape)


def by_taps(weight: Tensor) -> Tensor:
    """(C, 1, k, k) -> (k², C), contiguous: a view if `lay_out_by_taps` has laid it out."""
    return weight.flatten(1).t().contiguous()


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


def upsample(x: Tensor, upper: Tensor, lower: Tensor, bias: Tensor, repeats: int | None) -> Tensor:
    """Double the sides of x (B, C, h, w) by four 2x2 convolutions -> (B, N, 2h, 2w), channels-last.

    Rows 2i are made by `upper`, rows 2i + 1 by `lower`, both (2N, C, 2, 2), of which the first N
    make even columns and the others odd ones; bias (2N,), the same in both halves. With `repeats`,
    4N/C, x is added as a shortcut: a pixel shuffle of its channels, each repeated so often.
    """
    if len(upper) % (2 * TILE) == 0 and _is_fused("upsample", x):
        from sana_cli.kernels import convolution_triton

        return convolution_triton.upsample(x, upper, lower, bias, repeats)
    return upsample_window(F.pad(x, (1, 1, 1, 1)), upper, lower, bias, repeats)


def upsample_window(
    window: Tensor, upper: Tensor, lower: Tensor, bias: Tensor, repeats: int | None
) -> Tensor:
    """`upsample` of a window (B, C, h + 2, w + 2), which has a halo of one pixel."""
    x, out = window[:, :, 1:-1, 1:-1], len(upper) // 2
    batch, _, height, width = x.shape
    y = new_map(x, (batch, out, 2 * height, 2 * width))
    for i, weight in enumerate((upper, lower)):
        z = convolve(window[:, :, i : i + height + 1], weight, bias)
        for j in (0, 1):
            pixels = z[:, j * out : (j + 1) * out, :, j : j + width]
            target = y[:, :, i::2, j::2]
            if repeats is None:
                target.copy_(pixels)
            else:
                torch.add(pixels, _shuffled(x, out, repeats, 2 * i + j), out=target)
    return y


def _shuffled(x: Tensor, out: int, repeats: int, offset: int) -> Tensor:
    """The shortcut's value at one pixel of every 2x2 block: `offset` is 2·row + column."""
    if 4 % repeats == 0:
        return x[:, offset // repeats :: 4 // repeats]
    channels = (torch.arange(out, device=x.device) * 4 + offset) // repeats
    return x.index_select(1, channels)


def _is_fused(operation: str, x: Tensor) -> bool:
    """Whether a fused kernel runs. In float32 cuDNN has faster algorithms than such a product.

    A GPU that multiplies at half rate gains even if the kernel is slower than cuDNN's: see the
    README.
    """
    if x.itemsize != 2 or x.shape[1] % STEP or not launch.halves_float32_sums(x.device):
        return False
    return dispatch.uses_triton(operation, x)
