"""CUDA graphs of repeated calls, of what shows without a GPU."""

import gc
import weakref

import pytest
import torch

from sana_cli.models import cuda_graph


class Pool:
    """Memory of a graph."""


@pytest.mark.parametrize("ends", [False, True], ids=["in-the-call", "and-ending-it"])
def test_a_failed_capture_holds_nothing_while_the_call_runs_without_it(monkeypatch, ends):
    allocated: list[weakref.ref] = []

    class Failing:
        def __init__(self, function, inputs):
            self.pool, self.inputs = Pool(), [tensor.clone() for tensor in inputs]
            allocated.extend(map(weakref.ref, (self.pool, self.inputs[0])))
            try:
                function(self.inputs, full=True)
            finally:
                if ends:  # as torch does, whose end of a failed capture fails as well
                    raise RuntimeError("failed due to a previous error")

    def function(inputs, full=False):
        activation = torch.zeros(9)
        if full:
            allocated.append(weakref.ref(activation))
            raise torch.OutOfMemoryError("CUDA out of memory\nmore")
        assert [one() for one in allocated] == [None] * len(allocated)
        return (activation,)

    monkeypatch.setattr(cuda_graph, "GraphedCall", Failing)
    call, inputs = cuda_graph.RepeatedCall(), [torch.zeros(3)]
    gc.disable()
    try:
        for _ in range(2):
            call(function, inputs, None, pays=True)
    finally:
        gc.enable()
    assert len(allocated) == 3 and call.error == "CUDA out of memory"
