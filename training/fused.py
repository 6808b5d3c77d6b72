"""The transformer as a GPU trains it: attention and gate through Triton, there and back.

On a CPU, and where `kernels/dispatch.py` says so, these modules are the plain ones of `dit.py`.
Only what those clamp in float16 is not clamped here: it is bfloat16 or float32 that trains.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sana_cli.dit import DiT, LinearAttention, MixFFN
from sana_cli.kernels import dispatch
from sana_cli.kernels.linear_attention import TRITON_HEADS


def fuse(dit: DiT) -> DiT:
    """The same model with the same parameters under the same names, and other ways to run."""
    for block in dit.transformer_blocks:
        block.attn1.__class__ = FusedLinearAttention
        block.ff.__class__ = FusedMixFFN
    return dit


class FusedLinearAttention(LinearAttention):
    def forward(self, x: Tensor) -> Tensor:
        known = x.shape[-1] // self.heads in TRITON_HEADS
        if not (known and dispatch.uses_triton(x.detach())):
            return super().forward(x)
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        if self.qk_norm:  # under autocast in float32, unlike v
            q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
        return self.to_out[0](linear_attention(q, k, v, self.heads))


class FusedMixFFN(MixFFN):
    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if not dispatch.uses_triton(x.detach()):
            return super().forward(x, grid)
        up, depth, down = self.conv_inverted, self.conv_depth, self.conv_point
        x = F.silu(F.linear(x, up.weight.flatten(1), up.bias)).unflatten(1, grid)
        x = depthwise_glu(x, depth.weight, depth.bias)
        return F.linear(x.flatten(1, 2), down.weight.flatten(1))


def linear_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """q, k, v (B, N, heads·d) of one dtype -> (B, N, heads·d): `relu_linear_attention`."""
    return _LinearAttention.apply(q, k, v, heads)


def depthwise_glu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`kernels/depthwise_glu.py`. Under autocast x is narrow, and weight and bias stay as wide."""
    return _DepthwiseGLU.apply(x, weight, bias)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        from sana_cli.kernels import linear_attention_backward_triton as triton

        out, state = triton.linear_attention(q, k, v, heads)
        ctx.save_for_backward(q, k, v, state)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from sana_cli.kernels import linear_attention_backward_triton as triton

        return *triton.gradients(*ctx.saved_tensors, gradient), None


class _DepthwiseGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from sana_cli.kernels import depthwise_glu_triton as triton

        ctx.save_for_backward(x, weight, bias)
        return triton.depthwise_glu(x, weight, bias, rim=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        from sana_cli.kernels import depthwise_glu_backward_triton as triton

        return triton.gradients(*ctx.saved_tensors, gradient)
