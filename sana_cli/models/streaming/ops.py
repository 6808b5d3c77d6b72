"""Strip ops that serve any network: line buffers, residuals, row queues, resizing."""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_cli.kernels.convolution import new_map
from sana_cli.kernels.rms_norm import rms_norm
from sana_cli.models.dc_ae import ChannelRMSNorm

StripOp = Callable[[Tensor], Tensor | None]
Size = tuple[int, int]  # (height, width)


class Chain:
    """Several ops in sequence."""

    def __init__(self, *ops: StripOp) -> None:
        self.ops = ops

    def __call__(self, x: Tensor) -> Tensor | None:
        strip: Tensor | None = x
        del x
        for op in self.ops:
            if strip is None:
                break
            strip = op(strip)
        return strip


class Residual:
    """norm(body(x)) + shortcut(x).

    The body finishes rows later than it receives them, so the input waits in a queue. It makes
    `scale` output rows of each input row.
    """

    def __init__(
        self,
        body: StripOp,
        shortcut: StripOp | None = None,
        *,
        scale: float = 1,
        norm: ChannelRMSNorm | None = None,
    ) -> None:
        self.body, self.shortcut, self.scale, self.norm = body, shortcut, scale, norm
        self.queue = RowQueue()

    def __call__(self, x: Tensor) -> Tensor | None:
        self.queue.put(x)
        y = self.body(x)
        if y is None:
            return None
        start = 0
        for piece in self.queue.take(int(y.shape[2] / self.scale)):
            residual = self.shortcut(piece) if self.shortcut else piece
            assert residual is not None
            rows = y[:, :, start : start + residual.shape[2]]
            if self.norm:
                normalise(self.norm, rows, residual)
            else:
                rows += residual
            start += residual.shape[2]
        return y


class LineBuffer:
    """Strips -> the rows that a kernel of 2·reach + 1 rows needs for its next output rows.

    The map of `height` rows is padded with zeros: `reach` rows above and below, and `sides`
    columns left and right. With `silu` the rows pass through SiLU on their way in. A map that
    comes in one strip needs no line buffer, as kernels pad by themselves: see `is_whole`.
    """

    def __init__(
        self, reach: int, height: int, stride: int = 1, sides: int = 0, silu: bool = False
    ) -> None:
        self.reach, self.missing, self.stride, self.sides = reach, height, stride, sides
        self.silu = silu
        self.kept: Tensor | None = None

    def is_whole(self, x: Tensor) -> bool:
        """Whether a strip is the whole map."""
        return self.kept is None and x.shape[2] == self.missing

    def __call__(self, x: Tensor) -> Tensor | None:
        self.missing -= x.shape[2]
        below = 0 if self.missing else self.reach
        above = self.reach if self.kept is None else self.kept.shape[2]
        if above + below == 0:
            return F.silu(x, inplace=True) if self.silu else x
        rows = above + x.shape[2] + below
        width = x.shape[3]
        window = new_map(x, (1, x.shape[1], rows, width + 2 * self.sides))
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
        if self.missing:
            self.kept = window[:, :, done * self.stride :].clone()
        return window if done else None


class RowQueue:
    """A first-in, first-out queue of rows."""

    def __init__(self) -> None:
        self.pieces: deque[Tensor] = deque()

    def put(self, x: Tensor) -> None:
        self.pieces.append(x)

    def take(self, rows: int) -> Iterator[Tensor]:
        """Yield the next `rows` rows, in pieces. The rest of a strip is copied, to free it."""
        while rows:
            piece = self.pieces.popleft()
            if piece.shape[2] > rows:
                self.pieces.appendleft(piece[:, :, rows:].clone())
                piece = piece[:, :, :rows]
            rows -= piece.shape[2]
            yield piece


class EvenRows:
    """Regroup the rows into strips of even height."""

    def __init__(self) -> None:
        self.odd: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor | None:
        if self.odd is not None:
            x = torch.cat([self.odd, x], dim=2)
        even = x.shape[2] // 2 * 2
        self.odd = x[:, :, even:].clone() if even < x.shape[2] else None
        return x[:, :, :even] if even else None


class Bilinear:
    """Resize the map to `size` as F.interpolate does without antialiasing, in float32."""

    def __init__(self, whole: Size, size: Size) -> None:
        self.width = size[1]
        position = (torch.arange(size[0]) + 0.5) * (whole[0] / size[0]) - 0.5
        position = position.clamp(0, whole[0] - 1)
        self.upper = position.floor().long()
        self.lower = (self.upper + 1).clamp(max=whole[0] - 1)
        self.weight = (position - self.upper).float()
        self.done = self.first = 0  # output rows finished; index of the first input row in `kept`
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


def repeat(times: int) -> StripOp:
    return partial(torch.repeat_interleave, repeats=times, dim=1)


def normalise(
    norm: ChannelRMSNorm,
    x: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """act(norm(x)) + residual, in place, rounded where the module rounds."""
    added = None if residual is None else tokens(residual)
    rms_norm(tokens(x), norm.weight, norm.bias, norm.eps, added, activation)
    return x


def tokens(x: Tensor) -> Tensor:
    """View (B, C, h, w) as (B, h, w, C)."""
    return x.movedim(1, -1)
