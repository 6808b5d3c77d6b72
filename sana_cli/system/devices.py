"""Choice of device and precision, and the memory of this machine."""

import ctypes
import functools
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from sana_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
REUSED_BYTES = 32 << 20  # the most that glibc accepts as M_MMAP_THRESHOLD
MADV_DONTNEED = 4  # sys/mman.h
# Parts of messages. In order: CUDA's runtime, Triton and MPS; CUDA's driver; cuBLAS, older cuDNN;
# newer cuDNN; a convolution none of whose algorithms finds memory to work in; the CPU allocator on
# Linux and macOS, and on Windows; C++; one buffer beyond what Metal has in all.
OUT_OF_MEMORY = (
    *("out of memory", "out_of_memory", "_alloc_failed", "_allocation_failed"),
    "unable to find an engine",
    *("can't allocate memory", "not enough memory", "bad_alloc", "invalid buffer size"),
)
ENCODER_SHARE = 0.5  # of a GPU's memory; the rest is for other programs and other networks
LARGE_ENCODER = 250_000_000  # weights; below, importing bitsandbytes costs more than int8 saves


def choose_device(name: str) -> str:
    """Resolve `auto` to "cuda", "mps" or "cpu"; UsageError for a device that is not available.

    torch, whose import takes a second, is not asked where the answer can only be the CPU.
    """
    if name == "cpu" or (name == "auto" and not _may_have_gpu()):
        return "cpu"
    check_device_name(name)
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind = torch.device(name).type
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


def check_device_name(name: str) -> None:
    """UsageError for what is no device of any machine."""
    if not re.fullmatch("auto|(cpu|cuda|mps)(:(0|[1-9][0-9]?))?", name):
        raise UsageError(f"--device {name!r} is not a device", "use auto, cpu, cuda or mps")


@functools.cache
def torch_version() -> ModuleType:
    """Return the module `torch.version`: the version and build of torch, without importing torch.

    ImportError if torch is not installed.
    """
    spec = importlib.util.find_spec("torch")
    if "torch" not in sys.modules and spec is not None and spec.origin is not None:
        file = Path(spec.origin).with_name("version.py")
        if file.is_file():
            own = importlib.util.spec_from_file_location("torch.version", file)
            assert own is not None and own.loader is not None
            module = importlib.util.module_from_spec(own)
            own.loader.exec_module(module)
            return module
    import torch

    return torch.version


def _may_have_gpu() -> bool:
    """Return whether torch may find a GPU; False only where it certainly finds none."""
    if "torch" in sys.modules or sys.platform == "darwin":
        return True
    version = torch_version()
    if version.cuda is None:
        return version.hip is not None
    try:  # what CUDA's runtime loads first
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


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
    if not device.startswith("cuda"):
        return "float32"
    import torch

    return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"


def choose_text_precision(
    asked: str,
    dtype: str,
    text_dtype: str,
    device: str,
    linear_weights: int,
    memory: int | None = None,
) -> tuple[str, str | None]:
    """Return the precision of the text encoder, "float32", "bfloat16" or "int8", and a warning.

    `asked` is --text-precision, `text_dtype` the result of `choose_dtypes`, which `auto` takes,
    unless --dtype is `auto` too and the encoder would fill a GPU: then int8 halves its memory.
    `memory` is the user's limit in bytes; without one it is the memory of the whole GPU, since an
    image must not depend on what other programs take of it. The warning says why int8, which the
    memory asks for, cannot run. UsageError if int8 is requested and cannot run.
    """
    if asked in ("bf16", "fp32"):
        return {"bf16": "bfloat16", "fp32": "float32"}[asked], None
    if asked == "int8":
        if fault := int8_fault(device):
            raise UsageError(f"--text-precision int8: {fault}", "use --text-precision auto")
        return "int8", None
    if dtype != "auto" or not device.startswith("cuda") or linear_weights <= LARGE_ENCODER:
        return text_dtype, None
    import torch

    size = linear_weights * getattr(torch, text_dtype).itemsize
    if memory is None:
        memory = torch.cuda.get_device_properties(device).total_memory
    if size <= ENCODER_SHARE * memory:
        return text_dtype, None
    if fault := int8_fault(device):
        gb = size / 1e9
        return text_dtype, f"the text encoder takes {gb:.1f} GB, as it cannot run in int8: {fault}"
    return "int8", None


def int8_fault(device: str) -> str | None:
    """Return why bitsandbytes' LLM.int8 cannot run on a device, or None."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    if device.startswith("cuda"):
        import torch

        if torch.cuda.get_device_capability(device) < (7, 5):
            return "this GPU is older than Turing, the first with int8 products"
        return _cuda_part_fault()
    elif device != "cpu":
        return f"it runs on cuda and cpu, not on {device}"
    return None


def _cuda_part_fault() -> str | None:
    """Return why the compiled part of bitsandbytes does not load, or None.

    Only that part is loaded, as importing the library takes seconds. It chooses among its builds
    for torch's major version of CUDA.
    """
    import torch

    spec = importlib.util.find_spec("bitsandbytes")
    assert spec is not None
    folders = spec.submodule_search_locations or []
    pattern = f"libbitsandbytes_cuda{str(torch.version.cuda).partition('.')[0]}*"
    libraries = sorted(library for folder in folders for library in Path(folder).glob(pattern))
    if not libraries:
        return f"bitsandbytes has no library for CUDA {torch.version.cuda}"
    try:
        ctypes.CDLL(str(libraries[-1]))
    except OSError as error:
        return f"bitsandbytes' library for CUDA cannot be loaded: {error}"
    return None


def full_name(device: str) -> str:
    """Return a device's full name, equal for devices that round alike."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return device


def reuse_freed_blocks() -> None:
    """Make glibc keep freed blocks of up to 32 MB for reuse, and return larger ones to the system.

    Fresh blocks cost half a millisecond per megabyte to map page by page, and a fifth of that in
    huge pages, which PyTorch requests if this is set before its first tensor. By default glibc
    reuses a block only once one of its size has been freed, and then keeps up to twice as much.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # of glibc; others have none
        mallopt(M_MMAP_THRESHOLD, REUSED_BYTES)
        mallopt(M_TRIM_THRESHOLD, REUSED_BYTES)


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


def cap_memory(device: str, budget: int, held: int) -> None:
    """Let torch hold at most `budget` bytes on a CUDA device, and fail beyond.

    Without a cap, the driver of Windows and of WSL moves what does not fit into RAM, where it is
    a hundred times slower. `held` bytes of `budget` are allocated now; any others in this process
    are somebody else's, and come on top.
    """
    if not device.startswith("cuda"):
        return
    import torch

    index = torch.device(device).index
    index = torch.cuda.current_device() if index is None else index
    others = max(0, torch.cuda.memory_allocated(index) - held)
    share = (budget + others) / torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), index)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library that runs on a device says that memory is exhausted."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in OUT_OF_MEMORY)


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
