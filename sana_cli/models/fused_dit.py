"""The Linear DiT in the form that runs: the function of `dit.DiT` with nothing computed twice.

What depends on the text alone or on the timestep alone is computed once an image. The rest is a
sequence of the operations in `kernels/`, token-major throughout, on `row_chunk` rows of the latent
grid at a time where memory is short. The result equals that of the plain model up to rounding.

Shapes as in `dit.py`: D width, h w the latent grid, N = h·w tokens, L text tokens. A *stream* is
one evaluation of the network on the same latents: unconditional and conditional are two.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from sana_cli.kernels.depthwise_glu import depthwise_glu
from sana_cli.kernels.linear import linear
from sana_cli.kernels.linear_attention import attend_tokens, project_qkv
from sana_cli.kernels.modulation import modulate
from sana_cli.kernels.projection import gated_residual_linear_, linear_silu
from sana_cli.models.cross_attention import TextAttention, TextContext
from sana_cli.models.cuda_graph import GraphedCall
from sana_cli.models.dit import Block, DiT, DiTConfig, position_axes
from sana_cli.system.devices import is_out_of_memory
from sana_cli.system.memory import PeakMemory


class TimeModulation(NamedTuple):
    """What a timestep determines."""

    modulation: Tensor  # (6, D), shared by all blocks
    embedding: Tensor  # (D,), for the last norm


class FusedDiT(nn.Module):
    """Takes over the weights of a `DiT`, which must not be used afterwards."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.config = dit.config
        self.row_chunk: int | None = None  # rows of the latent grid to run at once; None: all
        self._axes: tuple[object, tuple[Tensor, Tensor]] | None = None
        self._graph: GraphedCall | None = None
        self._shapes: list[torch.Size] = []  # of the inputs of the last call
        self.graph_error: str | None = None  # why capturing a CUDA graph failed
        blocks = [cast(Block, block) for block in dit.transformer_blocks]
        self.patch_embed = dit.patch_embed
        self.time_embed = dit.time_embed
        self.caption_projection, self.caption_norm = dit.caption_projection, dit.caption_norm
        self.tables = _frozen(torch.stack([block.scale_shift_table for block in blocks]))
        self.last_table = _frozen(dit.scale_shift_table)
        self.proj_out = dit.proj_out
        self.blocks = nn.ModuleList()
        while blocks:  # each is freed before the next is merged
            del dit.transformer_blocks[0]
            self.blocks.append(FusedBlock(blocks.pop(0)))

    def to_device(self, device: str, row_chunk: int | None) -> None:
        """Move to a device and run on `row_chunk` rows of the latent grid at a time (None: all)."""
        if row_chunk != self.row_chunk or torch.device(device).type != self.tables.device.type:
            self._graph, self._shapes = None, []  # it reads the weights at their old addresses
        self.row_chunk = row_chunk
        self.to(device)

    def encode_text(self, text: Tensor, padded: int = 1, fold: bool = True) -> list[TextContext]:
        """Text states (1, L, caption_channels) -> a context for every layer.

        See `TextAttention.encode_text` for `padded` and `fold`.
        """
        caption = self.caption_norm(self.caption_projection(text))
        blocks = [cast(FusedBlock, block) for block in self.blocks]
        return [block.text_attention.encode_text(caption, padded, fold) for block in blocks]

    def time_modulations(
        self, timesteps: Sequence[float], guidance: Tensor | None = None
    ) -> list[TimeModulation]:
        """Embed all timesteps of a run, given in the units that the model was trained with.

        `guidance` (1,), already scaled, for Sana-Sprint only.
        """
        inputs = [torch.tensor(timesteps, device=self.tables.device)]
        if guidance is not None:
            inputs.append(guidance)
        return list(map(TimeModulation, *self.time_embed(*inputs)))

    def velocity(
        self, latents: Tensor, time: TimeModulation, texts: Sequence[list[TextContext]]
    ) -> Tensor:
        """`forward`; on CUDA through a graph from the second call with the same shapes on."""
        if not latents.is_cuda or self.row_chunk or self.graph_error:
            return self(latents, time, texts)
        contexts = chain.from_iterable(texts)
        inputs = [latents, *time, *chain.from_iterable(contexts)]
        shapes = [tensor.shape for tensor in inputs]
        if shapes != self._shapes:
            self._graph, self._shapes = None, shapes
            return self(latents, time, texts)
        if self._graph is None:
            try:
                self._graph = GraphedCall(partial(self._forward_flat, texts), inputs)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self.graph_error = str(error)
                return self(latents, time, texts)
        return self._graph(inputs).clone()

    def forward(
        self, latents: Tensor, time: TimeModulation, texts: Sequence[list[TextContext]]
    ) -> Tensor:
        """Velocities (len(texts), 32, h, w) of the same latents for each text.

        latents (1, 32, h, w) in the dtype of the weights, which the result has too.
        """
        grid = latents.shape[2], latents.shape[3]
        x = self._embed(latents)
        modulation = self.tables + time.modulation  # (layers, 6, D)
        for i, block in enumerate(self.blocks):
            x = block(x, modulation[i].unbind(), [text[i] for text in texts], grid, self.row_chunk)
        shift, scale = (self.last_table + time.embedding).unbind()
        last = self.proj_out
        chunks = x.split(self.row_chunk * grid[1] if self.row_chunk else x.shape[1], dim=1)
        tokens = (modulate(chunk, shift, scale, self.config.norm_eps) for chunk in chunks)
        x = torch.cat([linear(chunk, last.weight, last.bias) for chunk in tokens], dim=1)
        return x.transpose(1, 2).unflatten(-1, grid)

    def _forward_flat(self, like: Sequence[list[TextContext]], inputs: Sequence[Tensor]) -> Tensor:
        """`forward` with its arguments as one flat list; `like` tells the kinds of its contexts."""
        latents, modulation, embedding, *rest = inputs
        tensors = iter(rest)
        texts = [[type(one)(*islice(tensors, len(one))) for one in text] for text in like]
        return self(latents, TimeModulation(modulation, embedding), texts)

    def _embed(self, latents: Tensor) -> Tensor:
        """(1, 32, h, w) -> tokens (1, N, D), with positions if the model has them."""
        projection = self.patch_embed.proj
        tokens = latents.movedim(1, -1)
        x = linear(tokens, projection.weight.flatten(1), projection.bias)
        if self.config.interpolation_scale is not None:
            # Half of the table depends on the column only, the other half on the row only.
            half = self.config.width // 2
            rows, columns = self._positions((x.shape[1], x.shape[2]), x.device)
            x[..., :half] += columns
            x[..., half:] += rows[:, None]
        return x.flatten(1, 2)

    def _positions(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """The axes of the position table, cached: a CUDA graph must find them on the device."""
        if self._axes is None or self._axes[0] != (grid, device):
            config = self.config
            assert config.interpolation_scale is not None
            spacing = (config.width, config.sample_size, config.interpolation_scale)
            rows, columns = (axis.to(device) for axis in position_axes(grid, *spacing))
            self._axes = ((grid, device), (rows, columns))
        return self._axes[1]


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
            self.norm_k, self.norm_eps = _frozen(attention.norm_k.weight), attention.norm_k.eps
        self.qkv = _frozen(torch.cat([q, k, v]))
        self.out = cast(nn.Linear, attention.to_out[0])
        self.text_attention = TextAttention(plain.attn2)
        self.up = _frozen(ff.conv_inverted.weight.flatten(1))
        self.up_bias = cast(nn.Parameter, ff.conv_inverted.bias)
        self.depth = ff.conv_depth
        self.down = _frozen(ff.conv_point.weight.flatten(1))

    def forward(
        self,
        x: Tensor,
        modulation: Sequence[Tensor],
        texts: Sequence[TextContext],
        grid: tuple[int, int],
        row_chunk: int | None,
    ) -> Tensor:
        """Tokens x (streams, N, D) -> (streams, N, D), one stream for each text.

        In the first block x may have a single stream: before any cross-attention all streams are
        equal, so that block's self-attention is computed once for all of them.
        """
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation
        tokens = row_chunk * grid[1] if row_chunk else None
        x = self._attend(x, shift_attn, scale_attn, gate_attn, tokens)
        if len(x) < len(texts):
            x = x.repeat(len(texts), 1, 1)
        for stream, text in zip(x.split(1), texts, strict=True):
            for chunk in stream.split(tokens or stream.shape[1], 1):
                self.text_attention(chunk, text)
        if tokens is None:
            y = self._gated_conv(modulate(x, shift_ff, scale_ff, self.eps), grid)
            return gated_residual_linear_(x, y, self.down, None, gate_ff)
        for stream in x.split(1):
            above = stream[:, :0]  # a copy of the row above the chunk, before it was overwritten
            for i, chunk in enumerate(stream.split(tokens, 1)):
                end = i * tokens + chunk.shape[1]
                padded = torch.cat([above, chunk, stream[:, end : end + grid[1]]], dim=1)
                window = padded.shape[1] // grid[1], grid[1]
                y = self._gated_conv(modulate(padded, shift_ff, scale_ff, self.eps), window)
                y = y[:, above.shape[1] : above.shape[1] + chunk.shape[1]]
                above = chunk[:, -grid[1] :].clone()
                gated_residual_linear_(chunk, y, self.down, None, gate_ff)
        return x

    def _gated_conv(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The Mix-FFN up to its last projection: (B, N, D) -> (B, N, 2.5·D)."""
        hidden = linear_silu(tokens, self.up, self.up_bias).unflatten(1, grid)
        del tokens  # frees memory if the caller holds no other reference
        return depthwise_glu(hidden, self.depth.weight, cast(Tensor, self.depth.bias)).flatten(1, 2)

    def _attend(
        self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, tokens: int | None
    ) -> Tensor:
        """Linear self-attention. In chunks of `tokens`, keys and values are summed up first."""
        out = self.out
        if tokens is None:
            y = attend_tokens(*self._project(modulate(x, shift, scale, self.eps)))
            return gated_residual_linear_(x, y, out.weight, out.bias, gate)
        for stream in x.split(1):
            chunks = stream.split(tokens, 1)
            queries, state = [], None
            for chunk in chunks:
                q, sums = self._project(modulate(chunk, shift, scale, self.eps))
                queries.append(q.clone())  # q may be a view that keeps a larger tensor alive
                state = sums if state is None else state + sums
            assert state is not None  # a grid has at least one row
            for chunk, q in zip(chunks, queries, strict=True):
                gated_residual_linear_(chunk, attend_tokens(q, state), out.weight, out.bias, gate)
        return x

    def _project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return project_qkv(tokens, self.qkv, self.heads, self.norm_k, self.norm_eps)


def peak_bytes(
    config: DiTConfig,
    dtype: torch.dtype,
    grid: tuple[int, int],
    text_lengths: Sequence[int],
    steps: int,
    *,
    row_chunk: int | None = None,
    batched_cfg: bool = True,
    fold: bool = True,
) -> int:
    """Predict the most bytes that denoising one image takes, weights included.

    grid: (h, w) of the latents. text_lengths: tokens of each text, the prompt last. batched_cfg:
    whether all texts run in one batch. fold: as in `FusedDiT.encode_text`.
    """
    with torch.device("meta"):
        weights = sum(p.numel() for p in DiT(config).parameters()) * dtype.itemsize
        # A block frees its activations before the next one runs, so one block stands for all.
        fused = FusedDiT(DiT(replace(config, num_layers=1)).requires_grad_(False).to(dtype))
        fused.row_chunk = row_chunk
        sample = torch.empty((1, config.in_channels, *grid))
        states = torch.empty((1, max(text_lengths), config.caption_channels), dtype=dtype)
        modulation = torch.empty((6, config.width), dtype=dtype)
    texts = [fused.encode_text(states[:, :length], fold=fold) for length in text_lengths]
    time = TimeModulation(modulation, modulation[0])
    with PeakMemory() as memory:
        fused(sample.to(dtype), time, texts if batched_cfg else texts[-1:])
    contexts = [sum(tensor.nbytes for layer in text for tensor in layer) for text in texts]
    if fold and config.qk_norm is None:
        # A shorter prompt may take more than a long one: up to D² numbers a layer once folded.
        contexts[-1] = max(contexts[-1], config.width**2 * dtype.itemsize)
    constants = config.num_layers * sum(contexts) + steps * 7 * config.width * dtype.itemsize
    # The sampler holds the sample, two estimates of x₀, the noise and two velocities in float32.
    return weights + constants + memory.peak + 6 * sample.nbytes


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
