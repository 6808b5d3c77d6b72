"""What a training step does between its matrix products, fused, on a CPU: cpu_kernels.cpp.

Matrix units multiply so fast that a step waits for everything else, pass by pass over activations
that the cache does not hold. Here each activation is read once and written once.

Called through its plain C functions: it then compiles in seconds, anew in every process, and
needs no headers of torch. It shares torch's OpenMP threads: others would fight with them.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from training.arithmetic import fast_dtype

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC")


def why_not() -> str | None:
    """Why a CPU trains by plain torch; None where it does by these kernels."""
    return _built()[1]


@functools.cache
def _built() -> tuple[ctypes.CDLL | None, str | None]:
    if sys.platform != "linux":
        return None, "they are built on Linux only"
    if not torch.cpu.get_capabilities().get("avx512_bf16") or fast_dtype("cpu") != torch.bfloat16:
        return None, "this CPU has no AVX-512 for bfloat16"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None, "there is no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        made, library = f"{folder}/kernels.o", f"{folder}/kernels.so"
        source = str(Path(__file__).with_suffix(".cpp"))
        try:
            subprocess.run(
                [compiler, *FLAGS, "-c", source, "-o", made], check=True, capture_output=True
            )
            # Without its own OpenMP: what it calls of that it finds in torch.
            subprocess.run(
                [compiler, "-shared", made, "-o", library], check=True, capture_output=True
            )
            return ctypes.CDLL(library), None
        except (OSError, subprocess.CalledProcessError) as error:
            told = getattr(error, "stderr", b"").decode(errors="replace").strip() or str(error)
            return None, f"{compiler} cannot build them: {told.splitlines()[0]}"


def _call(name: str, *values: Tensor | int | float | None) -> None:
    """Tensors go as pointers, and the number of threads goes last."""
    library, reason = _built()
    if library is None:
        raise RuntimeError(reason)
    given: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            given.append(ctypes.c_void_p(value.data_ptr()))
        elif isinstance(value, float):
            given.append(ctypes.c_float(value))
        else:
            given.append(ctypes.c_void_p() if value is None else ctypes.c_int64(value))
    getattr(library, name)(*given, ctypes.c_int(torch.get_num_threads()))


def mapped(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in bfloat16, of parameters in float32."""
    return _Mapped.apply(x, weight, bias)


def gated_depthwise(
    h: Tensor, up: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int]
) -> Tensor:
    """h bfloat16 (B, N, 2E), that lacks its bias `up`; weight (2E, 1, 3, 3) -> (B, N, E).

    silu(h + up), the convolution, and value·silu(gate) of its halves.
    """
    return _GatedDepthwise.apply(h, up, weight, bias, grid)


def linear_attention(qkv: Tensor, heads: int) -> Tensor:
    """bfloat16 (B, N, 3D) -> (B, N, D): `relu_linear_attention`."""
    return _LinearAttention.apply(qkv, heads)


