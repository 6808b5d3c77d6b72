"""Which way a kernel runs: as its Triton program, or as the torch lines that define it."""

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)  # Ampere: Triton makes no tensor-core code for what is older
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def uses_triton(x: Tensor) -> bool:
    """Whether kernels given `x` run in Triton. For gradients torch has to see each operation."""
    able = x.is_cuda and x.dtype in DTYPES and not x.requires_grad
    return able and fallback_reason(x.device) is None


@functools.cache
def fallback_reason(device: torch.device) -> str | None:
    """Why kernels on a device run as plain torch; None where they run in Triton."""
    if device.type != "cuda":
        return f"there is no Triton for {device.type}"
    if torch.version.hip:
        return "the kernels are not tried on AMD GPUs"
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return "this GPU is older than Ampere, the first that Triton drives well"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if sys.platform == "linux":  # elsewhere Triton brings its own compiler
        return _why_it_cannot_build()
    return None


def _why_it_cannot_build() -> str | None:
    """Triton compiles a few lines of C on its first use."""
    if not os.environ.get("CC") and not shutil.which("gcc") and not shutil.which("clang"):
        return "Triton needs a C compiler, and neither gcc nor clang is here"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Triton needs Python.h, which packages such as python3-dev have"
    return None


def chosen_path(device: str) -> tuple[str, str]:
    """("triton" or "torch", the reason), for people."""
    reason = fallback_reason(torch.device(device))
    if reason is not None:
        return "torch", reason
    return "triton", "this GPU has tensor cores that Triton drives"
