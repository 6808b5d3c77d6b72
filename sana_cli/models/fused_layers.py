"""The layers of the fused transformer and of its ControlNet: embedding and block.

Shapes as in `dit.py`: D width, h w the latent grid, N = h·w tokens. A *stream* is one evaluation
of the network on the same latents: unconditional and conditional are two.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sana_cli.kernels.convolution import lay_out_by_taps
from sana_cli.kernels.depthwise_glu import depthwise_glu, depthwise_glu8
from sana_cli.kernels.linear import is_packed, linear, pack, unpack
from sana_cli.kernels.linear_attention import attend_tokens, attend_tokens8, project_qkv
from sana_cli.kernels.modulation import modulate, modulate8
from sana_cli.kernels.projection import gated_residual_linear_, linear_silu
from sana_cli.kernels.rows8 import Rows8, Weight8, dequantise_weight
from sana_cli.models.cross_attention import TextAttention, TextContext
from sana_cli.models.dit import Block, PatchEmbed, position_axes
from sana_cli.system.devices import REUSED_BYTES, drop_pages

PROJECTIONS = ("qkv", "out", "up", "down")  # of a block, which may run in 8 bits


class FusedPatchEmbed(nn.Module):
    """A `PatchEmbed` that keeps the positions of the last grid on the device."""

    def __init__(self, plain: PatchEmbed) -> None:
        super().__init__()
        self.weight = frozen(plain.proj.weight.flatten(1))
        self.bias = cast(nn.Parameter, plain.proj.bias)
        self.base, self.interpolation = plain.base, plain.interpolation
        self._positions: tuple[object, tuple[Tensor, Tensor]] | None = None

    def forward(self, latents: Tensor) -> Tensor:
        """(1, 32, h, w) -> tokens (1, N, D), with positions if the model has them."""
        x = linear(latents.movedim(1, -1), self.weight, self.bias)
        if self.interpolation is not None:
            # Half of the table depends on the column only, the other half on the row only.
            half = len(self.weight) // 2
            rows, columns = self.positions((x.shape[1], x.shape[2]), x.device, self.interpolation)
            x[..., :half] += columns
            x[..., half:] += rows[:, None]
        return x.flatten(1, 2)

    def positions(
        self, grid: tuple[int, int], device: torch.device, interpolation: float
    ) -> tuple[Tensor, Tensor]:
        """The axes of the position table, cached: a CUDA graph must find them on the device."""
        if self._positions is None or self._positions[0] != (grid, device):
            axes = position_axes(grid, len(self.weight), self.base, interpolation)
            rows, columns = (axis.to(device) for axis in axes)
            self._positions = ((grid, device), (rows, columns))
        return self._positions[1]


class FusedBlock(nn.Module):
    """A `Block` with merged projections, which overwrites its input with its result."""

    def __init__(self, plain: Block) -> None:
        super().__init__()
        attention, ff = plain.attn1, plain.ff
        self.eps, self.heads = plain.eps, attention.heads
        q, k, v = attention.to_q.weight, attention.to_k.weight, attention.to_v.weight
        self.norm_k: nn.Parameter | None = None
        self.norm_eps = 0.0
        if attention.qk_norm:
            # The scale of a query cancels in linear attention; only the weight of its norm stays.
            q = (attention.norm_q.weight.float()[:, None] * q.float()).to(q.dtype)
            self.norm_k, self.norm_eps = frozen(attention.norm_k.weight), attention.norm_k.eps
        self.qkv = frozen(torch.cat([q, k, v]))
        out = cast(nn.Linear, attention.to_out[0])
        self.out, self.out_bias = frozen(out.weight), out.bias
        self.text_attention = TextAttention(plain.attn2)
        self.up = frozen(ff.conv_inverted.weight.flatten(1))
        self.up_bias = cast(nn.Parameter, ff.conv_inverted.bias)
        self.depth = frozen(lay_out_by_taps(ff.conv_depth.weight))
        self.depth_bias = cast(nn.Parameter, ff.conv_depth.bias)
        self.down = frozen(ff.conv_point.weight.flatten(1))
        self.has_8_bits = False
        self._packed_to_v: Tensor | None = None  # made for the first perturbed stream

    def use_8_bits(self, weights: Mapping[str, Weight8]) -> None:
        """Replace the weights of all PROJECTIONS."""
        for name in PROJECTIONS:
            delattr(self, name)
            self.register_buffer(name, weights[name].values)
            self.register_buffer(f"{name}_scales", weights[name].scales)
        self.has_8_bits = True

    def pack(self, mapped: bool) -> None:
        """Lay out the weights as oneDNN reads them, and pack all PROJECTIONS: float32 on the CPU.

        `mapped`: they are in a mapped file or nobody else's, and leave memory one by one.
        """
        for name in PROJECTIONS:
            before = self.projection(name)
            setattr(self, name, frozen(pack(before)))
            if mapped:
                drop_pages(before)
        self.depth = frozen(self.depth.contiguous())

    def projection(self, name: str) -> Tensor:
        """Return the weight of one of PROJECTIONS, which is not in 8 bits."""
        assert not self.has_8_bits, "the weights are quantised"
        return getattr(self, name)

    def _weight(self, name: str) -> Tensor | Weight8:
        weight = getattr(self, name)
        return Weight8(weight, getattr(self, f"{name}_scales")) if self.has_8_bits else weight

    def forward(
        self,
        x: Tensor,
        modulation: Sequence[Tensor],
        texts: Sequence[TextContext],
        grid: tuple[int, int],
        row_chunk: int | None,
        perturbed: bool = False,
    ) -> Tensor:
        """Tokens x (streams, N, D) -> (streams, N, D), one stream for each text.

        In the first block x may have a single stream: before any cross-attention all streams are
        equal, so that block's self-attention is computed once for all of them.

        With `perturbed` the self-attention of the last stream is the identity (perturbed-attention
        guidance, arXiv 2403.17377): only its value and output projections are applied. If x lacks
        that stream, it starts here as a copy of the last one.
        """
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation
        tokens = row_chunk * grid[1] if row_chunk else None
        attention = shift_attn, scale_attn, gate_attn, tokens
        if perturbed:
            x = self._attend_perturbed(x, len(texts), *attention)
        else:
            x = self._attend(x, *attention)
            if len(x) < len(texts):
                x = x.repeat(len(texts), 1, 1)
        for stream, text in zip(x.split(1), texts, strict=True):
            for chunk in stream.split(tokens or stream.shape[1], 1):
                self.text_attention(chunk, text)
        if tokens is None:
            hidden_bytes = x.shape[0] * x.shape[1] * len(self.up_bias) * x.itemsize
            # Activations whose memory is mapped anew in every block would cost more than the sums.
            apart = x.is_cpu and hidden_bytes > REUSED_BYTES
            for part in x.split(1) if apart else (x,):
                y = self._gated_conv(self._modulate(part, shift_ff, scale_ff), grid)
                gated_residual_linear_(part, y, self._weight("down"), None, gate_ff)
            return x
        for stream in x.split(1):
            above = stream[:, :0]  # a copy of the row above the chunk, before it was overwritten
            for i, chunk in enumerate(stream.split(tokens, 1)):
                end = i * tokens + chunk.shape[1]
                padded = torch.cat([above, chunk, stream[:, end : end + grid[1]]], dim=1)
                window = padded.shape[1] // grid[1], grid[1]
                y = self._gated_conv(self._modulate(padded, shift_ff, scale_ff), window)
                first, last = above.shape[1], above.shape[1] + chunk.shape[1]
                y = y.between(first, last) if isinstance(y, Rows8) else y[:, first:last]
                above = chunk[:, -grid[1] :].clone()
                gated_residual_linear_(chunk, y, self._weight("down"), None, gate_ff)
        return x

    def _modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor | Rows8:
        return (modulate8 if self.has_8_bits else modulate)(x, shift, scale, self.eps)

    def _gated_conv(self, tokens: Tensor | Rows8, grid: tuple[int, int]) -> Tensor | Rows8:
        """The Mix-FFN up to its last projection: (B, N, D) -> (B, N, 2.5·D)."""
        hidden = [linear_silu(tokens, self._weight("up"), self.up_bias).unflatten(1, grid)]
        del tokens  # frees memory if the caller holds no other reference, as here for `hidden`
        if self.has_8_bits:
            return depthwise_glu8(hidden.pop(), self.depth, self.depth_bias)
        return depthwise_glu(hidden.pop(), self.depth, self.depth_bias).flatten(1, 2)

    def _attend(
        self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, tokens: int | None
    ) -> Tensor:
        """Linear self-attention. In chunks of `tokens`, keys and values are summed up first."""
        out, bias = self._weight("out"), self.out_bias
        apply = attend_tokens8 if self.has_8_bits else attend_tokens
        if tokens is None:
            y = apply(*self._project(self._modulate(x, shift, scale)))
            return gated_residual_linear_(x, y, out, bias, gate)
        for stream in x.split(1):
            chunks = stream.split(tokens, 1)
            queries, state = [], None
            for chunk in chunks:
                q, sums = self._project(self._modulate(chunk, shift, scale))
                queries.append(q.clone())  # q may be a view that keeps a larger tensor alive
                state = sums if state is None else state + sums
            assert state is not None  # a grid has at least one row
            for chunk, q in zip(chunks, queries, strict=True):
                gated_residual_linear_(chunk, apply(q, state), out, bias, gate)
        return x

    def _attend_perturbed(
        self,
        x: Tensor,
        streams: int,
        shift: Tensor,
        scale: Tensor,
        gate: Tensor,
        tokens: int | None,
    ) -> Tensor:
        """Self-attention in all streams but the last -> (streams, N, D).

        The last one reads weights of 8 bits as well, but its activations stay as they are.
        """
        started = len(x) == streams
        intact, perturbed = (x[:-1], x[-1:]) if started else (x, x[-1:].clone())
        width = x.shape[-1]
        to_v, out = self._to_v(width, x.dtype), self._weight("out")
        if isinstance(out, Weight8):
            out = dequantise_weight(out, width, x.dtype)
        for chunk in perturbed.split(tokens or x.shape[1], 1):
            v = linear(modulate(chunk, shift, scale, self.eps), to_v)
            gated_residual_linear_(chunk, v, out, self.out_bias, gate)
        intact = self._attend(intact, shift, scale, gate, tokens)
        return x if started else torch.cat([intact.expand(streams - 1, -1, -1), perturbed])

    def _to_v(self, width: int, dtype: torch.dtype) -> Tensor:
        """The last rows of the weight qkv: (D, D), packed where qkv is.

        Packed weights cannot be sliced. What is unpacked once for it is kept, of one block of a
        network as a rule.
        """
        qkv = self._weight("qkv")
        if isinstance(qkv, Weight8):
            qkv = dequantise_weight(qkv, width, dtype)
        if not is_packed(qkv):
            return qkv[2 * width :]
        if self._packed_to_v is None:
            self._packed_to_v = pack(unpack(qkv)[2 * width :])
        return self._packed_to_v

    def _project(self, tokens: Tensor | Rows8) -> tuple[Tensor, Tensor]:
        qkv = self._weight("qkv")
        return project_qkv(tokens, qkv, self.heads, self.norm_k, self.norm_eps)


def frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
