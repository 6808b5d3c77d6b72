"""The layers of DC-AE as strip ops, and the width of their widest tensor."""

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_cli.kernels.convolution import conv_norm_add, conv_silu, convolve, lay_out_by_taps
from sana_cli.kernels.depthwise_glu import depthwise_glu
from sana_cli.kernels.linear import linear
from sana_cli.kernels.multiscale import aggregate
from sana_cli.kernels.projection import linear_silu
from sana_cli.models.dc_ae import (
    Downsample,
    GLUMBConv,
    MultiscaleAggregation,
    MultiscaleLinearAttention,
    ResBlock,
    Upsample,
    group_mean,
)
from sana_cli.models.streaming.ops import (
    Chain,
    EvenRows,
    LineBuffer,
    Residual,
    Size,
    StripOp,
    repeat,
    tokens,
)
from sana_cli.models.streaming.subpixel import SubpixelUpsample


def op_of(module: nn.Module, height: int) -> StripOp:
    """Return the strip op of a module, for a map of `height` rows."""
    if isinstance(module, nn.Conv2d):
        return ConvOp(module, height)
    if isinstance(module, ResBlock):
        return ResBlockOp(module, height)
    if isinstance(module, GLUMBConv):
        return Residual(GLUMBConvOp(module, height), norm=module.norm)
    if isinstance(module, SubpixelUpsample):
        return UpsampleOp(module, height)
    if isinstance(module, Upsample):
        if module.interpolate:
            body = Chain(_upsample, ConvOp(module.conv, 2 * height), EvenRows())
        else:
            body = Chain(ConvOp(module.conv, height), _pixel_shuffle)
        shortcut = Chain(repeat(module.repeats), _pixel_shuffle)
        return Residual(body, shortcut, scale=2) if module.shortcut else body
    if isinstance(module, Downsample):
        body = Chain(ConvOp(module.conv, height))
        if module.unshuffle:
            body = Chain(body, EvenRows(), _pixel_unshuffle)
        shortcut = Chain(_pixel_unshuffle, partial(group_mean, groups=module.out))
        return Chain(EvenRows(), Residual(body, shortcut, scale=0.5)) if module.shortcut else body
    raise TypeError(f"{type(module).__name__} has no strip op")


def widest(module: nn.Module) -> int:
    """Channels of the widest tensor inside a module, per position of its input."""
    if isinstance(module, SubpixelUpsample):
        return 4 * module.out
    if isinstance(module, Upsample) and module.interpolate:
        return 4 * max(module.conv.in_channels, module.conv.out_channels)
    return max(p.shape[0] for p in module.parameters() if p.ndim > 1)


class ConvOp:
    """A convolution, padded with zeros at the borders of the whole map; with `silu`, of SiLU(x)."""

    def __init__(self, conv: nn.Conv2d, height: int, silu: bool = False) -> None:
        self.conv, self.silu = conv, silu
        self.reach, self.stride = cast(Size, conv.padding)[0], cast(Size, conv.stride)
        self.line_buffer = LineBuffer(self.reach, height, self.stride[0], silu=silu)

    def __call__(self, x: Tensor) -> Tensor | None:
        conv, above = self.conv, 0
        if self.line_buffer.is_whole(x):
            above, window = self.reach, F.silu(x, inplace=True) if self.silu else x
        elif (strip := self.line_buffer(x)) is not None:
            window = strip
        else:
            return None
        return convolve(window, conv.weight, conv.bias, (above, self.reach), self.stride)


class ResBlockOp:
    """A ResBlock, in two kernels if the map comes in one strip."""

    def __init__(self, module: ResBlock, height: int) -> None:
        self.module, self.height = module, height
        body = Chain(ConvOp(module.conv1, height), ConvOp(module.conv2, height, silu=True))
        self.in_strips = Residual(body, norm=module.norm)

    def __call__(self, x: Tensor) -> Tensor | None:
        if x.shape[2] < self.height:
            return self.in_strips(x)
        conv1, conv2, norm = self.module.conv1, self.module.conv2, self.module.norm
        hidden = conv_silu(x, conv1.weight, cast(Tensor, conv1.bias))
        return conv_norm_add(hidden, conv2.weight, norm.weight, norm.bias, norm.eps, x)


class UpsampleOp:
    """A SubpixelUpsample, whose shortcut is part of its kernel if the map comes in one strip."""

    def __init__(self, module: SubpixelUpsample, height: int) -> None:
        self.module, self.height = module, height
        self.in_strips = Chain(LineBuffer(1, height, sides=1), module.rows)

    def __call__(self, x: Tensor) -> Tensor | None:
        return self.in_strips(x) if x.shape[2] < self.height else self.module(x)


