"""Multi-scale features for linear attention (EfficientViT, arXiv 2205.14756, section 3.1)."""

import torch.nn.functional as F
from torch import Tensor

from sana_cli.kernels import dispatch
from sana_cli.kernels.linear import pointwise


def aggregate(window: Tensor, depth: Tensor, point: Tensor, out: Tensor) -> Tensor:
    """A depthwise k x k convolution, then a 1x1 convolution within groups of channels.

    depth (C, 1, k, k), k odd; point (C, d, 1, 1), so C/d groups. All tensors are token-major.
    out (B, h, w, C) is filled and returned; it may be a slice of the channels of a wider tensor.
    window (B, h + 2·reach, w, C) has a halo of reach >= k // 2 rows above and below, zeros at the
    borders of the map; or no halo, and is padded with zeros here, as it is left and right.
    """
    if dispatch.uses_triton("aggregate", window):
        from sana_cli.kernels import multiscale_triton

        return multiscale_triton.aggregate(window, depth, point, out)
    padded, margin = window.movedim(-1, 1), depth.shape[-1] // 2
    reach = (window.shape[1] - out.shape[1]) // 2
    if reach:
        padded = padded[:, :, reach - margin : window.shape[1] - reach + margin]
    y = F.conv2d(padded, depth, padding=(0 if reach else margin, margin), groups=len(depth))
    return out.copy_(pointwise(y, point, len(point) // point.shape[1]).movedim(1, -1))
