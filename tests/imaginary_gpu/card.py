"""A GPU of capability 9.0 whose tensors have shapes, dtypes and a device, and no numbers.

Torch's fake tensors compute nothing but refuse what a card would, as operands on two devices.
Kernels are not started, but it is noted with what they would have been. Run with the library of
`library.cpp` in LD_PRELOAD.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sana_cli.kernels import launch
from sana_cli.kernels.cases import Case
from sana_cli.weights import checkpoint

CAPABILITY = (9, 0)
STREAM = SimpleNamespace(record_event=lambda: SimpleNamespace(synchronize=lambda: None))
CUDA = {
    "is_available": lambda: True,
    "is_bf16_supported": lambda *args, **words: True,
    "get_device_capability": lambda *args: CAPABILITY,
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "synchronize": lambda *args: None,
    "empty_cache": lambda: None,
    "max_memory_allocated": lambda *args: 0,
    "reset_peak_memory_stats": lambda *args: None,
    "current_stream": lambda *args: STREAM,
    "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
    "graph": lambda graph: nullcontext(),
}


aten = torch.ops.aten
PRODUCTS = {
    *(aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.matmul, aten.linear),
    *(aten.convolution, aten.conv2d),
}


class _OneDtype(TorchDispatchMode):
    """Refuses products of several dtypes, as CUDA's libraries do and fake tensors do not."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.overloadpacket in PRODUCTS:
            dtypes = {given.dtype for given in args if isinstance(given, torch.Tensor)}
            if len(dtypes) > 1:
                raise RuntimeError(f"{func}: expected one dtype, and there are {dtypes}")
        return func(*args, **(kwargs or {}))


class _Literals(TorchFunctionMode):
    """`torch.tensor` gives numbers that can be read, unless it is asked for them on the card."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.tensor:
            return func(*args, **kwargs)
        device = kwargs.pop("device", None)
        with _disable_current_modes():
            made = func(*args, **kwargs)
        return made if device is None else torch.empty_like(made, device=device)


def _apply(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module.to` in plain words; torch's own cannot swap parameters that have no storage."""
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    made = function(parameter)
                module._parameters[name] = nn.Parameter(made, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
    return self


def _unread(read: Any) -> Any:
    """The tensors of a file, without their numbers."""

    def tensors(*args: Any) -> Iterator[tuple[str, torch.Tensor]]:
        with _disable_current_modes():
            found = [(name, tensor.shape, tensor.dtype) for name, tensor in read(*args)]
        for name, shape, dtype in found:
            yield name, torch.empty(shape, dtype=dtype)

    return tensors


@contextmanager
def card() -> Iterator[list[Case]]:
    """Inside there is the card; gives the kernels that it would have run."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        for name, stand_in in CUDA.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        stack.enter_context(patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(
            patch.object(checkpoint, "read_tensors", _unread(checkpoint.read_tensors))
        )
        stack.enter_context(fake)
        stack.enter_context(_OneDtype())
        stack.enter_context(_Literals())
        yield stack.enter_context(launch._tracing(CAPABILITY))
