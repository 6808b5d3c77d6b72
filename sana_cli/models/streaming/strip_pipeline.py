"""Sweeps over a map: which strips go through which parts, and what becomes of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sana_cli.kernels.kv_state import kv_state
from sana_cli.kernels.linear import linear
from sana_cli.kernels.linear_attention import attend_tokens
from sana_cli.kernels.rgb import conv_to_rgb, to_rgb8
from sana_cli.models.dc_ae import Downsample, EfficientViTBlock, MultiscaleLinearAttention, Upsample
from sana_cli.models.streaming.layers import Conv, Features, op_of, widest
from sana_cli.models.streaming.ops import Bilinear, Chain, Residual, Size, StripOp, empty, tokens
from sana_cli.models.streaming.subpixel import SubpixelUpsample

MOST_BYTES = 1 << 30  # convolution libraries count elements in 31 bits
REHEARSED = 8  # strips of a sweep on meta: the others take much the same memory


@dataclass(frozen=True)
class Decoded:
    """A picture, and its extremes before rounding, in [0, 1]; both are NaN if any value is."""

    pixels: Tensor  # uint8 (height, width, 3), on the CPU
    low: Tensor
    high: Tensor


class StripPipeline:
    """A map, and the parts that are still to be run over it."""

    def __init__(self, map: Tensor, dtype: torch.dtype, strip_bytes: int) -> None:
        self.map, self.itemsize = map, dtype.itemsize
        self.strip_bytes = min(strip_bytes, MOST_BYTES)
        self.height, self.width = map.shape[2:]  # of what the parts make of the map
        self.ops: list[tuple[StripOp, int]] = []  # and the most rows that each is given at once
        self.owned = False  # the map may be written over

    def through(self, module: nn.Module, shortcut: StripOp | None = None) -> None:
        """Add the part of a module; a shortcut is a function of its input to add to its output."""
        if isinstance(module, EfficientViTBlock):
            self._attend(module.attn)
            module = module.conv_out
        part = op_of(module, self.height)
        self.add(Residual(part, shortcut) if shortcut else part, widest(module))
        if isinstance(module, Upsample | SubpixelUpsample):
            self.height, self.width = 2 * self.height, 2 * self.width
        if isinstance(module, Downsample):
            self.height, self.width = self.height // 2, self.width // 2

    def add(self, part: StripOp, channels: int) -> None:
        """Add a part whose widest tensor has so many channels at the size of its input."""
        rows = self.strip_bytes // (channels * self.width * self.itemsize)
        self.ops.append((part, max(1, rows)))

    def materialise(self) -> Tensor:
        """Run the parts. The map becomes what they make of it, in its own memory if that fits."""
        if self.ops:
            target, at = (self.map if self.owned else None), 0
            for strip in self._strips():
                shape = (1, strip.shape[1], self.height, self.width)
                if target is None or target.shape != shape:
                    target = empty(strip, shape)
                # Safe in place: no part finishes a row before it has read or copied it.
                target[:, :, at : at + strip.shape[2]] = strip
                at += strip.shape[2]
            self.map, self.owned, self.ops = cast(Tensor, target), True, []
        return self.map

    def draw(self, resized: Size | None, size: Size | None) -> Decoded:
        """Run the parts and put what they make into a picture, strip by strip."""
        if resized and resized != (self.height, self.width):
            self.add(Bilinear((self.height, self.width), resized), 3)
            self.height, self.width = resized
        last, rows = self.ops[-1]
        head = None
        if not resized and isinstance(last, Conv):  # it goes along with making levels
            head, self.ops[-1] = last.conv, (last.window, rows)
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
                    window = tokens(strip)[:, first - at : stop - at + 2]
                    made = conv_to_rgb(window, head.weight, cast(Tensor, head.bias), left, width)
                else:
                    made = to_rgb8(strip[..., first - at : stop - at, left : left + width])
                pixels[first:stop] = made[0]
                low, high = torch.minimum(low, made[1]), torch.maximum(high, made[2])
            at += rows
        return Decoded(pixels, low, high)

    def _attend(self, attention: MultiscaleLinearAttention) -> None:
        """Gather the sums over the whole map; what each position makes of them becomes a part."""
        self.materialise()
        self.add(Features(attention, slice(1, 3), self.height), widest(attention))
        state: Tensor | None = None
        for strip in self._strips():
            sums = kv_state(tokens(strip).flatten(1, 2), attention.head_dim)
            state = sums if state is None else state.add_(sums)
        whole = cast(Tensor, state)

        def apply(strip: Tensor) -> Tensor:
            out = attend_tokens(tokens(strip).flatten(1, 2), whole)
            out = linear(out, attention.to_out.weight).unflatten(1, strip.shape[2:])
            return out.movedim(-1, 1)

        queries = Features(attention, slice(0, 1), self.height)
        self.ops.clear()
        body = Chain(queries, apply)
        self.add(Residual(body, norm=attention.norm_out), widest(attention))

    def _strips(self) -> Iterator[Tensor]:
        """What the parts make of the map, top to bottom, depth first: the latest strip goes on."""
        waiting, made = [(self.map, 0)], 0
        while waiting:
            strip, at = waiting.pop()
            if at == len(self.ops):
                yield strip
                made += 1
                if strip.is_meta and made == REHEARSED:
                    return
                continue
            part, most = self.ops[at]
            rows = strip.shape[2]
            if rows > most:
                rows = -(-rows // -(-rows // most))  # in equal parts
                waiting.append((strip[:, :, rows:], at))
            out = part(strip[:, :, :rows])
            if out is not None:
                waiting.append((out, at + 1))
            del strip, out
