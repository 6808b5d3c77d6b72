"""Starting Triton kernels; or finding out, with no GPU at hand, what would be started."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sana_cli.kernels.cases import Case
from sana_cli.kernels.dispatch import LEAST_CAPABILITY

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8"}
_traced: tuple[tuple[int, int], list[Case]] | None = None  # a capability, and what it would run


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int,
    num_stages: int = 1,
    **constants: Any,
) -> None:
    """Start a kernel on the GPU of the first argument: first its arguments, then its constexprs.

    Triton's default for fused multiply-adds changes with version 3.10, so it is stated.
    """
    if _traced is not None:
        _traced[1].append(_case(kernel, arguments, constants, num_warps, num_stages))
        return
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](
            *arguments,
            **constants,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=True,
        )


def capability(device: torch.device) -> tuple[int, int]:
    """That of the GPU to choose block shapes for. Triton's interpreter poses as the least one."""
    if _traced is not None:
        return _traced[0]
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else LEAST_CAPABILITY


def precision() -> str:
    """How products of float32 are taken, which torch decides; no other dtype heeds it."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def trace_launches(
    label: str, target: tuple[int, int], function: Callable[..., Any], *arguments: Any
) -> list[Case]:
    """What a launcher starts for tensors on the meta device, on a GPU of that capability."""
    with _tracing(target) as cases:
        function(*arguments)
    return [case.labelled(label) for case in cases]


@contextmanager
def _tracing(target: tuple[int, int]) -> Iterator[list[Case]]:
    global _traced
    cases: list[Case] = []
    _traced = target, cases
    try:
        yield cases
    finally:
        _traced = None


def _case(
    kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], warps: int, stages: int
) -> Case:
    """The specialisation that Triton makes of a call: 1 and None are compiled in."""
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    fixed, aligned = dict(constants), []
    for name, value in zip(kernel.arg_names, arguments, strict=False):
        if isinstance(value, Tensor):
            signature[name] = f"*{_DTYPES[value.dtype]}"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or value == 1:
            fixed[name] = value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(name)
    return Case(kernel.__name__, kernel, signature, fixed, warps, stages, tuple(aligned))
