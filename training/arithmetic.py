"""How products are taken in training: in bfloat16 where a machine has it, by the fastest library.

PyTorch gives a CPU's float32 products to MKL, which on AMD's CPUs runs at two fifths of the speed
of oneDNN. "Medium" precision names oneDNN. On Intel CPUs with matrix units it also allows it to
multiply in bfloat16, as training does there anyway; on all others the products stay float32.
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
    """bfloat16 on a GPU and on CPUs with instructions for it; float32 on other CPUs."""
    able = torch.cpu.get_capabilities()
    narrow = device == "cuda" or able.get("avx512_bf16") or able.get("amx_bf16")
    return torch.bfloat16 if narrow else torch.float32


def autocast(device: str) -> AbstractContextManager:
    """Products inside are taken in `fast_dtype`; weights, sums and losses stay float32."""
    dtype = fast_dtype(device)
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


@contextlib.contextmanager
def fast_products(device: str) -> Iterator[None]:
    """What float32 products are left, inside: TF32 on a GPU, oneDNN on a CPU.

    On a CPU, softmax attention is two batched products. Its flash kernel would call oneDNN for
    every tile of every head, and each call costs more than so small a product.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device == "cuda" else "medium")
    try:
        with sdpa_kernel(SDPBackend.MATH) if device == "cpu" else contextlib.nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free, for the next ones, for the life of this process.

    It gives large ones back to the system, which hands them out again page by page, zeroed: a
    tenth of the time of a step.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4  # as numbered in malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)
