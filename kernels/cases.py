"""What a Triton kernel is compiled for: the shape of a case that `aot.py` goes through."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel, as a model launches it.

    Every `*_triton.py` has `cases()`, which lists its own.
    """

    name: str  # for people: "expand 0.6B"
    kernel: Any  # the function that triton.jit made
    signature: dict[str, str]  # of every argument: "*bf16", "i32", "fp32" or "constexpr"
    constants: dict[str, Any]  # the values of the constexpr ones
    num_warps: int
    num_stages: int
    tensor_cores: bool = False  # it multiplies matrices and must use them
    aligned: tuple[str, ...] = field(
        default=()
    )  # integers that are multiples of 16, besides pointers
