"""The Sana transformer: a Linear DiT (arXiv 2410.10629, section 2.2 and figure 5).

Shapes: B batch, D width, h w the latent grid, N = h·w image tokens (row-major), L text tokens.
Attribute names are the published tensor names, so a checkpoint loads without a name map.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_cli.kernels.linear_attention import attend, attention_state
from sana_cli.models.configs import DiTConfig


class DiT(nn.Module):
    """Predicts the flow velocity of noisy latents, given text."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = PatchEmbed(config)
        self.time_embed: nn.Module = (
            GuidedModulation(width) if config.guidance_embeds else TimestepModulation(width)
        )
        self.caption_projection = CaptionProjection(config.caption_channels, width)
        self.caption_norm = RMSNorm(width)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))
        self.proj_out = nn.Linear(width, config.out_channels)

    def project_text(self, text: Tensor) -> Tensor:
        """Text states (B, L, caption_channels) -> (B, L, D), the same for every step of a run."""
        return self.caption_norm(self.caption_projection(text))

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        caption: Tensor,
        mask: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, 32, h, w), in the dtype of the weights.

        latents (B, 32, h, w) in that dtype; timestep (B,) in the units the model was trained in;
        caption (B, L, D) from `project_text`; mask (B, L), True at real tokens, None where all
        are; guidance (B,), already scaled, for Sana-Sprint and for no other.
        """
        height, width = latents.shape[-2:]
        x = self.patch_embed(latents)
        times = (timestep,) if guidance is None else (timestep, guidance)
        modulation, time = self.time_embed(*times)
        bias = None if mask is None else attention_bias(mask, x.dtype)
        for block in self.transformer_blocks:
            x = block(x, caption, modulation, bias, (height, width))
        return self.output(x, time, (height, width))

    def output(self, x: Tensor, time: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, N, D) after the last block and the time embedding (B, D) -> (B, 32, h, w)."""
        shift, scale = (self.scale_shift_table + time[:, None]).chunk(2, dim=1)
        x = self.proj_out(modulate(x, shift, scale, self.config.norm_eps))
        return x.transpose(1, 2).unflatten(-1, grid)


class Block(nn.Module):
    """Linear self-attention, cross-attention to the text, Mix-FFN (figure 5, right)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.eps = config.norm_eps
        qk_norm = config.qk_norm is not None
        self.attn1 = LinearAttention(width, config.num_attention_heads, qk_norm)
        self.attn2 = CrossAttention(width, config.num_cross_attention_heads, qk_norm)
        self.ff = MixFFN(width, config.mlp_ratio)
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))

    def forward(
        self,
        x: Tensor,
        caption: Tensor,
        modulation: Tensor,
        bias: Tensor | None,
        grid: tuple[int, int],
    ) -> Tensor:
        rows = (self.scale_shift_table + modulation).chunk(6, dim=1)  # six of (B, 1, D)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = rows
        x = x + gate_attn * self.attn1(modulate(x, shift_attn, scale_attn, self.eps))
        x = x + self.attn2(x, caption, bias)
        x = x + gate_ff * self.ff(modulate(x, shift_ff, scale_ff, self.eps), grid)
        return x


class LinearAttention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        if qk_norm:
            self.norm_q, self.norm_k = RMSNorm(width), RMSNorm(width)
        self.qk_norm = qk_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, self.state(x))

    def state(self, x: Tensor) -> Tensor:
        """Sum keys and values over tokens (B, N, D) -> float32 (B, heads, d+1, d)."""
        k, v = self.to_k(x), self.to_v(x)
        return attention_state(self._heads(self.norm_k(k) if self.qk_norm else k), self._heads(v))

    def attend(self, x: Tensor, state: Tensor) -> Tensor:
        """Attend from tokens (B, N, D) to those summed up in `state` -> (B, N, D)."""
        q = self.to_q(x)
        out = attend(self._heads(self.norm_q(q) if self.qk_norm else q), state).to(x.dtype)
        out = self.to_out[0](out.flatten(1, 2).transpose(1, 2))
        return out.clamp(-65504, 65504) if out.dtype == torch.float16 else out

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, heads, d, N)."""
        return x.transpose(1, 2).unflatten(1, (self.heads, -1))


