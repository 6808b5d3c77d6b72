"""CUDA graphs: hundreds of kernel launches captured once and replayed by a single launch.

At small image sizes the GPU finishes an operation before Python has launched the next one, so
without a graph it idles most of the time.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class GraphedCall:
    """A captured call of `function` with inputs of fixed shapes.

    `function` must have run once before, so that libraries have chosen their algorithms and
    allocated their workspaces. It must not synchronise with the device, and whatever it reads
    besides `inputs` must be neither freed nor moved while this object lives.
    """

    def __init__(
        self, function: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Tensor]
    ) -> None:
        device = inputs[0].device
        self._static_inputs = [tensor.clone() for tensor in inputs]
        self._latest = list(inputs)
        # After a failed capture torch stays on the graph's stream; this leaves it.
        same_stream = torch.cuda.stream(torch.cuda.current_stream(device))
        # A graph belongs to the current device, and torch's own stream to that of the first graph.
        with torch.cuda.device(device), same_stream:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=torch.cuda.Stream(device)):
                before = torch.cuda.memory_reserved(device)
                self._output = function(self._static_inputs)
        # Held by the graph for as long as it lives: its activations.
        self.nbytes = torch.cuda.memory_reserved(device) - before

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Replay with other inputs of the same shapes. The next call overwrites the result."""
        for i, (static, tensor) in enumerate(zip(self._static_inputs, inputs, strict=True)):
            if tensor is not self._latest[i]:  # text and control stay the same for a whole run
                static.copy_(tensor)
                self._latest[i] = tensor
        self._graph.replay()
        return self._output
