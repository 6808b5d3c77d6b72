"""The depthwise 3x3 convolution and gate of the Mix-FFN (arXiv 2410.10629, section 2.2)."""

import torch.nn.functional as F
from torch import Tensor

from sana_cli.kernels import dispatch
from sana_cli.kernels.rows8 import Rows8, quantise


def depthwise_glu(x: Tensor, weight: Tensor, bias: Tensor, halo: bool = False) -> Tensor:
    """value·silu(gate), where both are halves of the channels of a depthwise 3x3 convolution of x.

    x (B, h, w, 2E), token-major, after its activation; weight (2E, 1, 3, 3); bias (2E,)
    -> (B, h, w, E). The borders are padded with zeros. With `halo` the first and last rows of x
    serve as padding above and below, and the result is (B, h-2, w, E).
    """
    if dispatch.uses_triton("depthwise_glu", x):
        from sana_cli.kernels import depthwise_glu_triton

        return depthwise_glu_triton.depthwise_glu(x, weight, bias, halo)
    padding = (0 if halo else 1, 1)
    image = x.movedim(-1, 1)  # a channels-last view
    del x  # frees memory if the caller holds no other reference
    y = F.conv2d(image, weight, bias, padding=padding, groups=len(weight))
    del image
    value, gate = y.movedim(1, -1).chunk(2, dim=-1)
    return value * F.silu(gate, inplace=True)  # contiguous, as the next projection reads it


def depthwise_glu8(x: Tensor, weight: Tensor, bias: Tensor) -> Rows8:
    """`depthwise_glu` without halo -> (B, h·w, E), quantised with a scale for each group."""
    if dispatch.uses_triton("depthwise_glu8", x):
        from sana_cli.kernels import depthwise_glu_triton

        return depthwise_glu_triton.depthwise_glu8(x, weight, bias)
    y = depthwise_glu(x, weight, bias)
    del x  # frees memory if the caller holds no other reference
    return quantise(y.flatten(1, 2), grouped=True)
