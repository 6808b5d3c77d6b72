"""Launches Triton kernels, or records without a GPU what would be launched."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sana_cli.kernels import dispatch
from sana_cli.kernels.cases import Case
from sana_cli.kernels.dispatch import MIN_CAPABILITY

_DTYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int8: "i8",
}
# Capabilities of which the GeForce cards multiply at half rate when they sum in float32.
HALVED = ((8, 6), (8, 9), (12, 0))
_traced: tuple[tuple[int, int], list[Case]] | None = None  # a capability and its launches


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int,
    num_stages: int = 1,
    **constants: Any,
) -> None:
    """Launch a kernel on the GPU of its first argument; keywords are its constexpr arguments.

    Triton 3.10 changes the default for fused multiply-adds, so it is set explicitly.
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
    """Compute capability to choose block shapes for; the interpreter reports the least one."""
    if _traced is not None:
        return _traced[0]
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else MIN_CAPABILITY


def multiprocessors(device: torch.device) -> int:
    """How many there are to choose block shapes for; without a GPU those of an RTX 4090 Laptop."""
    if _traced is not None or device.type != "cuda":
        return 76
    return torch.cuda.get_device_properties(device).multi_processor_count


def halves_float32_sums(device: torch.device) -> bool:
    """Whether the GPU multiplies in 16 bits twice as fast if it sums in float16 (NVIDIA's white
    papers). A GPU that is not present is taken for a GeForce; professional ones do not halve."""
    if capability(device) not in HALVED:
        return False
    return _traced is not None or "GeForce" in torch.cuda.get_device_name(device)


def sums_in_half(x: Tensor) -> bool:
    """Whether products with x are summed in float16, over one step, and then in float32.

    They are if x is in float16, which is the default only of checkpoints that were trained in it,
    and if that is twice as fast. `selfcheck.HALF_SUMS` bounds the error.
    """
    return x.dtype == torch.float16 and halves_float32_sums(x.device)


def is_traced() -> bool:
    """Whether launches are recorded instead of made."""
    return _traced is not None


def precision() -> str:
    """Precision of float32 matrix products, as set in torch; other dtypes ignore it."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def trace_launches(
    label: str, target: tuple[int, int], function: Callable[..., Any], *arguments: Any
) -> list[Case]:
    """Record what a launcher would launch for meta tensors on a GPU of capability `target`."""
    with _tracing(target) as cases:
        function(*arguments)
    return [case.labelled(label) for case in cases]


@contextmanager
def meta_launches(target: tuple[int, int]) -> Iterator[list[Case]]:
    """Treat meta tensors as those of a GPU of capability `target`; yield its kernel launches."""
    dispatch.meta_is_gpu = True
    try:
        with _tracing(target) as cases:
            yield cases
    finally:
        dispatch.meta_is_gpu = False


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
    """Return the specialisation that Triton compiles for a call: 1 and None become constants."""
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    fixed, aligned, nbytes = dict(constants), [], {}
    for name, value in zip(kernel.arg_names, arguments, strict=False):
        if isinstance(value, Tensor):
            signature[name] = f"*{_DTYPES[value.dtype]}"
            nbytes[name] = value.nbytes
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or value == 1:
            fixed[name] = value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(name)
    return Case(kernel.__name__, kernel, signature, fixed, warps, stages, tuple(aligned), nbytes)
