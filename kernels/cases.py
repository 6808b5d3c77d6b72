"""The specialisations of Triton kernels that `aot.py` compiles."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sana_cli.kernels.rows8 import Rows8, Weight8, quantise, quantise_weight

WIDTHS = {"demo": 224, "0.6B": 1152, "1.6B": 2240}  # of the transformers
TOKENS = 1024  # of an image of 1024²; nothing that is compiled depends on the number


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel, as a model launches it.

    Every `*_triton.py` has a function `cases(capability)` that yields its own on such a GPU. They
    come from `launch.trace_launches`, which runs the launcher itself, so the two cannot disagree.
    """

    name: str  # for display: "linear_silu_kernel 0.6B 1024"
    kernel: Any  # a function decorated with triton.jit
    signature: dict[str, str]  # of every argument: "*bf16", "i32", "fp32" or "constexpr"
    constants: dict[str, Any]  # values of the constexpr arguments
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...]  # integer arguments that are multiples of 16; pointers always are
    nbytes: dict[str, int] = field(compare=False)  # of the elements of every tensor argument

    def labelled(self, label: str) -> "Case":
        return replace(self, name=f"{self.name} {label}")

    @property
    def shape(self) -> tuple[Any, ...]:
        """What is left of a case without the shapes and float dtypes of its tensors."""
        blocks = {name: value for name, value in self.constants.items() if name.isupper()}
        kind = self.kernel.__name__, "*i8" in self.signature.values()
        return *kind, self.num_warps, self.num_stages, tuple(sorted(blocks.items()))

    def is_compiled_as(self, other: "Case") -> bool:
        return replace(self, name="") == replace(other, name="")


def like_rows8(x: Tensor, grouped: bool = False) -> Rows8:
    """Return rows without data that stand for x, on the meta device."""
    return quantise(x, grouped)


def like_weight8(weight: Tensor) -> Weight8:
    return quantise_weight(weight)


def like(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor without data, on the meta device, in torch's default dtype if none is given.

    `aot.all_cases` sets that default, for one precision after the other.
    """
    return torch.empty(shape, dtype=dtype, device="meta")
