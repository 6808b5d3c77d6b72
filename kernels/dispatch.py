"""Decides whether a kernel runs in Triton or as the torch lines that define it."""

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MIN_CAPABILITY = (8, 0)  # Ampere: Triton generates no tensor-core code for older GPUs
meta_is_gpu = False  # set by `launch.meta_launches`


def uses_triton(operation: str, x: "Tensor", dtype: "torch.dtype | None" = None) -> bool:
    """Whether an operation on `x`, one of `selfcheck.OPERATIONS`, runs in Triton.

    `dtype` is that of the activations, if `x` are their values in 8 bits. Autograd needs the torch
    operations. So does a GPU on which the kernel fails its check, which this waits for.
    """
    from sana_cli.kernels import selfcheck

    if x.is_meta:
        return meta_is_gpu
    dtype = dtype or x.dtype
    supported = x.is_cuda and dtype in selfcheck.DTYPES and not x.requires_grad
    if not supported or fallback_reason(x.device) is not None:
        return False
    return selfcheck.passes(operation, x.device, dtype)


@functools.cache
def fallback_reason(device: "torch.device") -> str | None:
    """Return why kernels on a device run as plain torch, or None if they run in Triton."""
    if device.type != "cuda":
        return _no_triton_for(device.type)
    import torch

    if torch.version.hip:
        return "the kernels are untested on AMD GPUs"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return "this GPU is older than Ampere, the first generation that Triton supports well"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if sys.platform == "linux":  # elsewhere Triton brings its own compiler
        return _missing_build_tool()
    return None


def _no_triton_for(kind: str) -> str:
    return f"there is no Triton for {kind}"


def _missing_build_tool() -> str | None:
    """Return what Triton lacks to compile its launcher, a few lines of C, on first use."""
    chosen = os.environ.get("CC")
    if chosen and not shutil.which(chosen):
        return f"Triton needs a C compiler, and CC names {chosen}, which is not installed"
    if not chosen and not shutil.which("gcc") and not shutil.which("clang"):
        return "Triton needs a C compiler, and neither gcc nor clang is installed"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Triton needs Python.h, from a package such as python3-dev"
    return None


def chosen_path(device: str) -> tuple[str, str]:
    """Return ("triton" or "torch", the reason), for display; torch is imported for a GPU only."""
    kind = device.partition(":")[0]
    if kind != "cuda":
        return "torch", _no_triton_for(kind)
    import torch

    reason = fallback_reason(torch.device(device))
    if reason is not None:
        return "torch", reason
    reason = "Triton supports the tensor cores of this GPU"
    if sums_in_half(device):
        reason += ", which multiplies float16 twice as fast with sums in float16 over 64 channels"
    return "triton", reason


def sums_in_half(device: str) -> bool:
    """Whether products in float16 are summed in float16 on a device, over 64 channels."""
    if not device.startswith("cuda"):
        return False
    import torch

    if fallback_reason(torch.device(device)) is not None:
        return False
    from sana_cli.kernels.launch import halves_float32_sums

    return halves_float32_sums(torch.device(device))
