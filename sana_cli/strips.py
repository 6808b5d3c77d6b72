"""DC-AE in bounded memory: the picture of the plain network, strip after strip, without seams.

A map goes through the convolutions as horizontal strips. Each convolution keeps the last rows it
was given (a line buffer), so the next strip goes on where the last one ended: nothing is computed
twice, nothing is blended, and zeros stand beyond the true borders only. Attention needs sums over
the whole map; they are additive, so one sweep gathers them and the next applies them, writing over
the map it reads. Held at once are one map at the resolution of the attention stages, a few strips,
and the uint8 picture.

Strips are (1, C, rows, W), channels-last, top to bottom. A *part* is a function from a strip to
the rows that can be finished with it, or None; it keeps what it needs of earlier strips.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_cli.dc_ae import (
    ChannelRMSNorm,
    Decoder,
    Downsample,
    EfficientViTBlock,
    Encoder,
    GLUMBConv,
    MultiscaleAggregation,
    MultiscaleLinearAttention,
    ResBlock,
    Upsample,
    group_mean,
)
from sana_cli.kernels.depthwise_glu import depthwise_glu
from sana_cli.kernels.kv_state import kv_state
from sana_cli.kernels.linear import linear
from sana_cli.kernels.linear_attention import attend_tokens
from sana_cli.kernels.multiscale import aggregate
from sana_cli.kernels.picture import levels, picture
from sana_cli.kernels.projection import expand
from sana_cli.kernels.rms_norm import rms_norm
from sana_cli.memory import PeakMemory

Part = Callable[[Tensor], Tensor | None]
Size = tuple[int, int]  # (height, width)
STRIP_BYTES = 16 << 20
MOST_BYTES = 1 << 30  # convolution libraries count elements in 31 bits
REHEARSED = 8  # strips of a sweep on meta: the others take much the same memory


@dataclass(frozen=True)
class Decoded:
    """A picture, and its extremes before rounding, in [0, 1]; both are NaN if any value is."""

    pixels: Tensor  # uint8 (height, width, 3), on the CPU
    low: Tensor
    high: Tensor


@torch.inference_mode()
def decode(
    decoder: Decoder,
    latent: Tensor,
    *,
    resized: Size | None = None,
    size: Size | None = None,
    strip_bytes: int = STRIP_BYTES,
) -> Decoded:
    """(1, 32, h, w), unscaled -> the picture `decoder(latent)`, from [-1, 1] to 0..255.

    It is resized to `resized` first, bilinearly and without antialiasing, then cropped about its
    centre to `size`. `strip_bytes` is roughly the size of the widest tensor of a strip.
    """
    return decoding(decoder, latent, strip_bytes).draw(resized, size)


def decoding(decoder: Decoder, latent: Tensor, strip_bytes: int) -> "Sweep":
    """The sweep whose `settle()` is the float picture (1, 3, H, W) and whose `draw` is `decode`."""
    dtype = decoder.norm_out.weight.dtype
    sweep = Sweep(latent.to(dtype, memory_format=torch.channels_last), dtype, strip_bytes)
    sweep.through(decoder.conv_in, _repeat(decoder.repeats) if decoder.shortcut else None)
    for stage in reversed(decoder.up_blocks):
        for block in cast(nn.Sequential, stage):
            sweep.through(block)
    width = decoder.norm_out.weight.numel()
    sweep.add(partial(_normalise, decoder.norm_out, activation=decoder.activation), width)
    sweep.through(decoder.conv_out)
    return sweep


@torch.inference_mode()
def encode(encoder: Encoder, pixels: Tensor, *, strip_bytes: int = STRIP_BYTES) -> Tensor:
    """uint8 (H, W, 3), sides multiples of 32 -> (1, 32, h, w), unscaled.

    The latent `encoder(image)` of the image in [-1, 1], in the dtype and on the device of the
    encoder. The pixels may stay on the CPU: they are moved and made real numbers by the strip.
    """
    weight = encoder.conv_out.weight
    sweep = Sweep(pixels.permute(2, 0, 1)[None], weight.dtype, strip_bytes)
    sweep.add(lambda x: x.to(weight.device).float().div_(127.5).sub_(1).to(weight.dtype), 3)
    sweep.through(encoder.conv_in)
    for stage in encoder.down_blocks:
        for block in cast(nn.Sequential, stage):
            sweep.through(block)
    mean = partial(group_mean, groups=encoder.conv_out.out_channels)
    sweep.through(encoder.conv_out, mean if encoder.shortcut else None)
    return sweep.settle()


def rehearse(
    network: Decoder | Encoder,
    latent_size: Size,
    *,
    resized: Size | None = None,
    size: Size | None = None,
    strip_bytes: int = STRIP_BYTES,
) -> int:
    """The peak bytes above the weights of `decode` or `encode`, without computing anything.

    The network is on the meta device, of the dtype and in the state (folded or not) that will
    run; its sweeps are run there for a few strips each. Included are the picture, 3·H·W bytes,
    which is always on the CPU, and not what libraries allocate inside one operation.
    """
    height, width = latent_size
    with PeakMemory() as memory:
        if isinstance(network, Decoder):
            channels = network.conv_in.in_channels
            latent = torch.empty((1, channels, height, width), device="meta")
            decode(network, latent, resized=resized, size=size, strip_bytes=strip_bytes)
        else:
            cell = 2 ** (len(network.down_blocks) - 1)
            shape = (height * cell, width * cell, 3)
            pixels = torch.empty(shape, dtype=torch.uint8, device="meta")
            encode(network, pixels, strip_bytes=strip_bytes)
    return memory.peak


class Sweep:
    """A map, and the parts that are still to be run over it."""

    def __init__(self, map: Tensor, dtype: torch.dtype, strip_bytes: int) -> None:
        self.map, self.itemsize = map, dtype.itemsize
        self.strip_bytes = min(strip_bytes, MOST_BYTES)
        self.height, self.width = map.shape[2:]  # of what the parts make of the map
        self.parts: list[tuple[Part, int]] = []  # and the most rows that each is given at once
        self.owned = False  # the map may be written over

    def through(self, module: nn.Module, shortcut: Part | None = None) -> None:
        """Add the part of a module; a shortcut is a function of its input to add to its output."""
        if isinstance(module, EfficientViTBlock):
            self._attend(module.attn)
            module = module.conv_out
        part = _part(module, self.height)
        self.add(Residual(part, shortcut) if shortcut else part, _widest(module))
        if isinstance(module, Upsample | SubpixelUpsample):
            self.height, self.width = 2 * self.height, 2 * self.width
        if isinstance(module, Downsample):
            self.height, self.width = self.height // 2, self.width // 2

    def add(self, part: Part, channels: int) -> None:
        """Add a part whose widest tensor has so many channels at the size of its input."""
        rows = self.strip_bytes // (channels * self.width * self.itemsize)
        self.parts.append((part, max(1, rows)))

    def settle(self) -> Tensor:
        """Run the parts. The map becomes what they make of it, in its own memory if that fits."""
        if self.parts:
            target, at = (self.map if self.owned else None), 0
            for strip in self._strips():
                shape = (1, strip.shape[1], self.height, self.width)
                if target is None or target.shape != shape:
                    target = _empty(strip, shape)
                # Safe in place: no part finishes a row before it has read or copied it.
                target[:, :, at : at + strip.shape[2]] = strip
                at += strip.shape[2]
            self.map, self.owned, self.parts = cast(Tensor, target), True, []
        return self.map

    def draw(self, resized: Size | None, size: Size | None) -> Decoded:
        """Run the parts and put what they make into a picture, strip by strip."""
        if resized and resized != (self.height, self.width):
            self.add(Bilinear((self.height, self.width), resized), 3)
            self.height, self.width = resized
        last, rows = self.parts[-1]
        head = None
        if not resized and isinstance(last, Conv):  # it goes along with making levels
            head, self.parts[-1] = last.conv, (last.window, rows)
        height, width = size or (self.height, self.width)
        left, at = (self.width - width) // 2, -((self.height - height) // 2)
        home = "meta" if self.map.is_meta else "cpu"
        pixels = torch.empty((height, width, 3), dtype=torch.uint8, device=home)
        low = torch.ones((), device=self.map.device)
        high = torch.zeros((), device=self.map.device)
        for strip in self._strips():
            rows = strip.shape[2] - (2 if head else 0)
            first, stop = max(at, 0), min(at + rows, height)
            if first < stop:
                if head:
                    window = _tokens(strip)[:, first - at : stop - at + 2]
                    made = picture(window, head.weight, cast(Tensor, head.bias), left, width)
                else:
                    made = levels(strip[..., first - at : stop - at, left : left + width])
                pixels[first:stop] = made[0]
                low, high = torch.minimum(low, made[1]), torch.maximum(high, made[2])
            at += rows
        return Decoded(pixels, low, high)

    def _attend(self, attention: MultiscaleLinearAttention) -> None:
        """Gather the sums over the whole map; what each position makes of them becomes a part."""
        self.settle()
        self.add(Features(attention, slice(1, 3), self.height), _widest(attention))
        state: Tensor | None = None
        for strip in self._strips():
            sums = kv_state(_tokens(strip).flatten(1, 2), attention.head_dim)
            state = sums if state is None else state.add_(sums)
        whole = cast(Tensor, state)

        def apply(strip: Tensor) -> Tensor:
            out = attend_tokens(_tokens(strip).flatten(1, 2), whole)
            out = linear(out, attention.to_out.weight).unflatten(1, strip.shape[2:])
            return out.movedim(-1, 1)

        queries = Features(attention, slice(0, 1), self.height)
        self.parts.clear()
        body = Chain(queries, apply)
        self.add(Residual(body, norm=attention.norm_out), _widest(attention))

    def _strips(self) -> Iterator[Tensor]:
        """What the parts make of the map, top to bottom, depth first: the latest strip goes on."""
        waiting, made = [(self.map, 0)], 0
        while waiting:
            strip, at = waiting.pop()
            if at == len(self.parts):
                yield strip
                made += 1
                if strip.is_meta and made == REHEARSED:
                    return
                continue
            part, most = self.parts[at]
            rows = strip.shape[2]
            if rows > most:
                rows = -(-rows // -(-rows // most))  # in equal parts
                waiting.append((strip[:, :, rows:], at))
            out = part(strip[:, :, :rows])
            if out is not None:
                waiting.append((out, at + 1))
            del strip, out


def _widest(module: nn.Module) -> int:
    """Channels of the widest tensor in a module, per position of its input."""
    if isinstance(module, SubpixelUpsample):
        return 4 * module.out
    if isinstance(module, Upsample) and module.interpolate:
        return 4 * max(module.conv.in_channels, module.conv.out_channels)
    return max(p.shape[0] for p in module.parameters() if p.ndim > 1)


# --- parts -------------------------------------------------------------------------------------


def _part(module: nn.Module, height: int) -> Part:
    """What a module does, as a part for a map of `height` rows."""
    if isinstance(module, nn.Conv2d):
        return Conv(module, height)
    if isinstance(module, ResBlock):
        body = Chain(Conv(module.conv1, height), Conv(module.conv2, height, silu=True))
        return Residual(body, norm=module.norm)
    if isinstance(module, GLUMBConv):
        return Residual(MixFFN(module, height), norm=module.norm)
    if isinstance(module, SubpixelUpsample):
        return Chain(Window(1, height, sides=1), module.rows)
    if isinstance(module, Upsample):
        if module.interpolate:
            body = Chain(_nearest, Conv(module.conv, 2 * height), Pairs())
        else:
            body = Chain(Conv(module.conv, height), _unfold)
        spread = Chain(_repeat(module.repeats), _unfold)
        return Residual(body, spread, scale=2) if module.shortcut else body
    if isinstance(module, Downsample):
        body = Chain(Conv(module.conv, height))
        if module.unshuffle:
            body = Chain(body, Pairs(), _fold)
        mean = Chain(_fold, partial(group_mean, groups=module.out))
        return Chain(Pairs(), Residual(body, mean, scale=0.5)) if module.shortcut else body
    raise TypeError(f"strips.py does not know {type(module).__name__}")


class Chain:
    """Parts one after the other."""

    def __init__(self, *parts: Part) -> None:
        self.parts = parts

    def __call__(self, x: Tensor) -> Tensor | None:
        strip: Tensor | None = x
        del x
        for part in self.parts:
            if strip is None:
                break
            strip = part(strip)
        return strip


class Residual:
    """norm(body(x)) + shortcut(x), where the body lags behind and makes `scale` rows of each."""

    def __init__(
        self,
        body: Part,
        shortcut: Part | None = None,
        *,
        scale: float = 1,
        norm: ChannelRMSNorm | None = None,
    ) -> None:
        self.body, self.shortcut, self.scale, self.norm = body, shortcut, scale, norm
        self.waiting = Delay()

    def __call__(self, x: Tensor) -> Tensor | None:
        self.waiting.put(x)
        y = self.body(x)
        if y is None:
            return None
        at = 0
        for piece in self.waiting.take(int(y.shape[2] / self.scale)):
            more = self.shortcut(piece) if self.shortcut else piece
            assert more is not None
            rows = y[:, :, at : at + more.shape[2]]
            if self.norm:
                _normalise(self.norm, rows, more)
            else:
                rows += more
            at += more.shape[2]
        return y


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


class MixFFN:
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
        hidden = expand(_tokens(x).flatten(1, 2), weight, bias).unflatten(1, x.shape[2:])
        window = self.window(hidden.movedim(-1, 1))
        del hidden
        if window is None:
            return None
        depth, point = self.depth, self.point.weight.flatten(1)
        gated = depthwise_glu(_tokens(window), depth.weight, cast(Tensor, depth.bias), rim=True)
        return linear(gated, point).movedim(-1, 1)


class Window:
    """A line buffer: strips -> the rows that a kernel of 2·reach + 1 rows needs for the next ones.

    Zeros stand above the first and below the last of `height` rows, and in `sides` columns left
    and right. With `silu` the rows go through SiLU as they enter.
    """

    def __init__(
        self, reach: int, height: int, stride: int = 1, sides: int = 0, silu: bool = False
    ) -> None:
        self.reach, self.missing, self.stride, self.sides = reach, height, stride, sides
        self.silu = silu
        self.kept: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor | None:
        self.missing -= x.shape[2]
        below = 0 if self.missing else self.reach
        above = self.reach if self.kept is None else self.kept.shape[2]
        if above + below == 0:
            return F.silu(x, inplace=True) if self.silu else x
        rows = above + x.shape[2] + below
        width = x.shape[3]
        window = _empty(x, (1, x.shape[1], rows, width + 2 * self.sides))
        window[:, :, :above] = 0 if self.kept is None else self.kept
        inside = window[:, :, above : rows - below]
        target = inside[..., self.sides : self.sides + width]
        if self.silu:
            torch.ops.aten.silu.out(x, out=target)
        else:
            target.copy_(x)
        if self.sides:
            inside[..., : self.sides] = inside[..., self.sides + width :] = 0
        window[:, :, rows - below :] = 0
        done = max(0, (rows - 2 * self.reach - 1) // self.stride + 1)
        self.kept = window[:, :, done * self.stride :].clone()
        return window if done else None


class Delay:
    """Rows that wait until they are asked for."""

    def __init__(self) -> None:
        self.pieces: deque[Tensor] = deque()

    def put(self, x: Tensor) -> None:
        self.pieces.append(x)

    def take(self, rows: int) -> Iterator[Tensor]:
        """The next `rows` rows, in pieces. What then is left of a strip is copied, to free it."""
        while rows:
            piece = self.pieces.popleft()
            if piece.shape[2] > rows:
                self.pieces.appendleft(piece[:, :, rows:].clone())
                piece = piece[:, :, :rows]
            rows -= piece.shape[2]
            yield piece


class Pairs:
    """The same rows in strips of even height."""

    def __init__(self) -> None:
        self.odd: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor | None:
        if self.odd is not None:
            x = torch.cat([self.odd, x], dim=2)
        even = x.shape[2] // 2 * 2
        self.odd = x[:, :, even:].clone() if even < x.shape[2] else None
        return x[:, :, :even] if even else None


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
        projected = linear(_tokens(x), self.project).movedim(-1, 1)
        window = self.window(projected)
        del projected
        if window is None:
            return None
        near, channels = _tokens(window), window.shape[1]
        own = near[:, self.reach : near.shape[1] - self.reach]
        if not self.scales:
            return own.movedim(-1, 1)
        features = own.new_empty(*own.shape[:3], channels * (1 + len(self.scales)))
        plain, *scaled = features.split(channels, dim=-1)
        plain.copy_(own)
        for (depth, point), out in zip(self.scales, scaled, strict=True):
            aggregate(near, depth, point, out)
        return features.movedim(-1, 1)


class Bilinear:
    """Rows of the map resized to `size`, as F.interpolate does without antialiasing, in float32."""

    def __init__(self, whole: Size, size: Size) -> None:
        self.width = size[1]
        position = (torch.arange(size[0]) + 0.5) * (whole[0] / size[0]) - 0.5
        position = position.clamp(0, whole[0] - 1)
        self.upper = position.floor().long()
        self.lower = (self.upper + 1).clamp(max=whole[0] - 1)
        self.weight = (position - self.upper).float()
        self.done = self.first = 0  # rows made; the first row that is kept
        self.kept: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor | None:
        x = F.interpolate(x.float(), size=(x.shape[2], self.width), mode="bilinear")
        if self.kept is not None:
            x = torch.cat([self.kept, x], dim=2)
        start, stop = self.done, int((self.lower < self.first + x.shape[2]).sum())
        self.done = stop
        out = None
        if start < stop:
            upper, lower = (r[start:stop] - self.first for r in (self.upper, self.lower))
            weight = self.weight[start:stop, None].to(x.device)
            out = torch.lerp(
                x.index_select(2, upper.to(x.device)), x.index_select(2, lower.to(x.device)), weight
            )
        if stop < len(self.upper):
            keep = min(int(self.upper[stop]) - self.first, x.shape[2] - 1)
            self.kept, self.first = x[:, :, keep:].clone(), self.first + keep
        return out


class SubpixelUpsample(nn.Module):
    """An `Upsample` that never makes the doubled map: four 2x2 convolutions of the small one.

    Doubled by repetition, a row is its own neighbour: of the three rows under a 3x3 kernel two
    are the same, the lower two above an even row and the upper two above an odd one. The taps
    that meet the same row, and likewise column, are added up once, in float32. 16 products a
    pixel of the small map take the place of 36.
    """

    def __init__(self, plain: Upsample) -> None:
        super().__init__()
        conv = plain.conv
        taps, dtype = conv.weight.float(), conv.weight.dtype
        rows = _merged(taps, 2)
        upper, lower = (torch.cat(_merged(row, 3)).to(dtype) for row in rows)
        self.upper = nn.Parameter(upper, requires_grad=False)  # (2·out, in, 2, 2): even rows
        self.lower = nn.Parameter(lower, requires_grad=False)
        self.bias = nn.Parameter(cast(Tensor, conv.bias).repeat(2), requires_grad=False)
        self.out, self.repeats, self.shortcut = conv.out_channels, plain.repeats, plain.shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(F.pad(x, (1, 1, 1, 1)))

    def rows(self, window: Tensor) -> Tensor:
        """(1, in, rows + 2, W + 2), its rim for context -> (1, out, 2·rows, 2·W)."""
        x, out = window[:, :, 1:-1, 1:-1], self.out
        height, width = x.shape[2:]
        y = _empty(x, (1, out, 2 * height, 2 * width))
        for i, weight in enumerate((self.upper, self.lower)):
            z = F.conv2d(window[:, :, i : i + height + 1], weight, self.bias)
            for j in (0, 1):
                pixels = z[:, j * out : (j + 1) * out, :, j : j + width]
                target = y[:, :, i::2, j::2]
                if self.shortcut:
                    torch.add(pixels, self._landing(x, 2 * i + j), out=target)
                else:
                    target.copy_(pixels)
        return y

    def _landing(self, x: Tensor, place: int) -> Tensor:
        """Of the repeated channels of x unfolded to 2x2 pixels, those that land on one of them."""
        if 4 % self.repeats == 0:
            return x[:, place // self.repeats :: 4 // self.repeats]
        channels = (torch.arange(self.out, device=x.device) * 4 + place) // self.repeats
        return x.index_select(1, channels)


def fold(decoder: Decoder) -> None:
    """Put a SubpixelUpsample in the place of each interpolating Upsample: the same, but cheaper.

    Do it before the weights are narrowed: sums of rounded taps, rounded again, are less exact.
    """
    for parent in [decoder, *cast(list[nn.Module], list(decoder.up_blocks))]:
        for name, child in parent.named_children():
            if isinstance(child, Upsample) and child.interpolate:
                setattr(parent, name, SubpixelUpsample(child))


def _merged(taps: Tensor, dim: int) -> list[Tensor]:
    """Three taps along `dim` -> the two of an even row and the two of an odd one."""
    a, b, c = taps.unbind(dim)
    return [torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)]


def _normalise(
    norm: ChannelRMSNorm,
    x: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """act(norm(x)) + residual in the memory of x, with the roundings of the module."""
    beside = None if residual is None else _tokens(residual)
    rms_norm(_tokens(x), norm.weight, norm.bias, norm.eps, beside, activation)
    return x


def _tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h, w, C)."""
    return x.movedim(1, -1)


def _nearest(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _unfold(x: Tensor) -> Tensor:
    return F.pixel_shuffle(x, 2)


def _fold(x: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, 2)


def _repeat(times: int) -> Part:
    return partial(torch.repeat_interleave, repeats=times, dim=1)


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )
