"""Choice of device and precision, and the memory of this machine."""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sana_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

M_TRIM_THRESHOLD = -1  # malloc.h
MADV_DONTNEED = 4  # sys/mman.h
LARGE_ENCODER = 250_000_000  # weights; below, importing bitsandbytes costs more than int8 saves


def choose_device(name: str) -> str:
    """Resolve `auto` to "cuda", "mps" or "cpu"; UsageError for a device that is not available."""
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
    """Return the names of the (text, transformer, decoder) precisions.

    `auto` is float32 without a GPU that has bfloat16, else the precision the transformer was
    trained in. Gemma-2 and DC-AE overflow in float16, so they never run in it.
    """
    wide = wide_dtype(device)
    if dtype == "auto":
        narrow = device.startswith("cuda") and trained == "float16"
        return wide, "float16" if narrow else wide, wide
    return (wide, dtype, wide) if dtype == "float16" else (dtype, dtype, dtype)


def wide_dtype(device: str) -> str:
    """Return the fastest precision on a device that has the range of float32."""
    import torch

    ampere = device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bfloat16" if ampere else "float32"


def choose_text_precision(
    asked: str, dtype: str, text_dtype: str, device: str, linear_weights: int
) -> str:
    """Return the precision of the text encoder: "float32", "bfloat16" or "int8".

    `asked` is --text-precision, `text_dtype` the result of `choose_dtypes`, which `auto` takes,
    unless --dtype is `auto` too, the device has fast int8, and the encoder is large: then int8
    halves its memory. UsageError if int8 is requested and cannot run.
    """
    if asked in ("bf16", "fp32"):
        return {"bf16": "bfloat16", "fp32": "float32"}[asked]
    fault = _int8_fault(device)
    if asked == "int8":
        if fault:
            raise UsageError(f"--text-precision int8: {fault}", "use --text-precision auto")
        return "int8"
    fast = device.startswith("cuda") and not fault
    return "int8" if fast and dtype == "auto" and linear_weights > LARGE_ENCODER else text_dtype


def _int8_fault(device: str) -> str | None:
    """Return why bitsandbytes' LLM.int8 cannot run on a device, or None."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    if device.startswith("cuda"):
        import torch

        if torch.cuda.get_device_capability(device) < (7, 5):
            return "this GPU is older than Turing, the first with int8 products"
    elif device != "cpu":
        return f"it runs on cuda and cpu, not on {device}"
    return None


def full_name(device: str) -> str:
    """Return a device's full name, equal for devices that round alike."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return device


def return_freed_blocks() -> None:
    """Make glibc return large blocks to the system as soon as they are freed.

    By default glibc raises its threshold for this to the size of the largest block freed so far.
    Fresh blocks cost half a millisecond per megabyte to map page by page, and a fifth of that in
    huge pages, which PyTorch requests if this is set before its first tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # of glibc; others have none
        mallopt(M_TRIM_THRESHOLD, 128 << 10)


def release_unused_memory(device: str) -> None:
    """Return freed memory to the system, which allocators otherwise keep for reuse."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; others have none
        if trim is not None:
            trim(0)


def drop_pages(tensor: "Tensor") -> None:
    """Drop the resident pages of a tensor in a mapped file; the next access reads them again.

    Any other tensor loses its values.
    """
    advise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if advise is not None and tensor.device.type == "cpu":
        size = os.sysconf("SC_PAGE_SIZE")
        first = (
            -(-tensor.data_ptr() // size) * size
        )  # whole pages only: the rest may belong to another tensor
        last = (tensor.data_ptr() + tensor.nbytes) // size * size
        if first < last:
            advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_DONTNEED)


def is_out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The messages of the CPU allocator.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def resident_bytes() -> int:
    """Return the resident bytes of this process, or its peak where only that is available."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:  # not Linux
        return peak_bytes("cpu")
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(device: str) -> int:
    """Return the peak memory so far: allocated on a CUDA device, else resident in this process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