class CrossAttention(nn.Module):
    """Softmax attention to the text; the timestep modulates neither its query nor its result."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        if qk_norm:
            self.norm_q, self.norm_k = RMSNorm(width), RMSNorm(width)
        self.qk_norm = qk_norm

    def forward(self, x: Tensor, caption: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(caption), self.to_v(caption)
        if self.qk_norm:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if q.is_meta:  # on meta, torch would count a score matrix that no device materialises
            out = torch.empty_like(q)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class MixFFN(nn.Module):
    """Gated feed-forward with a depthwise 3x3 convolution.

    In models without a position table, the zero padding of that convolution is the only source
    of positions.
    """

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = int(ratio * width)
        self.conv_inverted = nn.Conv2d(width, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, width, 1, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        # Token-major (B, N, D) is channels-last already: the grid is a view of it.
        image = x.unflatten(1, grid).movedim(-1, 1)
        value, gate = self.conv_depth(F.silu(self.conv_inverted(image))).chunk(2, dim=1)
        return self.conv_point(value * F.silu(gate)).movedim(1, -1).flatten(1, 2)


class PatchEmbed(nn.Module):
    """A 1x1 convolution to tokens; the 2K and 4K models add a sine-cosine table."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.width, 1)
        self.base, self.interpolation = config.sample_size, config.interpolation_scale

    def forward(self, latents: Tensor) -> Tensor:
        x = self.proj(latents).flatten(2).transpose(1, 2)
        if self.interpolation is None:
            return x
        grid = (latents.shape[-2], latents.shape[-1])
        table = position_table(grid, x.shape[-1], self.base, self.interpolation)
        return (x + table.to(x.device)).to(x.dtype)  # added in float32


class TimestepModulation(nn.Module):
    """Timestep -> the six modulation rows of every block, and the embedding of the last norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(width)})
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) -> (B, 6, D) and (B, D)."""
        time = self.emb["timestep_embedder"](timestep)
        return self.linear(F.silu(time)).unflatten(-1, (6, -1)), time


class GuidedModulation(nn.Module):
    """`TimestepModulation` for Sana-Sprint, into which guidance was distilled (arXiv 2503.09641).

    The guidance scale is embedded like the timestep, so a step takes one pass instead of two.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(width)
        self.guidance_embedder = TimestepEmbedder(width)
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, timestep: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) and (B,) -> (B, 6, D) and (B, D)."""
        time = self.timestep_embedder(timestep) + self.guidance_embedder(guidance)
        return self.linear(F.silu(time)).unflatten(-1, (6, -1)), time


class TimestepEmbedder(nn.Module):
    """Sines and cosines of a number, then a two-layer MLP."""

    def __init__(self, width: int, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.linear_1 = nn.Linear(features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.features // 2
        steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
        angle = timestep.float()[:, None] * torch.exp(-math.log(10_000) * steps / half)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(features)))


class CaptionProjection(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class RMSNorm(nn.Module):
    """RMSNorm over the whole width, before any split into heads; statistics in float32."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (x * scale).to(self.weight.dtype) * self.weight


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights, then scale and shift (adaLN-single, PixArt section 2.3)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L) bool -> additive (B, 1, 1, L); -10000 underflows to weight 0 after the softmax."""
    return (~mask).to(dtype)[:, None, None, :] * -10_000


def position_table(grid: tuple[int, int], width: int, base: int, interpolation: float) -> Tensor:
    """Sine-cosine positions float32 (1, h·w, D): the first half of D for columns, then rows."""
    rows, columns = position_axes(grid, width, base, interpolation)
    shape = (*grid, width // 2)
    table = torch.cat([columns[None].expand(shape), rows[:, None].expand(shape)], dim=-1)
    return table.flatten(0, 1)[None]


def position_axes(
    grid: tuple[int, int], width: int, base: int, interpolation: float
) -> tuple[Tensor, Tensor]:
    """The two halves of the table, float32: one per row (h, D/2) and one per column (w, D/2).

    The native grid of `base` cells spans base/interpolation units, and so does any other grid.
    """
    frequencies = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    axes = []
    for cells in grid:
        place = torch.arange(cells, dtype=torch.float32) / (cells / base) / interpolation
        angle = place.double()[:, None] * frequencies
        axes.append(torch.cat([angle.sin(), angle.cos()], dim=-1).float())
    return axes[0], axes[1]
