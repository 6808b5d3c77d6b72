"""Runs strip ops over a feature map: how it is cut into strips, and where the results go."""

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from sana_cli.kernels.convolution import new_map
from sana_cli.kernels.kv_state import kv_state
from sana_cli.kernels.linear import linear
from sana_cli.kernels.linear_attention import attend_tokens
from sana_cli.kernels.rgb import conv_to_rgb, to_rgb8
from sana_cli.models.dc_ae import Downsample, EfficientViTBlock, MultiscaleLinearAttention, Upsample
from sana_cli.models.streaming.layers import (
    AttentionProjection,
    ConvInput,
    ConvOp,
    SplitAttention,
    op_of,
    widest,
)
from sana_cli.models.streaming.ops import Bilinear, Chain, Residual, Size, StripOp, tokens
from sana_cli.models.streaming.subpixel import SubpixelUpsample

MAX_BYTES = 1 << 30  # convolution libraries index elements with 31 bits


class Decoded(NamedTuple):
    """An image, and its extreme values before rounding, in [0, 1]: both NaN if any value is."""

    pixels: Tensor  # uint8 (height, width, 3)
    low: Tensor
    high: Tensor

    def on_cpu(self) -> "Decoded":
        """Copy the pixels to the CPU, once the device has made them. There are none on `meta`."""
        return self if self.pixels.is_meta else self._replace(pixels=self.pixels.cpu())


class StripPipeline:
    """A feature map, and the ops that have yet to run over it."""

    def __init__(
        self, map: Tensor, dtype: torch.dtype, strip_bytes: int, most_strips: int | None = None
    ) -> None:
        self.map, self.itemsize = map, dtype.itemsize
        self.most_strips = most_strips  # of a sweep, which then stops unfinished
        self.strip_bytes = min(strip_bytes, MAX_BYTES)
        self.height, self.width = map.shape[2:]  # of the output of the ops
        self.ops: list[tuple[StripOp, int]] = []  # each with the most rows it is given at once
        self.owned = False  # whether the map may be overwritten
        # Whether a CUDA graph can hold what has run: a single strip, and nothing from the CPU.
        self.capturable = True

    def through(self, module: nn.Module, shortcut: StripOp | None = None) -> None:
        """Add the op of a module; `shortcut(input)` is added to its output."""
        if isinstance(module, EfficientViTBlock):
            attention = module.attn
            self._attend(
                SplitAttention(attention)
                if isinstance(attention, MultiscaleLinearAttention)
                else cast(SplitAttention, attention)
            )
            module = module.conv_out
        op = op_of(module, self.height)
        self.add(Residual(op, shortcut) if shortcut else op, widest(module))
        if isinstance(module, Upsample | SubpixelUpsample):
            self.height, self.width = 2 * self.height, 2 * self.width
        if isinstance(module, Downsample):
            self.height, self.width = self.height // 2, self.width // 2

    def add(self, op: StripOp, channels: int) -> None:
        """Add an op whose widest tensor has `channels` channels per position of its input."""
        rows = self.strip_bytes // (channels * self.width * self.itemsize)
        self.ops.append((op, max(1, rows)))

    def materialise(self) -> Tensor:
        """Run the ops and return their output, which becomes the map, in its memory if it fits."""
        if self.ops:
            target, start = (self.map if self.owned else None), 0
            for strip in self._strips():
                shape = (1, strip.shape[1], self.height, self.width)
                if strip.shape == shape and strip is not self.map:  # the whole map at once
                    target = strip
                    break
                if target is None or target.shape != shape:
                    target = new_map(strip, shape)
                # Safe in place: no op finishes a row before it has read or copied it.
                target[:, :, start : start + strip.shape[2]] = strip
                start += strip.shape[2]
            self.map, self.owned, self.ops = cast(Tensor, target), True, []
        return self.map

    def to_image(self, resized: Size | None, size: Size | None) -> Decoded:
        """Run the ops and write their output into an image, strip by strip.

        The output is resized to `resized` and then cropped about its centre to `size`.
        """
        if resized and resized != (self.height, self.width):
            self.capturable = False  # what `Bilinear` looks up is on the CPU
            self.add(Bilinear((self.height, self.width), resized), 3)
            self.height, self.width = resized
        height, width = size or (self.height, self.width)
        left, top = (self.width - width) // 2, -((self.height - height) // 2)
        last, rows = self.ops[-1]
        fused = None
        if not resized and isinstance(last, ConvOp):  # with the rounding to 8 bits
            fused = ConvInput(last, cropped=height < self.height)
            self.ops[-1] = fused, rows
        pixels = torch.empty((height, width, 3), dtype=torch.uint8, device=self.map.device)
        lows, highs = [], []
        for strip in self._strips():
            halo = fused is not None and fused.halo
            rows = strip.shape[2] - 2 * halo
            first, stop = max(top, 0), min(top + rows, height)
            if first < stop:
                window = strip[:, :, first - top : stop - top + 2 * halo]
                if fused:
                    weight, bias = fused.conv.weight, cast(Tensor, fused.conv.bias)
                    made = conv_to_rgb(tokens(window), weight, bias, left, width, halo)
                else:
                    made = to_rgb8(window[..., left : left + width])
                pixels[first:stop] = made[0]
                lows.append(made[1])
                highs.append(made[2])
            top += rows
        return Decoded(pixels, torch.stack(lows).amin(), torch.stack(highs).amax())

    def _attend(self, attention: SplitAttention) -> None:
        """Sum keys and values over the whole map, then add an op that attends to the sums."""
        self.materialise()
        self.add(AttentionProjection(attention.keys_values, self.height), attention.widest)
        state: Tensor | None = None
        for strip in self._strips():
            sums = kv_state(tokens(strip).flatten(1, 2), attention.head_dim)
            state = sums if state is None else state.add_(sums)
        total = cast(Tensor, state)

        def attend(strip: Tensor) -> Tensor:
            out = attend_tokens(tokens(strip).flatten(1, 2), total)
            out = linear(out, attention.to_out.weight).unflatten(1, strip.shape[2:])
            return out.movedim(-1, 1)

        queries = AttentionProjection(attention.queries, self.height)
        self.ops.clear()
        body = Chain(queries, attend)
        self.add(Residual(body, norm=attention.norm_out), attention.widest)

    def _strips(self) -> Iterator[Tensor]:
        """Yield the output of the ops, top to bottom.

        Depth first: the newest strip goes through the remaining ops before any other is computed.
        """
        pending, yielded = [(self.map, 0)], 0
        while pending:
            strip, i = pending.pop()
            if i == len(self.ops):
                yield strip
                yielded += 1
                if yielded == self.most_strips:
                    return
                continue
            op, most = self.ops[i]
            rows = strip.shape[2]
            if rows > most:
                self.capturable = False
                rows = -(-rows // -(-rows // most))  # split evenly
                pending.append((strip[:, :, rows:], i))
            out = op(strip[:, :, :rows])
            if out is not None:
                pending.append((out, i + 1))
            del strip, out
