"""CUDA graphs: hundreds of launches recorded once, then started by one.

A step of a small picture is over before Python has launched the next operation, so without a
graph the GPU waits for it most of the time.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Graph:
    """What `work` does with tensors of the given shapes, recorded.

    `work` must have run before, so that libraries have chosen and allocated what they need, must
    not wait for the device, and must read nothing that is freed or moved while this lives.
    """

    def __init__(self, work: Callable[[Sequence[Tensor]], Tensor], given: Sequence[Tensor]) -> None:
        self._given = [tensor.clone() for tensor in given]
        self._latest = list(given)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._made = work(self._given)

    def __call__(self, given: Sequence[Tensor]) -> Tensor:
        """The result is written over by the next call."""
        for i, (own, tensor) in enumerate(zip(self._given, given, strict=True)):
            if tensor is not self._latest[i]:
                own.copy_(tensor)
                self._latest[i] = tensor
        self._graph.replay()
        return self._made
