"""The Linear DiT as it runs: the function of `dit.DiT`, with nothing computed twice.

What depends on the text alone, or on the time alone, is computed once a picture. The rest is the
sequence of operations in `kernels/`, token-major from the first to the last, over `row_chunk` rows
of the latent grid at a time if memory is short. All of it equals the plain model to rounding.

Shapes as in `dit.py`: D width, h w the latent grid, N = h·w tokens, L text tokens.
"""

from collections.abc import Sequence
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
from sana_cli.models.cuda_graph import Graph
from sana_cli.models.dit import Block, DiT, position_axes
from sana_cli.system.devices import is_out_of_memory


class TimeModulation(NamedTuple):
    """What the network knows of the time: the modulation of all blocks, and the embedding."""

    modulation: Tensor  # (6, D)
    embedding: Tensor  # (D,)


class FusedDiT(nn.Module):
    """Takes over the weights of a `DiT`, which must not be used any more."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.config = dit.config
        self.row_chunk: int | None = None  # of the latent grid, worked on at once; None: all
        self._axes: tuple[object, tuple[Tensor, Tensor]] | None = None
        self._graph: Graph | None = None
        self._shapes: list[torch.Size] = []  # of the last call, which the graph is for
        self.unrecorded: str | None = None  # why there is no graph, if one was tried
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

    def place(self, device: str, row_chunk: int | None) -> None:
        """Run on a device, on `row_chunk` rows of the latent grid at once; None: on all."""
        if row_chunk != self.row_chunk or torch.device(device).type != self.tables.device.type:
            self._graph, self._shapes = None, []  # it reads the weights where they were
        self.row_chunk = row_chunk
        self.to(device)

    def encode_text(self, text: Tensor, padded: int = 1, fold: bool = True) -> list[TextContext]:
        """Text states (1, L, caption_channels) as every layer needs them: see `TextAttention`."""
        caption = self.caption_norm(self.caption_projection(text))
        blocks = [cast(FusedBlock, block) for block in self.blocks]
        return [block.text_attention.encode_text(caption, padded, fold) for block in blocks]

    def moments(
        self, timesteps: Sequence[float], guidance: Tensor | None = None
    ) -> list[TimeModulation]:
        """One for each timestep, in the units the model was trained in.

        `guidance` (1,), already scaled, for Sana-Sprint and for no other.
        """
        told = [torch.tensor(timesteps, device=self.tables.device)]
        if guidance is not None:
            told.append(guidance)
        return list(map(TimeModulation, *self.time_embed(*told)))

    def velocity(
        self, latents: Tensor, moment: TimeModulation, texts: Sequence[list[TextContext]]
    ) -> Tensor:
        """`forward`; on CUDA by a graph from the second call with the same shapes on."""
        if not latents.is_cuda or self.row_chunk or self.unrecorded:
            return self(latents, moment, texts)
        heard = list(chain.from_iterable(texts))
        given = [latents, *moment, *chain.from_iterable(heard)]
        shapes = [tensor.shape for tensor in given]
        if shapes != self._shapes:
            self._graph, self._shapes = None, shapes
            return self(latents, moment, texts)
        if self._graph is None:
            try:
                self._graph = Graph(partial(self._of_tensors, texts), given)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self.unrecorded = str(error)
                return self(latents, moment, texts)
        return self._graph(given).clone()

    def forward(
        self, latents: Tensor, moment: TimeModulation, texts: Sequence[list[TextContext]]
    ) -> Tensor:
        """Velocity (len(texts), 32, h, w) of one sample given each text, in the weights' dtype.

        latents (1, 32, h, w) in that dtype.
        """
        grid = latents.shape[2], latents.shape[3]
        x = self._embed(latents)
        modulation = self.tables + moment.modulation  # (layers, 6, D)
        for i, block in enumerate(self.blocks):
            heard = [text[i] for text in texts]
            x = block(x, modulation[i].unbind(), heard, grid, self.row_chunk)
        shift, scale = (self.last_table + moment.embedding).unbind()
        last = self.proj_out
        chunks = x.split(self.row_chunk * grid[1] if self.row_chunk else x.shape[1], dim=1)
        tokens = (modulate(chunk, shift, scale, self.config.norm_eps) for chunk in chunks)
        x = torch.cat([linear(some, last.weight, last.bias) for some in tokens], dim=1)
        return x.transpose(1, 2).unflatten(-1, grid)

    def _of_tensors(self, like: Sequence[list[TextContext]], given: Sequence[Tensor]) -> Tensor:
        """`forward`, given its arguments as one row, which holds texts of the kinds in `like`."""
        latents, modulation, embedding, *rest = given
        parts = iter(rest)
        texts = [[type(one)(*islice(parts, len(one))) for one in text] for text in like]
        return self(latents, TimeModulation(modulation, embedding), texts)

    def _embed(self, latents: Tensor) -> Tensor:
        """(1, 32, h, w) -> tokens (1, N, D), with their positions where the model has them."""
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
        """Made once, not at every step: what a CUDA graph reads must be on the device."""
        if self._axes is None or self._axes[0] != (grid, device):
            config = self.config
            assert config.interpolation_scale is not None
            made = (config.width, config.sample_size, config.interpolation_scale)
            rows, columns = (axis.to(device) for axis in position_axes(grid, *made))
            self._axes = ((grid, device), (rows, columns))
        return self._axes[1]


class FusedBlock(nn.Module):
    """A `Block` as six maps and what stands between them. It writes its result over its input."""

    def __init__(self, plain: Block) -> None:
        super().__init__()
        own, ff = plain.attn1, plain.ff
        self.eps, self.heads = plain.eps, own.heads
        q, k, v = own.to_q.weight, own.to_k.weight, own.to_v.weight
        self.norm_k: nn.Parameter | None = None
        self.norm_eps = 0.0
        if own.qk_norm:
            # The scale of a query cancels in linear attention; only the weight of its norm stays.
            q = (own.norm_q.weight.float()[:, None] * q.float()).to(q.dtype)
            self.norm_k, self.norm_eps = _frozen(own.norm_k.weight), own.norm_k.eps
        self.qkv = _frozen(torch.cat([q, k, v]))
        self.out = cast(nn.Linear, own.to_out[0])
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
        """x (1 or as many as there are texts, N, D), for all of them -> (texts, N, D).

        Until the first text is heard, what is computed is the same for all.
        """
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation
        tokens = row_chunk * grid[1] if row_chunk else None
        x = self._attend(x, shift_attn, scale_attn, gate_attn, tokens)
        if len(x) < len(texts):
            x = x.repeat(len(texts), 1, 1)
        for half, text in zip(x.split(1), texts, strict=True):
            for chunk in half.split(tokens or half.shape[1], 1):
                self.text_attention(chunk, text)
        if tokens is None:
            y = self._mix(modulate(x, shift_ff, scale_ff, self.eps), grid)
            return gated_residual_linear_(x, y, self.down, None, gate_ff)
        for half in x.split(1):
            above = half[:, :0]  # the row over a chunk, as it was before it was written over
            for i, chunk in enumerate(half.split(tokens, 1)):
                end = i * tokens + chunk.shape[1]
                near = torch.cat([above, chunk, half[:, end : end + grid[1]]], dim=1)
                window = near.shape[1] // grid[1], grid[1]
                y = self._mix(modulate(near, shift_ff, scale_ff, self.eps), window)
                y = y[:, above.shape[1] : above.shape[1] + chunk.shape[1]]
                above = chunk[:, -grid[1] :].clone()
                gated_residual_linear_(chunk, y, self.down, None, gate_ff)
        return x

    def _mix(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The Mix-FFN up to its last projection: (B, N, D) -> (B, N, 2.5·D)."""
        image = linear_silu(tokens, self.up, self.up_bias).unflatten(1, grid)
        del tokens  # as large as all that follows allows
        return depthwise_glu(image, self.depth.weight, cast(Tensor, self.depth.bias)).flatten(1, 2)

    def _attend(
        self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, tokens: int | None
    ) -> Tensor:
        """Linear self-attention. By chunks: the sums over all tokens first, then their use."""
        out = self.out
        if tokens is None:
            y = attend_tokens(*self._project(modulate(x, shift, scale, self.eps)))
            return gated_residual_linear_(x, y, out.weight, out.bias, gate)
        for half in x.split(1):
            chunks = half.split(tokens, 1)
            queries, state = [], None
            for chunk in chunks:
                q, sums = self._project(modulate(chunk, shift, scale, self.eps))
                queries.append(q.clone())  # it may be a view of more
                state = sums if state is None else state + sums
            assert state is not None  # a grid has a row
            for chunk, q in zip(chunks, queries, strict=True):
                gated_residual_linear_(chunk, attend_tokens(q, state), out.weight, out.bias, gate)
        return x

    def _project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return project_qkv(tokens, self.qkv, self.heads, self.norm_k, self.norm_eps)


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