class ConvInput:
    """What a kernel reads that stands for the convolution of a ConvOp.

    `halo` tells whether the last result has a halo of rows. It has none if it is the whole map,
    unless the map is to be `cropped`, which needs it.
    """

    def __init__(self, op: ConvOp, cropped: bool) -> None:
        self.conv, self.line_buffer, self.cropped = op.conv, op.line_buffer, cropped
        self.halo = True

    def __call__(self, x: Tensor) -> Tensor | None:
        self.halo = self.cropped or not self.line_buffer.is_whole(x)
        return self.line_buffer(x) if self.halo else x


class GLUMBConvOp:
    """The body of a GLUMBConv. The expansion runs before the line buffer, so once for each row."""

    def __init__(self, module: GLUMBConv, height: int) -> None:
        self.inverted, self.depth, self.point = (
            module.conv_inverted,
            module.conv_depth,
            module.conv_point,
        )
        self.line_buffer = LineBuffer(1, height)

    def __call__(self, x: Tensor) -> Tensor | None:
        weight, bias = self.inverted.weight.flatten(1), cast(Tensor, self.inverted.bias)
        hidden = linear_silu(tokens(x).flatten(1, 2), weight, bias).unflatten(1, x.shape[2:])
        whole = self.line_buffer.is_whole(x)
        window = hidden.movedim(-1, 1) if whole else self.line_buffer(hidden.movedim(-1, 1))
        del hidden
        if window is None:
            return None
        depth, point = self.depth, self.point.weight.flatten(1)
        bias = cast(Tensor, depth.bias)
        gated = depthwise_glu(tokens(window), depth.weight, bias, halo=not whole)
        return linear(gated, point).movedim(-1, 1)


class SplitAttention(nn.Module):
    """The weights of a `MultiscaleLinearAttention`, divided into those of q and those of k and v.

    Each of the three has its own slices of the weights, so computing k and v in one sweep and q in
    the next costs no more than all at once.
    """

    def __init__(self, plain: MultiscaleLinearAttention) -> None:
        super().__init__()
        self.head_dim, self.widest = plain.head_dim, widest(plain)
        self.to_out, self.norm_out = plain.to_out, plain.norm_out
        self.queries = RoleWeights(plain, slice(0, 1))
        self.keys_values = RoleWeights(plain, slice(1, 3))


class RoleWeights(nn.Module):
    """The weights of some of q, k and v: `roles` is a slice of the three."""

    def __init__(self, plain: MultiscaleLinearAttention, roles: slice) -> None:
        super().__init__()

        def pick(weight: Tensor) -> Tensor:
            return weight.unflatten(0, (-1, 3, plain.head_dim))[:, roles].flatten(0, 2)

        linears, scales = (plain.to_q, plain.to_k, plain.to_v), plain.to_qkv_multiscale
        whole = torch.cat([linear.weight for linear in linears])
        self.project = nn.Parameter(pick(whole), requires_grad=False)
        self.depths, self.points = nn.ParameterList(), nn.ParameterList()
        for scale in cast(list[MultiscaleAggregation], scales):
            depth, point = pick(scale.proj_in.weight), pick(scale.proj_out.weight)
            self.depths.append(nn.Parameter(lay_out_by_taps(depth), requires_grad=False))
            self.points.append(nn.Parameter(point, requires_grad=False))


class AttentionProjection:
    """Some of q, k and v of multi-scale attention, at every scale one after the other:

    (1, C, rows, W) -> (1, scales·heads·roles·d, rows, W).
    """

    def __init__(self, weights: RoleWeights, height: int) -> None:
        self.project = weights.project
        self.scales = list(zip(weights.depths, weights.points, strict=True))
        self.reach = max((depth.shape[-1] // 2 for depth, _ in self.scales), default=0)
        self.line_buffer = LineBuffer(self.reach, height)

    def __call__(self, x: Tensor) -> Tensor | None:
        projected = linear(tokens(x), self.project).movedim(-1, 1)
        whole = self.line_buffer.is_whole(x)
        window = projected if whole else self.line_buffer(projected)
        del projected
        if window is None:
            return None
        padded, channels = tokens(window), window.shape[1]
        inside = padded if whole else padded[:, self.reach : padded.shape[1] - self.reach]
        if not self.scales:
            return inside.movedim(-1, 1)
        features = inside.new_empty(*inside.shape[:3], channels * (1 + len(self.scales)))
        unscaled, *scaled = features.split(channels, dim=-1)
        unscaled.copy_(inside)
        for (depth, point), out in zip(self.scales, scaled, strict=True):
            aggregate(padded, depth, point, out)
        return features.movedim(-1, 1)


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _pixel_shuffle(x: Tensor) -> Tensor:
    return F.pixel_shuffle(x, 2)


def _pixel_unshuffle(x: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, 2)
