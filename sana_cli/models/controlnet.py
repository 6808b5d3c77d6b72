"""ControlNet for Sana: a copy of the first blocks that reads a control image (arXiv 2302.05543).

A branch of a few transformer blocks runs on the noisy latents plus an embedding of the control
latents. What its blocks compute is added, through a linear map each, to the stream of the
transformer. Shapes as in `dit.py`. Attribute names are the published tensor names of diffusers'
`SanaControlNetModel`, so a checkpoint loads without a name map.

diffusers and NVlabs connect the branch differently (`wiring`). Relative to the NVlabs code that
trained the released checkpoints, diffusers starts the branch one block earlier and adds its
results one block later:

- "diffusers": the branch starts from its own embedding of the noisy latents; the result of its
  block j is added to the output of block j + 1 of the transformer.
- "nvlabs": the branch starts from the output of block 0 of the transformer; the result of its
  block j is added to the output of block j.
"""

from torch import Tensor, nn

from sana_cli.models.configs import ControlNetConfig
from sana_cli.models.dit import (
    Block,
    CaptionProjection,
    DiT,
    PatchEmbed,
    RMSNorm,
    TimestepModulation,
    attention_bias,
)


class ControlNet(nn.Module):
    """The branch. Its `forward` runs it beside the transformer that it controls."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = PatchEmbed(config)
        self.time_embed = TimestepModulation(width)
        self.caption_projection = CaptionProjection(config.caption_channels, width)
        self.caption_norm = RMSNorm(width)
        self.input_block = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.controlnet_blocks = nn.ModuleList(
            nn.Linear(width, width) for _ in range(config.num_layers)
        )

    def forward(
        self,
        dit: DiT,
        latents: Tensor,
        control: Tensor,
        timestep: Tensor,
        text: Tensor,
        mask: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """Velocity (B, 32, h, w) of a transformer under control.

        control (B, 32, h, w): the control image as latents, scaled like those of an image; text
        (B, L, caption_channels), which the branch projects by itself; the others as in
        `DiT.forward`. `scale` multiplies what the branch adds.
        """
        grid = (latents.shape[-2], latents.shape[-1])
        bias = None if mask is None else attention_bias(mask, latents.dtype)
        x, caption = dit.patch_embed(latents), dit.project_text(text)
        modulation, time = dit.time_embed(timestep)
        own_caption = self.caption_norm(self.caption_projection(text))
        own_modulation, _ = self.time_embed(timestep)
        control = self.input_block(self.patch_embed(control))
        h = self.patch_embed(latents) + control
        for i, block in enumerate(dit.transformer_blocks):
            x = block(x, caption, modulation, bias, grid)
            if i == 0 and self.config.wiring == "nvlabs":
                h = x + control
            j = i - self.config.first_block
            if 0 <= j < self.config.num_layers:
                h = self.transformer_blocks[j](h, own_caption, own_modulation, bias, grid)
                x = x + scale * self.controlnet_blocks[j](h)
        return dit.output(x, time, grid)