def cross_attention(q: Tensor, kv: Tensor, mask: Tensor, heads: int) -> Tensor:
    """bfloat16 q (B, N, D), kv (B, L, 2D), mask (B, L), True at what is attended to."""
    return _CrossAttention.apply(q, kv, mask, heads)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x float32 (B, N, D), shift and scale float32 (B, D) -> `dit.modulate` in bfloat16."""
    return _Stream.apply(x, None, None, None, shift, scale, eps)


def joined(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """x + gate·(y + bias) in float32, and what the next branch takes of it in bfloat16: all of it
    modulated, or as it is."""
    return _Stream.apply(x, y, bias, gate, shift, scale, eps)


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """bfloat16 (B, C, H, W), channels last: `dc_ae.ChannelRMSNorm`."""
    return _ChannelNorm.apply(x, weight, bias, eps)


class _Mapped(torch.autograd.Function):
    """The gradient of a weight is that of a 1x1 convolution: for a plain product of so many tokens
    oneDNN takes twice as long, as it first turns one side around."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        narrow = weight.to(x.dtype)
        ctx.save_for_backward(x, narrow)
        ctx.biased = bias is not None
        return F.linear(x, narrow, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        given, image = (t.unsqueeze(2).movedim(-1, 1) for t in (gradient.contiguous(), x))
        _, of_weight, _ = torch.ops.aten.convolution_backward(
            *(given, image, weight[..., None, None], None),
            *([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]),
        )
        of_bias = gradient.sum((0, 1), dtype=torch.float32) if ctx.biased else None
        return gradient @ weight, of_weight.flatten(1).float(), of_bias


class _GatedDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, up: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        taps = weight.flatten(1).t().contiguous()
        ctx.save_for_backward(h, up, taps, bias)
        ctx.grid = grid
        out = h.new_empty(*h.shape[:2], h.shape[2] // 2)
        _call("gated_forward", h, up, taps, bias, out, len(h), *grid, out.shape[2])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        h, *parameters = ctx.saved_tensors
        dh = torch.empty_like(h)
        sums = parameters[0].new_zeros(torch.get_num_threads(), 11, h.shape[2])
        sizes = (len(h), *ctx.grid, h.shape[2] // 2)
        _call("gated_backward", h, *parameters, gradient.contiguous(), dh, sums, *sizes)
        *taps, bias, up = sums.sum(0).unbind()
        return dh, up, torch.stack(taps, dim=1).view(-1, 1, 3, 3), bias, None


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(qkv)
        (batch, tokens, width), ctx.heads = qkv.shape, heads
        out = qkv.new_empty(batch, tokens, width // 3)
        sizes = batch, tokens, heads, width // 3 // heads
        _call("linear_attention", qkv, out, None, None, *sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (qkv,) = ctx.saved_tensors
        batch, tokens, width = gradient.shape
        made, sizes = torch.empty_like(qkv), (batch, tokens, ctx.heads, width // ctx.heads)
        _call("linear_attention", qkv, None, gradient.contiguous(), made, *sizes)
        return made, None


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, mask: Tensor, heads: int) -> Tensor:
        mask, out = mask.contiguous(), torch.empty_like(q)
        ctx.save_for_backward(q, kv, mask)
        ctx.sizes = *q.shape[:2], kv.shape[1], heads, q.shape[2] // heads
        _call("cross_attention", q, kv, mask, out, None, None, None, *ctx.sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, mask = ctx.saved_tensors
        dq, dkv = torch.empty_like(q), torch.zeros_like(kv)
        _call("cross_attention", q, kv, mask, None, gradient.contiguous(), dq, dkv, *ctx.sizes)
        return dq, dkv, None, None


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        bias: Tensor | None,
        gate: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
        eps: float,
    ) -> Any:
        total = x if y is None else torch.empty_like(x)
        out = torch.empty_like(x, dtype=torch.bfloat16)
        rows = (gate, _row(gate), shift, scale, _row(scale), eps)
        _call("stream_forward", x, y, bias, *rows, total, out, *x.shape)
        ctx.save_for_backward(total, y, bias, gate, scale)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return out if y is None else (total, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        total, y, bias, gate, scale = ctx.saved_tensors
        of_total = gradients[0] if y is not None else None
        of_out = gradients[-1]
        of_total = None if of_total is None else of_total.contiguous()
        if of_out is None:
            of_out = torch.zeros_like(total, dtype=torch.bfloat16)
        dx, dy = torch.empty_like(total), None if y is None else torch.empty_like(y)
        sums = total.new_zeros(len(total), 4, total.shape[2])
        given = (total, y, bias, gate, _row(gate), scale, _row(scale), ctx.eps)
        made = (of_total, of_out.contiguous(), dx, dy, sums)
        _call("stream_backward", *given, *made, *total.shape)
        of_gate, of_bias, of_shift, of_scale = sums.unbind(1)
        return (
            dx,
            dy,
            None if bias is None else of_bias.sum(0),
            None if gate is None else of_gate,
            *((None, None) if scale is None else (of_shift, of_scale)),
            None,
        )


class _ChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.sizes = eps, (x.numel() // x.shape[1], x.shape[1])
        out = torch.empty_like(x)
        _call("channel_norm", x, weight, bias, eps, None, out, None, *ctx.sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        sums = weight.new_zeros(torch.get_num_threads(), 2, x.shape[1])
        _call("channel_norm", x, weight, None, ctx.eps, gradient, dx, sums, *ctx.sizes)
        return dx, *sums.sum(0).unbind(), None


def _row(x: Tensor | None) -> int:
    """How far apart the rows of two pictures lie: the six of a block lie side by side."""
    return 0 if x is None else x.stride(0)
