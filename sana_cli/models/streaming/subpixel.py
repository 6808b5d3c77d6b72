"""The decoder's doubling without the doubled map: the same pixels from fewer products."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_cli.models.dc_ae import Decoder, Upsample
from sana_cli.models.streaming.ops import empty


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
        """(1, in, rows + 2, W + 2), its halo for context -> (1, out, 2·rows, 2·W)."""
        x, out = window[:, :, 1:-1, 1:-1], self.out
        height, width = x.shape[2:]
        y = empty(x, (1, out, 2 * height, 2 * width))
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


def fold_upsamples(decoder: Decoder) -> None:
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
