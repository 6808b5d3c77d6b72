"""DC-AE: the deep-compression autoencoder, 32x smaller on each side (arXiv 2410.10733).

Shapes: B batch, C channels, H W pixels, h = H/32 and w = W/32 latent cells, N = h·w positions.
Images are RGB in [-1, 1]; latents are the output of the encoder, *before* `scaling_factor`.
Attribute names are the published tensor names, so a checkpoint loads without a name map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_cli.kernels.linear_attention import relu_linear_attention
from sana_cli.kernels.rms_norm import ACTIVATIONS
from sana_cli.models.configs import DCAEConfig, Stages, per_stage


class DCAE(nn.Module):
    """Encoder and decoder. `decode(encode(x))` is close to x; both are deterministic."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], H and W multiples of 32 -> (B, 32, h, w)."""
        return self.encoder(image)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 32, h, w) -> (B, 3, H, W), about [-1, 1] but not clamped."""
        return self.decoder(latents)


class Encoder(nn.Module):
    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        widths, layers = config.encoder_block_out_channels, config.encoder_layers_per_block
        types = per_stage(config.encoder_block_types, len(widths))
        unshuffle = config.downsample_block_type == "pixel_unshuffle"
        self.conv_in: nn.Module
        if layers[0] > 0:
            self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        else:
            self.conv_in = Downsample(config.in_channels, widths[1], unshuffle, shortcut=False)
        self.down_blocks = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, layers, strict=True)):
            head_dim, scales = config.attention_head_dim, config.encoder_qkv_multiscales[i]
            stage = [BLOCKS[types[i]](width, head_dim, scales) for _ in range(depth)]
            if i < len(widths) - 1 and depth > 0:
                stage.append(Downsample(width, widths[i + 1], unshuffle))
            self.down_blocks.append(nn.Sequential(*stage))
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)
        self.shortcut = config.encoder_out_shortcut

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        z = self.conv_out(x)
        return z + group_mean(x, z.shape[1]) if self.shortcut else z


class Decoder(nn.Module):
    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        widths, layers = config.decoder_block_out_channels, config.decoder_layers_per_block
        types = per_stage(config.decoder_block_types, len(widths))
        interpolate = config.upsample_block_type == "interpolate"
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.repeats = widths[-1] // config.latent_channels
        self.shortcut = config.decoder_in_shortcut
        # Numbered by resolution, as published: up_blocks.0 has the full resolution and runs last.
        self.up_blocks = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, layers, strict=True)):
            stage: list[nn.Module] = []
            if i < len(widths) - 1 and depth > 0:
                stage.append(Upsample(widths[i + 1], width, interpolate))
            head_dim, scales = config.attention_head_dim, config.decoder_qkv_multiscales[i]
            stage += [BLOCKS[types[i]](width, head_dim, scales) for _ in range(depth)]
            self.up_blocks.append(nn.Sequential(*stage))
        width = widths[0] if layers[0] > 0 else widths[1]
        self.norm_out = ChannelRMSNorm(width)
        self.activation = config.decoder_conv_act_fn
        self.conv_out: nn.Module
        if layers[0] > 0:
            self.conv_out = nn.Conv2d(width, config.in_channels, 3, padding=1)
        else:  # DC-AE-Lite: the output convolution is also the last upsampling
            self.conv_out = Upsample(width, config.in_channels, interpolate, shortcut=False)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        if self.shortcut:
            x = x + z.repeat_interleave(self.repeats, dim=1)
        for stage in reversed(self.up_blocks):
            x = stage(x)
        return self.conv_out(ACTIVATIONS[self.activation](self.norm_out(x)))


class ResBlock(nn.Module):
    """x + norm(conv(silu(conv(x)))), used in the three high-resolution stages."""

    def __init__(self, width: int, head_dim: int, scales: Stages) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = ChannelRMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(F.silu(self.conv1(x))))


class EfficientViTBlock(nn.Module):
    """Multi-scale linear attention, then a gated convolution, each with a residual."""

    def __init__(self, width: int, head_dim: int, scales: Stages) -> None:
        super().__init__()
        self.attn: nn.Module = MultiscaleLinearAttention(width, head_dim, scales)
        self.conv_out = GLUMBConv(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.attn(x))


class MultiscaleLinearAttention(nn.Module):
    """ReLU linear attention over q, k, v and over their depthwise-aggregated copies (EfficientViT).

    The published layout splits the concatenated channels [q | k | v] into consecutive groups of
    3·head_dim, each a head with its own (q, k, v). The names of the three linears therefore do not
    tell which of the three a channel belongs to.
    """

    def __init__(self, width: int, head_dim: int, scales: Stages) -> None:
        super().__init__()
        if width % head_dim:
            raise ValueError(
                f"an attention stage of {width} channels needs a multiple of {head_dim}"
            )
        self.head_dim = head_dim
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        heads = width // head_dim
        self.to_qkv_multiscale = nn.ModuleList(
            MultiscaleAggregation(3 * width, 3 * heads, kernel) for kernel in scales
        )
        self.to_out = nn.Linear(width * (1 + len(scales)), width, bias=False)
        self.norm_out = ChannelRMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        tokens = x.movedim(1, -1)
        projected = [linear(tokens) for linear in (self.to_q, self.to_k, self.to_v)]
        qkv = torch.cat(projected, dim=-1).movedim(-1, 1)
        qkv = torch.cat([qkv, *(scale(qkv) for scale in self.to_qkv_multiscale)], dim=1)
        heads = qkv.unflatten(1, (-1, 3, self.head_dim)).flatten(-2)  # (B, heads, 3, d, N)
        # The reference uses a quadratic form where N <= d; the two are equal up to rounding.
        out = relu_linear_attention(*heads.unbind(2))
        out = out.flatten(1, 2).unflatten(-1, (height, width))
        out = self.to_out(out.movedim(1, -1)).movedim(-1, 1)
        return x + self.norm_out(out)


class MultiscaleAggregation(nn.Module):
    def __init__(self, channels: int, groups: int, kernel: int) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(
            channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False
        )
        self.proj_out = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(x))


class GLUMBConv(nn.Module):
    """Inverted bottleneck with a gate: 1x1 up, depthwise 3x3, value·silu(gate), 1x1 down."""

    def __init__(self, width: int, expand: int = 4) -> None:
        super().__init__()
        hidden = expand * width
        self.conv_inverted = nn.Conv2d(width, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, width, 1, bias=False)
        self.norm = ChannelRMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, dim=1)
        return x + self.norm(self.conv_point(value * F.silu(gate)))


class Downsample(nn.Module):
    """Halve each side; the shortcut folds 2x2 pixels into channels and averages groups of them."""

    def __init__(self, width: int, out: int, unshuffle: bool, shortcut: bool = True) -> None:
        super().__init__()
        self.unshuffle, self.shortcut, self.out = unshuffle, shortcut, out
        if unshuffle:
            self.conv = nn.Conv2d(width, out // 4, 3, padding=1)
        else:
            self.conv = nn.Conv2d(width, out, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.unshuffle:
            y = F.pixel_unshuffle(y, 2)
        return y + group_mean(F.pixel_unshuffle(x, 2), self.out) if self.shortcut else y


class Upsample(nn.Module):
    """Double each side; the shortcut repeats channels and unfolds them into 2x2 pixels."""

    def __init__(self, width: int, out: int, interpolate: bool, shortcut: bool = True) -> None:
        super().__init__()
        self.interpolate, self.shortcut = interpolate, shortcut
        self.repeats = out * 4 // width
        self.conv = nn.Conv2d(width, out if interpolate else out * 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.interpolate:
            y = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        else:
            y = F.pixel_shuffle(self.conv(x), 2)
        if self.shortcut:
            y = y + F.pixel_shuffle(x.repeat_interleave(self.repeats, dim=1), 2)
        return y


class ChannelRMSNorm(nn.Module):
    """RMSNorm over the channels of each pixel, with weight and bias; statistics in float32."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)
        x = (x * torch.rsqrt(norm.square() / x.shape[1] + self.eps)).to(self.weight.dtype)
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


def group_mean(x: Tensor, groups: int) -> Tensor:
    """(B, C, H, W) -> (B, groups, H, W): the mean of each run of C/groups channels."""
    return x.unflatten(1, (groups, -1)).mean(dim=2)


BLOCKS: dict[str, type[nn.Module]] = {
    "ResBlock": ResBlock,
    "EfficientViTBlock": EfficientViTBlock,
}
