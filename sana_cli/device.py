"""Facts about this machine, and the choices of device and precision that follow from them."""

import ctypes
import sys

from sana_cli.errors import UsageError


def choose_device(name: str) -> str:
    """`auto` -> "cuda", "mps" or "cpu"; UsageError for a device that is not here."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise UsageError(
            f"--device {name!r} is not a device", "use auto, cpu, cuda or mps"
        ) from None
    here = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not here.get(kind, False):
        raise UsageError(
            f"--device {name}: this machine or this build of torch has no {kind}",
            "use --device auto or --device cpu",
        )
    index = torch.device(name).index or 0
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return name


def choose_dtypes(dtype: str, device: str, trained: str | None) -> tuple[str, str, str]:
    """(text, transformer, decoder) precisions by name.

    `auto` is float32 without a GPU that has bfloat16, else the precision the transformer was
    trained in. Gemma-2 and DC-AE overflow in float16 and never run in it.
    """
    import torch

    wide = "float32"
    if device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 0):
        wide = "bfloat16"
    if dtype == "auto":
        narrow = device.startswith("cuda") and trained == "float16"
        return wide, "float16" if narrow else wide, wide
    return (wide, dtype, wide) if dtype == "float16" else (dtype, dtype, dtype)


def give_back(device: str) -> None:
    """Return freed memory to the system, which allocators otherwise keep for the next request."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; others have none
        if trim is not None:
            trim(0)


def peak_bytes(device: str) -> int:
    """The most memory held so far: allocated on a CUDA device, else resident in this process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
