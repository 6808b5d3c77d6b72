"""The layers of DC-AE as parts: what each makes of a strip, and how wide it is inside."""

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from sana_cli.models.streaming.ops import Chain, Pairs, Residual, StripOp, Window, repeat, tokens
from sana_cli.models.streaming.subpixel import SubpixelUpsample


def op_of(module: nn.Module, height: int) -> StripOp:
    """What a module does, as a part for a map of `height` rows."""
    if isinstance(module, nn.Conv2d):
        return Conv(module, height)
    if isinstance(module, ResBlock):
        body = Chain(Conv(module.conv1, height), Conv(module.conv2, height, silu=True))
        return Residual(body, norm=module.norm)
    if isinstance(module, GLUMBConv):
        return Residual(GLUMBConvOp(module, height), norm=module.norm)
    if isinstance(module, SubpixelUpsample):
        return Chain(Window(1, height, sides=1), module.rows)
    if isinstance(module, Upsample):
        if module.interpolate:
            body = Chain(_nearest, Conv(module.conv, 2 * height), Pairs())
        else:
            body = Chain(Conv(module.conv, height), _unfold)
        spread = Chain(repeat(module.repeats), _unfold)
        return Residual(body, spread, scale=2) if module.shortcut else body
    if isinstance(module, Downsample):
        body = Chain(Conv(module.conv, height))
        if module.unshuffle:
            body = Chain(body, Pairs(), _fold)
        mean = Chain(_fold, partial(group_mean, groups=module.out))
        return Chain(Pairs(), Residual(body, mean, scale=0.5)) if module.shortcut else body
    raise TypeError(f"strips do not know {type(module).__name__}")


def widest(module: nn.Module) -> int:
    """Channels of the widest tensor in a module, per position of its input."""
    if isinstance(module, SubpixelUpsample):
        return 4 * module.out
    if isinstance(module, Upsample) and module.interpolate:
        return 4 * max(module.conv.in_channels, module.conv.out_channels)
    return max(p.shape[0] for p in module.parameters() if p.ndim > 1)


class Conv:
    """A convolution as its module pads it: with zeros beyond the borders of the whole map.

    With `silu`, of what SiLU makes of the strips.
    """

    def __init__(self, conv: nn.Conv2d, height: int, silu: bool = False) -> None:
        self.conv = conv
        reach, stride = cast(tuple[int, int], conv.padding)[0], conv.stride[0]
        self.padding = (0, reach)
        self.window = Window(reach, height, stride, silu=silu)

    def __call__(self, x: Tensor) -> Tensor | None:
        window, conv = self.window(x), self.conv
        if window is None:
            return None
        return F.conv2d(window, conv.weight, conv.bias, conv.stride, self.padding, 1, conv.groups)


class GLUMBConvOp:
    """The body of a GLUMBConv. The expansion comes before the line buffer, as it is dear."""

    def __init__(self, module: GLUMBConv, height: int) -> None:
        self.inverted, self.depth, self.point = (
            module.conv_inverted,
            module.conv_depth,
            module.conv_point,
        )
        self.window = Window(1, height)

    def __call__(self, x: Tensor) -> Tensor | None:
        weight, bias = self.inverted.weight.flatten(1), cast(Tensor, self.inverted.bias)
        hidden = linear_silu(tokens(x).flatten(1, 2), weight, bias).unflatten(1, x.shape[2:])
        window = self.window(hidden.movedim(-1, 1))
        del hidden
        if window is None:
            return None
        depth, point = self.depth, self.point.weight.flatten(1)
        gated = depthwise_glu(tokens(window), depth.weight, cast(Tensor, depth.bias), halo=True)
        return linear(gated, point).movedim(-1, 1)


class Features:
    """Some of the roles (0 q, 1 k, 2 v) of the heads of multi-scale attention, by strips.

    (1, C, rows, W) -> (1, heads·roles·d, rows, W). Each role is computed from its own slices of
    the weights, so taking k and v in one sweep and q in the next costs what all in one would.
    """

    def __init__(self, attention: MultiscaleLinearAttention, roles: slice, height: int) -> None:
        def pick(weight: Tensor) -> Tensor:
            return weight.unflatten(0, (-1, 3, attention.head_dim))[:, roles].flatten(0, 2)

        linears = (attention.to_q, attention.to_k, attention.to_v)
        self.project = pick(torch.cat([linear.weight for linear in linears]))
        self.scales = [
            (pick(scale.proj_in.weight), pick(scale.proj_out.weight))
            for scale in cast(list[MultiscaleAggregation], attention.to_qkv_multiscale)
        ]
        self.reach = max((depth.shape[-1] // 2 for depth, _ in self.scales), default=0)
        self.window = Window(self.reach, height)

    def __call__(self, x: Tensor) -> Tensor | None:
        projected = linear(tokens(x), self.project).movedim(-1, 1)
        window = self.window(projected)
        del projected
        if window is None:
            return None
        near, channels = tokens(window), window.shape[1]
        own = near[:, self.reach : near.shape[1] - self.reach]
        if not self.scales:
            return own.movedim(-1, 1)
        features = own.new_empty(*own.shape[:3], channels * (1 + len(self.scales)))
        plain, *scaled = features.split(channels, dim=-1)
        plain.copy_(own)
        for (depth, point), out in zip(self.scales, scaled, strict=True):
            aggregate(near, depth, point, out)
        return features.movedim(-1, 1)


def _nearest(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _unfold(x: Tensor) -> Tensor:
    return F.pixel_shuffle(x, 2)


def _fold(x: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, 2)
