"""ControlNet in the form that runs, block by block beside the fused transformer.

Whatever depends on the control image alone is computed once an image. The branch advances by one
block at a time, so that only its latest tokens are held.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from sana_cli.kernels.projection import gated_residual_linear_
from sana_cli.models.controlnet import ControlNet
from sana_cli.models.cross_attention import TextContext
from sana_cli.models.dit import Block
from sana_cli.models.fused_layers import FusedBlock, FusedPatchEmbed, frozen


class ControlContext(NamedTuple):
    """What a control image determines."""

    embedding: Tensor  # (1, N, D), added to the input of the branch
    scale: Tensor  # (D,), all equal: multiplies what the branch adds


class FusedControlNet(nn.Module):
    """Takes over the weights of a `ControlNet`, which must not be used afterwards."""

    def __init__(self, controlnet: ControlNet) -> None:
        super().__init__()
        self.config = controlnet.config
        blocks = [cast(Block, block) for block in controlnet.transformer_blocks]
        self.patch_embed = FusedPatchEmbed(controlnet.patch_embed)
        self.time_embed = controlnet.time_embed
        self.caption_projection = controlnet.caption_projection
        self.caption_norm = controlnet.caption_norm
        self.tables = frozen(torch.stack([block.scale_shift_table for block in blocks]))
        self.input_block = controlnet.input_block
        self.outputs = controlnet.controlnet_blocks
        self.blocks = nn.ModuleList()
        while blocks:  # each is freed before the next is merged
            del controlnet.transformer_blocks[0]
            self.blocks.append(FusedBlock(blocks.pop(0)))

    def encode_control(self, latents: Tensor, scale: float) -> ControlContext:
        """Embed the latents (1, 32, h, w) of a control image, in the dtype of the weights."""
        weight = self.input_block.weight
        embedding = self.input_block(self.patch_embed(latents.to(weight.dtype)))
        return ControlContext(embedding, weight.new_full((len(weight),), scale))


class ControlBranch:
    """The branch in one evaluation of the transformer, which it follows block by block."""

    def __init__(
        self,
        network: FusedControlNet,
        latents: Tensor,
        modulation: Tensor,
        texts: Sequence[list[TextContext]],
        control: ControlContext,
        row_chunk: int | None,
    ) -> None:
        """latents (1, 32, h, w); modulation (6, D); for each text a context for every block."""
        self.network, self.texts, self.control = network, texts, control
        self.row_chunk, self.grid = row_chunk, (latents.shape[2], latents.shape[3])
        self.modulation = network.tables + modulation  # (layers, 6, D)
        self.x: Tensor | None = None  # tokens of the branch, (1 or texts, N, D)
        if network.config.wiring == "diffusers":
            self.x = network.patch_embed(latents) + control.embedding

    def add_to(self, x: Tensor, index: int) -> None:
        """Advance the branch and add its result, in place, to the output x of block `index`.

        x (streams, N, D), one stream for each text. A perturbed stream may follow; it gets the same
        as the stream that it was copied from.
        """
        if self.x is None:
            self.x = x[: len(self.texts)] + self.control.embedding
        step = index - self.network.config.first_block
        if not 0 <= step < len(self.network.blocks):
            return
        texts = [text[step] for text in self.texts]
        rows = self.modulation[step].unbind()
        block, output = self.network.blocks[step], cast(nn.Linear, self.network.outputs[step])
        self.x = cast(Tensor, block(self.x, rows, texts, self.grid, self.row_chunk))
        tokens = self.row_chunk * self.grid[1] if self.row_chunk else x.shape[1]
        results = self.x.split(1)
        for stream, result in zip(x.split(1), (*results, results[-1]), strict=False):
            for chunk, y in zip(stream.split(tokens, 1), result.split(tokens, 1), strict=True):
                scale = self.control.scale
                gated_residual_linear_(chunk, y, output.weight, output.bias, scale)
