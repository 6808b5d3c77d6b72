"""The transformer for training: the modules of `dit.py` with faster forward and backward passes.

On a GPU, linear attention and the gated convolution run in Triton in both directions. On a CPU,
where memory bandwidth limits a step, linear maps of one input are one product, heads are laid out
once, and the gradients of value and gate need no concatenation: in float32 a step takes five
sixths of the time. The float16 clamps of `dit.py` are left out, since training uses bfloat16 and
float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sana_cli.kernels import dispatch
from sana_cli.kernels.linear_attention import EPS, TRITON_HEADS
from sana_cli.models.dit import CrossAttention, DiT, LinearAttention, MixFFN


def fuse(dit: DiT) -> DiT:
    """Exchange the classes of a model's modules in place; its parameters and their names stay."""
    for block in dit.transformer_blocks:
        block.attn1.__class__ = FusedLinearAttention
        block.attn2.__class__ = FusedCrossAttention
        block.ff.__class__ = FusedMixFFN
    return dit


class FusedLinearAttention(LinearAttention):
    def forward(self, x: Tensor) -> Tensor:
        fits = x.shape[-1] // self.heads in TRITON_HEADS
        if fits and dispatch.uses_triton("attend_tokens", x.detach()):
            q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
            if self.qk_norm:  # float32 under autocast, unlike v
                q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
            return self.to_out[0](linear_attention(q, k, v, self.heads))
        if self.qk_norm:
            return super().forward(x)
        q, k, v = split_heads(joint_linear(x, self.to_q, self.to_k, self.to_v), 3, self.heads)
        q, k = F.relu(q), F.relu(k)
        total = k.sum(-2, dtype=k.dtype)[..., None]
        out = q @ (k.mT @ v) / (q @ total + EPS)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class FusedCrossAttention(CrossAttention):
    def forward(self, x: Tensor, caption: Tensor, bias: Tensor | None) -> Tensor:
        if x.is_cuda or self.qk_norm or bias is None:
            return super().forward(x, caption, bias)
        (q,) = split_heads(self.to_q(x), 1, self.heads)
        k, v = split_heads(joint_linear(caption, self.to_k, self.to_v), 2, self.heads)
        weights = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1).to(v.dtype)
        return self.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


class FusedMixFFN(MixFFN):
    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if not dispatch.uses_triton("depthwise_glu", x.detach()):
            y = self.conv_depth(F.silu(self.conv_inverted(x.unflatten(1, grid).movedim(-1, 1))))
            return self.conv_point(_Gate.apply(y)).movedim(1, -1).flatten(1, 2)
        up, depth, down = self.conv_inverted, self.conv_depth, self.conv_point
        x = F.silu(F.linear(x, up.weight.flatten(1), up.bias)).unflatten(1, grid)
        x = depthwise_glu(x, depth.weight, depth.bias)
        return F.linear(x.flatten(1, 2), down.weight.flatten(1))


def joint_linear(x: Tensor, *maps: nn.Linear) -> Tensor:
    """Apply several linear maps to x as one product; the results are concatenated."""
    biases = [m.bias for m in maps if m.bias is not None]
    return F.linear(x, torch.cat([m.weight for m in maps]), torch.cat(biases) if biases else None)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Split (B, N, parts·heads·d) into parts of (B, heads, N, d)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).contiguous().unbind()


def linear_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Compute `relu_linear_attention` of q, k, v (B, N, heads·d), all of one dtype, in Triton."""
    return _LinearAttention.apply(q, k, v, heads)


def depthwise_glu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `kernels/depthwise_glu.py` in Triton. x may be narrower than weight and bias."""
    return _DepthwiseGLU.apply(x, weight, bias)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        from training import linear_attention_backward_triton as triton

        out, state = triton.linear_attention(q, k, v, heads)
        ctx.save_for_backward(q, k, v, state)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from training import linear_attention_backward_triton as triton

        return *triton.gradients(*ctx.saved_tensors, gradient), None


class _DepthwiseGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from sana_cli.kernels import depthwise_glu_triton as triton

        ctx.save_for_backward(x, weight, bias)
        return triton.depthwise_glu(x, weight, bias, halo=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        from training import depthwise_glu_backward_triton as triton

        return triton.gradients(*ctx.saved_tensors, gradient)


class _Gate(torch.autograd.Function):
    """value·silu(gate) for y (B, 2E, h, w), whose first half is the value."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        value, gate = y.chunk(2, dim=1)
        silu = F.silu(gate)
        ctx.save_for_backward(y, silu)
        return value * silu

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        y, silu = ctx.saved_tensors
        value, gate = y.chunk(2, dim=1)
        of_y = torch.empty_like(y)
        of_value, of_gate = of_y.chunk(2, dim=1)
        torch.mul(gradient, silu, out=of_value)
        torch.ops.aten.silu_backward.grad_input(gradient * value, gate, grad_input=of_gate)
        return of_y
