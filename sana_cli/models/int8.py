"""Gemma's linear maps in 8 bits: LLM.int8 (arXiv 2208.07339) with the operators of bitsandbytes.

bitsandbytes takes two seconds to import, so it is imported when a layer first runs or is quantised.
"""

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn

from sana_cli.errors import SanaError

OUTLIER = 6.0  # the paper's threshold, section 3.2


class Int8Linear(nn.Module):
    """y = x Wᵀ with both in int8, one scale per row; columns of x with outliers in the dtype of x.

    weight: int8 (out, in). SCB (the name bitsandbytes uses): float32 (out,), the largest magnitude
    of each row, which is quantised to 127.
    """

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("SCB", scale)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out) of the same dtype, bfloat16 or float32.

        The operator reads float16, which is safe for values of any size: those beyond its range
        become infinite, count as outliers, and are then taken from `x` itself. All other values
        are below 6, so their products stay well within the range.
        """
        rows = x.flatten(0, -2).contiguous()
        quantised, scale, outliers = bitsandbytes().functional.int8_vectorwise_quant(
            rows.to(torch.float16), OUTLIER
        )
        y, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            rows, quantised, self.weight, scale, self.SCB, outliers, None
        )
        return y.unflatten(0, x.shape[:-1])


def quantise(model: nn.Module) -> dict[str, Tensor]:
    """Quantise every linear map of `model`; return int8 weights and float32 scales by name."""
    tensors: dict[str, Tensor] = {}
    for name, linear in _linears(model).items():
        # Quantised on the CPU from float32, so that one file serves every device.
        wide = linear.weight.float().contiguous()
        quantised, scale, _ = bitsandbytes().functional.int8_vectorwise_quant(wide)
        tensors |= {f"{name}.weight": quantised, f"{name}.SCB": scale}
    return tensors


def is_quantised_from(model: nn.Module, tensors: dict[str, Tensor]) -> bool:
    """Whether tensors have the names, dtypes and shapes that `quantise` gives them."""
    expected: dict[str, tuple[torch.dtype, torch.Size]] = {}
    for name, linear in _linears(model).items():
        expected[f"{name}.weight"] = torch.int8, linear.weight.shape
        expected[f"{name}.SCB"] = torch.float32, linear.weight.shape[:1]
    return {name: (t.dtype, t.shape) for name, t in tensors.items()} == expected


def install(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Replace every linear map of `model` by an `Int8Linear` with the tensors of `quantise`.

    The original weights are not read, so memory-mapped ones stay on disk.
    """
    for name in _linears(model):
        parent, _, child = name.rpartition(".")
        quantised = Int8Linear(tensors[f"{name}.weight"], tensors[f"{name}.SCB"])
        setattr(model.get_submodule(parent), child, quantised)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


@functools.cache
def bitsandbytes() -> ModuleType:
    """Import the library; SanaError if that fails or it lacks this version of CUDA."""
    try:
        with _no_download():
            import bitsandbytes
            import bitsandbytes.cextension
            import bitsandbytes.functional
        is_stub = isinstance(
            bitsandbytes.cextension.lib, bitsandbytes.cextension.ErrorHandlerMockBNBNativeLibrary
        )
        if is_stub and torch.cuda.is_available():
            raise ImportError(f"it has no library for CUDA {torch.version.cuda}")
    except Exception as error:  # loading the installed CUDA can raise anything
        reason = str(error).partition("\n")[0]
        raise SanaError(
            f"bitsandbytes, which int8 needs, cannot be loaded: {reason}",
            "use --text-precision bf16",
        ) from None
    return bitsandbytes


@contextlib.contextmanager
def _no_download() -> Iterator[None]:
    """Hide the package `kernels` from bitsandbytes while it is imported, and silence its log.

    On some CPUs it would use that package to download a 4-bit kernel from the hub and run it, or
    log a complaint that the package is missing.
    """
    before = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # importing it fails
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before
