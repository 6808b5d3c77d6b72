"""The transformer's blocks over a few rows of the latent grid at a time, for little memory.

All that a block does is local to a token, but for two things. The attention's sums over tokens
are additive, so one pass gathers them and the next applies them; and the depthwise 3x3 sees one
row above and one below. The result is the plain block's to rounding.
"""

from typing import cast

import torch
from torch import Tensor, nn

from sana_cli.dit import Block, DiT, modulate


def run_in_chunks(dit: DiT, rows: int | None) -> None:
    """Let every block of `dit` work on `rows` rows of the grid at once, 1 or more; None: on all."""
    for i, block in enumerate(dit.transformer_blocks):
        plain = block.plain if isinstance(block, ChunkedBlock) else cast(Block, block)
        dit.transformer_blocks[i] = ChunkedBlock(plain, rows) if rows else plain


class ChunkedBlock(nn.Module):
    """A `Block` that writes its result over its input."""

    def __init__(self, plain: Block, rows: int) -> None:
        super().__init__()
        self.plain, self.rows = plain, rows

    def forward(
        self,
        x: Tensor,
        caption: Tensor,
        modulation: Tensor,
        bias: Tensor | None,
        grid: tuple[int, int],
    ) -> Tensor:
        block, (height, width) = self.plain, grid
        x = x.contiguous()
        rows = (block.scale_shift_table + modulation).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = rows
        spans = [(top, min(top + self.rows, height)) for top in range(0, height, self.rows)]
        chunks = [x[:, top * width : bottom * width] for top, bottom in spans]

        state: Tensor | None = None
        for chunk in chunks:
            sums = block.attn1.state(modulate(chunk, shift_attn, scale_attn, block.eps))
            state = sums if state is None else state + sums
        assert state is not None  # a grid has a row
        for chunk in chunks:
            tokens = modulate(chunk, shift_attn, scale_attn, block.eps)
            chunk += gate_attn * block.attn1.attend(tokens, state)
            chunk += block.attn2(chunk, caption, bias)

        above = x[:, :0]  # the row over a chunk, as it was before it was written over
        for (_, bottom), chunk in zip(spans, chunks, strict=True):
            first = above.shape[1]
            below = x[:, bottom * width : (bottom + 1) * width]
            near = modulate(torch.cat([above, chunk, below], dim=1), shift_ff, scale_ff, block.eps)
            above = chunk[:, -width:].clone()
            y = block.ff(near, (near.shape[1] // width, width))
            chunk += gate_ff * y[:, first : first + chunk.shape[1]]
        return x
