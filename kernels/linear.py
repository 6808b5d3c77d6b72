"""Linear maps through oneDNN on the CPU.

PyTorch computes them with MKL, which reaches about half of oneDNN's speed on some CPUs that are
not Intel's, and it computes 1x1 convolutions with oneDNN only on more than one thread.

oneDNN rearranges a weight whenever it multiplies by it, unless the weight is packed: then that has
been done once. The sums are the same, in the same order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 512  # of x, for which oneDNN chooses the layout of packed weights; others take no longer


def uses_onednn(x: Tensor) -> bool:
    """Whether to compute products with x by oneDNN explicitly."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and x.is_cpu and x.dtype == torch.float32


def pack(weight: Tensor) -> Tensor:
    """Copy a float32 weight (E, D) on the CPU into the layout that oneDNN multiplies by.

    The copy is for `linear` alone: it has no strides, so it cannot be sliced.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


def is_packed(weight: Tensor) -> bool:
    return weight.is_mkldnn


def unpack(weight: Tensor) -> Tensor:
    """Return the weight (E, D) that was packed."""
    return weight.to_dense()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False) -> Tensor:
    """x (..., D), weight (E, D), bias (E,) -> x·weightᵀ + bias (..., E), then SiLU if `silu`.

    The weight may be packed. For inference only: it has no gradient.
    """
    if uses_onednn(x):
        act = "swish" if silu else "none"
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, act, [], "")
    y = F.linear(x, weight, bias)
    return F.silu(y, inplace=True) if silu else y


def pointwise(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """A 1x1 convolution of x (B, D, h, w), channels-last, in groups of channels, without bias."""
    if uses_onednn(x):
        return torch.mkldnn_convolution(x, weight, None, (0, 0), (1, 1), (1, 1), groups)
    return F.conv2d(x, weight, groups=groups)
