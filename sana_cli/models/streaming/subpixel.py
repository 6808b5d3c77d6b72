"""The decoder's upsampling without the upsampled input: the same pixels in fewer products."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_cli.kernels.convolution import convolve
from sana_cli.models.dc_ae import Decoder, Upsample
from sana_cli.models.streaming.ops import empty


class SubpixelUpsample(nn.Module):
    """An interpolating `Upsample` as four 2x2 convolutions of its input.

    Nearest-neighbour upsampling repeats every row, so two of the three rows under a 3x3 kernel are
    equal: the lower two for an even output row, the upper two for an odd one. Taps that fall on
    the same row, and likewise on the same column, are added up once, in float32. That takes 16
    products per input pixel instead of 36.
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
        """(1, in, rows + 2, W + 2), with a halo of one pixel -> (1, out, 2·rows, 2·W)."""
        x, out = window[:, :, 1:-1, 1:-1], self.out
        height, width = x.shape[2:]
        y = empty(x, (1, out, 2 * height, 2 * width))
        for i, weight in enumerate((self.upper, self.lower)):
            z = convolve(window[:, :, i : i + height + 1], weight, self.bias)
            for j in (0, 1):
                pixels = z[:, j * out : (j + 1) * out, :, j : j + width]
                target = y[:, :, i::2, j::2]
                if self.shortcut:
                    torch.add(pixels, self._shortcut_at(x, 2 * i + j), out=target)
                else:
                    target.copy_(pixels)
        return y

    def _shortcut_at(self, x: Tensor, offset: int) -> Tensor:
        """The shortcut's value at one pixel of every 2x2 block: `offset` is 2·row + column.

        The shortcut repeats channels and unfolds them with a pixel shuffle.
        """
        if 4 % self.repeats == 0:
            return x[:, offset // self.repeats :: 4 // self.repeats]
        channels = (torch.arange(self.out, device=x.device) * 4 + offset) // self.repeats
        return x.index_select(1, channels)


def fold_upsamples(decoder: Decoder) -> None:
    """Replace each interpolating Upsample by the equivalent, cheaper SubpixelUpsample.

    Call this before the weights are cast to 16 bits: sums of rounded taps would be rounded twice.
    """
    for parent in [decoder, *cast(list[nn.Module], list(decoder.up_blocks))]:
        for name, child in parent.named_children():
            if isinstance(child, Upsample) and child.interpolate:
                setattr(parent, name, SubpixelUpsample(child))


def _merged(taps: Tensor, dim: int) -> list[Tensor]:
    """Merge three taps along `dim` into two for even output rows and two for odd ones."""
    a, b, c = taps.unbind(dim)
    return [torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)]
