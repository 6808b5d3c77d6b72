"""Two GPUs of capability 9.0 whose tensors have shapes, dtypes and a device, and no numbers.

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
from torch.utils._pytree import tree_iter

from sana_cli.kernels import launch, selfcheck
from sana_cli.kernels.cases import Case
from sana_cli.weights import checkpoint

CAPABILITY, MEMORY = (9, 0), 80 * 10**9


class Cards:
    """Which GPU is current, and which one is being captured."""

    current, captured = 0, None
    reserved = 0  # bytes; every capture takes a thousand
    fail: Exception | None = None  # raised by the next captures
    capped: dict[int, float] = {}  # share of the memory by GPU
    waits = 0  # for a GPU, until all that it was given is done
    milliseconds = 0.0  # between any two events
    checked: list[str] = []  # in which precisions the kernels were to be checked

    @classmethod
    def check(cls, device: Any, kinds: Any) -> bool:
        cls.checked += [selfcheck.name_of(dtype) + " int8" * eight for dtype, eight in kinds]
        return False

    @classmethod
    def wait(cls, device: Any = None) -> None:
        if cls.captured is not None:
            raise RuntimeError("a wait for the GPU is not captured")
        cls.waits += 1

    @classmethod
    @contextmanager
    def using(cls, device: Any) -> Iterator[None]:
        before, cls.current = cls.current, torch.device(device).index
        yield
        cls.current = before

    @classmethod
    @contextmanager
    def capture(cls, graph: Any, stream: int | None = None) -> Iterator[None]:
        cls.captured = cls.current if stream is None else stream
        if cls.captured != graph.card:
            raise RuntimeError("the graph and its stream are on two devices")
        try:
            yield
            cls.reserved += 1000
            if cls.fail:
                raise cls.fail
        except Exception as error:
            raise RuntimeError("capture failed due to a previous error") from error
        finally:
            cls.captured = None


class Event:
    """Can be asked about once something has waited for the GPU."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.after = Cards.waits

    def synchronize(self) -> None:
        Cards.wait()

    def elapsed_time(self, end: "Event") -> float:
        if Cards.waits <= max(self.after, end.after):
            raise RuntimeError("device not ready")
        return Cards.milliseconds


STREAM = SimpleNamespace(record_event=lambda event=None: event or Event())
CUDA = {
    "is_available": lambda: True,
    "is_bf16_supported": lambda *args, **words: True,
    "get_device_capability": lambda *args: CAPABILITY,
    "get_device_properties": lambda *args: SimpleNamespace(total_memory=MEMORY),
    "current_device": lambda: Cards.current,
    "device_count": lambda: 2,
    "device": Cards.using,
    "synchronize": Cards.wait,
    "empty_cache": lambda: None,
    "memory_allocated": lambda *args: 0,
    "memory_reserved": lambda *args: Cards.reserved,
    "max_memory_allocated": lambda *args: 0,
    "reset_peak_memory_stats": lambda *args: None,
    "set_per_process_memory_fraction": lambda share, index: Cards.capped.update({index: share}),
    "current_stream": lambda *args: STREAM,
    "Event": Event,
    "stream": nullcontext,
    "Stream": lambda device: torch.device(device).index,
    "CUDAGraph": lambda: SimpleNamespace(card=Cards.current, replay=lambda: None),
    "graph": Cards.capture,
}


aten = torch.ops.aten
PRODUCTS = {
    *(aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.matmul, aten.linear),
    *(aten.convolution, aten.conv2d),
}


COPIES = {aten._to_copy, aten.copy_}


def devices(values: Any, least: int = 0) -> set[torch.device]:
    """Where tensors are, of so many dimensions at least."""
    tensors = (one for one in tree_iter(values) if isinstance(one, torch.Tensor))
    return {one.device for one in tensors if one.ndim >= least}


class _Refusals(TorchDispatchMode):
    """Refuses what a card would and fake tensors do not.

    These are products of several dtypes, and, while a GPU is captured, work for any other device:
    for another GPU, or for the CPU, to which a copy would wait and which repeats nothing.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.overloadpacket in PRODUCTS:
            dtypes = {given.dtype for given in args if isinstance(given, torch.Tensor)}
            if len(dtypes) > 1:
                raise RuntimeError(f"{func}: expected one dtype, and there are {dtypes}")
        if func.namespace != "prim":
            with self:  # in inference mode composite operations come whole
                made = func.decompose(*args, **(kwargs or {}))
            if made is not NotImplemented:
                return made
        made = func(*args, **(kwargs or {}))
        given, outcome = devices((args, kwargs)), devices(made)
        if Cards.captured is not None:
            copied = given if func.overloadpacket in COPIES else set()
            # A number may be a tensor without dimensions on the CPU.
            others = (devices(made, 1) | copied) - {torch.device("cuda", Cards.captured)}
            if others:
                raise RuntimeError(f"{func} on {others.pop()} is not captured")
        if any(one.type == "cuda" for one in given) and torch.device("cpu") in outcome:
            Cards.wait()
        return made


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


def _passed(device: Any, dtype: Any, eight: bool = False) -> dict[str, selfcheck.Outcome]:
    """Outcomes of the self-check, as the kernels cannot run."""
    operations = (*selfcheck.OPERATIONS, *selfcheck.OPERATIONS8)
    return dict.fromkeys(operations, selfcheck.Outcome(150.0))


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
        stack.enter_context(patch.object(selfcheck, "start", Cards.check))
        stack.enter_context(patch.object(selfcheck, "outcomes", _passed))
        stack.enter_context(
            patch.object(checkpoint, "read_tensors", _unread(checkpoint.read_tensors))
        )
        stack.enter_context(fake)
        stack.enter_context(_Refusals())
        stack.enter_context(_Literals())
        yield stack.enter_context(launch._tracing(CAPABILITY))
