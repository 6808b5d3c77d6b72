"""Matrix products in training: in bfloat16 where the machine supports it, by the fastest library.

On CPUs PyTorch computes float32 products with MKL, which on AMD CPUs runs at two fifths of the
speed of oneDNN. "Medium" precision selects oneDNN. On Intel CPUs with matrix units it also permits
bfloat16 products, which training uses there anyway; elsewhere the products stay float32.
"""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@functools.cache
def fast_dtype(device: str) -> torch.dtype:
    """Return bfloat16 on GPUs and on CPUs with instructions for it, float32 on other CPUs."""
    able = torch.cpu.get_capabilities()
    narrow = device == "cuda" or able.get("avx512_bf16") or able.get("amx_bf16")
    return torch.bfloat16 if narrow else torch.float32


def autocast(device: str) -> AbstractContextManager:
    """Compute products in `fast_dtype`; weights, sums and losses stay float32."""
    dtype = fast_dtype(device)
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


@contextlib.contextmanager
def fast_products(device: str) -> Iterator[None]:
    """Compute the remaining float32 products in TF32 on a GPU and with oneDNN on a CPU.

    On a CPU, softmax attention runs as two batched products. The flash kernel would call oneDNN for
    every tile of every head, and the calls cost more than such small products.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device == "cuda" else "medium")
    try:
        with sdpa_kernel(SDPBackend.MATH) if device == "cpu" else contextlib.nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors for reuse, for the life of this process.

    By default it returns large blocks to the system, which hands them out again page by page and
    zeroed. That takes a tenth of the time of a step.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4  # constants of malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)
