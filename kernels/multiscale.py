"""Multi-scale features for linear attention (EfficientViT, arXiv 2205.14756, section 3.1)."""

import torch.nn.functional as F
from torch import Tensor

from sana_cli.kernels import dispatch
from sana_cli.kernels.linear import pointwise


def aggregate(window: Tensor, depth: Tensor, point: Tensor, out: Tensor) -> Tensor:
    """A depthwise k x k convolution, then a 1x1 convolution within groups of channels.

    depth (C, 1, k, k), k odd; point (C, d, 1, 1), so C/d groups. Token-major: out (B, h, w, C) is
    filled and returned; it may be some of the channels of a wider tensor. window (B, h + 2·reach,
    w, C) has at least k // 2 rows of context above and as many below, which are zeros beyond
    the border of the picture; beyond its sides stand zeros.
    """
    if dispatch.uses_triton(window):
        from sana_cli.kernels import multiscale_triton

        return multiscale_triton.aggregate(window, depth, point, out)
    near, kernel = window.movedim(-1, 1), depth.shape[-1]
    spare = (window.shape[1] - out.shape[1]) // 2 - kernel // 2
    near = near[:, :, spare : window.shape[1] - spare]
    y = F.conv2d(near, depth, padding=(0, kernel // 2), groups=len(depth))
    return out.copy_(pointwise(y, point, len(point) // point.shape[1]).movedim(1, -1))
