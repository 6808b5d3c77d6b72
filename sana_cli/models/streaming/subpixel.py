"""The decoder's upsampling without the upsampled input: the same pixels in fewer products."""

from typing import cast

import torch
from torch import Tensor, nn

from sana_cli.kernels.convolution import upsample, upsample_window
from sana_cli.models.dc_ae import Decoder, Upsample


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
        self.out = conv.out_channels
        self.repeats = plain.repeats if plain.shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        """(1, in, h, w) -> (1, out, 2·h, 2·w)."""
        return upsample(x, self.upper, self.lower, self.bias, self.repeats)

    def rows(self, window: Tensor) -> Tensor:
        """(1, in, rows + 2, W + 2), with a halo of one pixel -> (1, out, 2·rows, 2·W)."""
        return upsample_window(window, self.upper, self.lower, self.bias, self.repeats)


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
