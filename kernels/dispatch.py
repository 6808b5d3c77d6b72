"""Which way a kernel runs: as its Triton program, or as the torch lines that define it."""

import functools
import importlib.util

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)  # Ampere: Triton makes no tensor-core code for what is older


def uses_triton(x: Tensor) -> bool:
    """Whether kernels given `x` run in Triton."""
    return x.is_cuda and why_torch(x.device) is None


@functools.cache
def why_torch(device: torch.device) -> str | None:
    """Why kernels on a device run as plain torch; None where they run in Triton."""
    if device.type != "cuda":
        return f"there is no Triton for {device.type}"
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return "this GPU is older than Ampere, the first that Triton drives well"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None
