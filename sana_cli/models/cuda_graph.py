"""CUDA graphs: hundreds of kernel launches captured once and replayed by a single launch.

At small image sizes the GPU finishes an operation before Python has launched the next one, so
without a graph it idles most of the time.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


class RepeatedCall:
    """A function that is called again and again: through a graph once that pays.

    If the graph cannot be captured, for lack of memory for instance, calls with these shapes run
    without one; `error` says why.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Free the graph. Also needed before the weights that it reads are moved."""
        self._graph: GraphedCall | None = None
        self._signature: object = None  # of the last call
        self.calls = 0  # with that signature, without those that failed
        self.error: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the graph holds beside the weights."""
        return 0 if self._graph is None else self._graph.nbytes

    def __call__(
        self, function: Function, inputs: Sequence[Tensor], settings: object, pays: bool
    ) -> tuple[Tensor, ...]:
        """Return `function(inputs)`. `settings` is what else decides the work that it launches.

        A graph of other shapes or settings is freed. One of these is captured from their second
        call on, if it pays.
        """
        signature = [tensor.shape for tensor in inputs], settings
        if signature != self._signature:
            self.forget()
            self._signature = signature
        if self.calls > 0 and pays and self._graph is None and self.error is None:
            try:
                self._graph = GraphedCall(function, inputs)
            except RuntimeError as error:
                # Ending a failed capture fails as well; the first error is the cause. Its text
                # alone is kept: its traceback holds all that the capture had allocated.
                self.error = str(error.__context__ or error).partition("\n")[0]
        if self._graph is None:
            made = function(inputs)
        else:
            made = tuple(tensor.clone() for tensor in self._graph(inputs))
        self.calls += 1
        return made


class GraphedCall:
    """A captured call of `function` with inputs of fixed shapes.

    `function` must have run once before, so that libraries have chosen their algorithms and
    allocated their workspaces. It must not synchronise with the device, and whatever it reads
    besides `inputs` must be neither freed nor moved while this object lives.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor]) -> None:
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

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Replay with other inputs of the same shapes. The next call overwrites the results."""
        for i, (static, tensor) in enumerate(zip(self._static_inputs, inputs, strict=True)):
            if tensor is not self._latest[i]:  # text and control stay the same for a whole run
                static.copy_(tensor)
                self._latest[i] = tensor
        self._graph.replay()
        return self._output
