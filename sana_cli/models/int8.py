"""Gemma's layers in 8 bits: LLM.int8 (arXiv 2208.07339) with the operators of bitsandbytes.

bitsandbytes is imported when a layer first runs or is quantised: that import takes two seconds.
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
    """y = x Wᵀ, both in int8 with a scale a row; input columns with an outlier in x's own dtype.

    weight: int8 (out, in). SCB, as bitsandbytes calls it: float32 (out,), the largest magnitude
    of each row, which 127 stands for.
    """

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("SCB", scale)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out) of the same dtype, bfloat16 or float32.

        The operator reads float16. That is safe for values of any size: those beyond its range
        become infinite there, count as outliers, and are then taken from `x` itself; and what
        remains is below 6, so its products stay far inside the range.
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
    """Quantise every linear map of `model`: int8 weights and float32 scales, by name."""
    tensors: dict[str, Tensor] = {}
    for name, linear in _linears(model).items():
        # On the CPU and from float32 wherever it will run, so that one file serves all.
        wide = linear.weight.float().contiguous()
        quantised, scale, _ = bitsandbytes().functional.int8_vectorwise_quant(wide)
        tensors |= {f"{name}.weight": quantised, f"{name}.SCB": scale}
    return tensors


def is_quantised_from(model: nn.Module, tensors: dict[str, Tensor]) -> bool:
    """Whether tensors have the names, dtypes and shapes that `quantise` gives them."""
    wanted: dict[str, tuple[torch.dtype, torch.Size]] = {}
    for name, linear in _linears(model).items():
        wanted[f"{name}.weight"] = torch.int8, linear.weight.shape
        wanted[f"{name}.SCB"] = torch.float32, linear.weight.shape[:1]
    return {name: (t.dtype, t.shape) for name, t in tensors.items()} == wanted


def install(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Replace every linear map of `model` by the 8-bit one that `quantise` made of it.

    The weights that are then not read may lie in mapped files, and are left there.
    """
    for name in _linears(model):
        parent, _, child = name.rpartition(".")
        fast = Int8Linear(tensors[f"{name}.weight"], tensors[f"{name}.SCB"])
        setattr(model.get_submodule(parent), child, fast)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


@functools.cache
def bitsandbytes() -> ModuleType:
    """The library; SanaError where it cannot be loaded, or not for this version of CUDA."""
    try:
        with _no_download():
            import bitsandbytes
            import bitsandbytes.cextension
            import bitsandbytes.functional
        stand_in = isinstance(
            bitsandbytes.cextension.lib, bitsandbytes.cextension.ErrorHandlerMockBNBNativeLibrary
        )
        if stand_in and torch.cuda.is_available():
            raise ImportError(f"it has no library for CUDA {torch.version.cuda}")
    except Exception as error:  # anything: it loads whatever CUDA is installed
        reason = str(error).partition("\n")[0]
        raise SanaError(
            f"bitsandbytes, which int8 needs, cannot be loaded: {reason}",
            "use --text-precision bf16",
        ) from None
    return bitsandbytes


@contextlib.contextmanager
def _no_download() -> Iterator[None]:
    """On some CPUs its import fetches and runs a 4-bit kernel from the hub, where the package
    `kernels` is installed, and complains where it is not. Neither is wanted here."""
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
