"""Find drawings of known things in an image: masked template matching without trained weights.

An image is averaged to 64 and to 128 pixels a side. At 64 the squared colour error between the
image and every drawing in every size is computed for all offsets at once by Fourier transforms;
only pixels inside a drawing count, so the ground does not matter. The least errors are examined at
128, shifted by up to two pixels and scaled by 4 %. There the drawing is laid over the colours found
around it, blurred as much as suits the image best, and each pixel is asked whether it has the
predicted colour. Only pixels that differ from their ground are asked: a white thing is not found in
a white area. A candidate is a sighting if no other drawing predicts the pixels better.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy import fft, ndimage

from training.emoji import SIZES as STEPS
from training.noto import Thing, rendering, things
from training.scenes import STEP

SIZES = {size: steps * STEP for size, steps in STEPS.items()}  # of the image's side
COARSE, FINE = 64, 128  # pixels a side
OVERSAMPLING = 4  # of the drawings, against the renderer's rounding of small sizes
MARGIN = 6  # pixels around a drawing at FINE from which its ground is taken
SOLID = 0.75  # least opacity of a pixel that counts as a part of a drawing
PEAKS = 3  # candidates of each thing and size
FAR = 85.0  # RMS RGB distance at COARSE beyond which nothing is a candidate
VISIBLE = 40.0  # least RGB distance of a pixel's colour from its ground
# Largest RGB distance of a pixel from its prediction, as a share of that to the ground, with
# bounds. A thing at half opacity is half that distance away.
NEAR, NEAR_BOUNDS = 0.45, (20.0, 60.0)
SOFTNESS = (0.0, 1.0, 2.0)  # standard deviations of the blur in pixels at FINE
# The autoencoder keeps more than these of nearly every true drawing of 9/16 and 6/16 at 512²;
# halves and things at half opacity stay below one of them.
MIN_SHARE = 0.8  # of the visible pixels that have the predicted colour
MIN_HALF_SHARE = 0.6  # the same for the upper, lower, left and right half
MIN_OPACITY = 0.72
MIN_VISIBLE = 0.4  # of a thing's pixels, and of those of its outline
RIVALS = 12  # other things that a candidate is compared with
STRANGERS = 24  # candidates among all other things
# Least share for one of them: parts of mountains look like grey things up to 0.93.
STRANGER_SHARE = 0.95
APART = 0.5  # of a size; closer centres are one place
# Of a copy behind a sighting: what may be seen of it, and the least share of right pixels there.
PART = (0.06, 0.97)
MIN_PART_SHARE = 0.6


@dataclass(frozen=True)
class Sighting:
    """A thing found in an image; lengths are fractions of its side, x to the right and y down."""

    thing: str
    size: str
    x: float  # of the centre of the drawing's square
    y: float
    share: float  # of the visible pixels that have the predicted colour
    rows: slice  # of the drawing's square with its margin at FINE, which may exceed the image
    columns: slice
    pixels: int  # of the drawing's side at FINE
    softness: float

    @property
    def side(self) -> float:
        return self.pixels / FINE


@dataclass(frozen=True)
class _Template:
    colour: np.ndarray  # float32 (n, n, 3)
    opacity: np.ndarray  # float32 (n, n)
    solid: np.ndarray  # bool (n, n)
    ground: np.ndarray  # (2, n, n): row and column of each pixel's nearest pixel of the ground


class View:
    """An image in both resolutions, and its errors against all drawings."""

    def __init__(self, pixels: np.ndarray) -> None:
        """Take square uint8 RGB pixels, of a side that is a multiple of 128."""
        self.fine = np.pad(_average(pixels, FINE), ((_EDGE, _EDGE), (_EDGE, _EDGE), (0, 0)), "edge")
        self.coarse = _average(pixels, COARSE)
        self.errors = _errors(self.coarse)

    def patch(self, rows: slice, columns: slice) -> np.ndarray:
        """Return pixels at FINE; the edge is repeated outside the image."""
        return self.fine[
            rows.start + _EDGE : rows.stop + _EDGE, columns.start + _EDGE : columns.stop + _EDGE
        ]


_EDGE = 2 * MARGIN + 4
_WHOLE = slice(-_EDGE, FINE + _EDGE)


def find(view: View, asked: Iterable[str]) -> list[Sighting]:
    """Return the sightings of the things of these names, the best first."""
    found: list[Sighting] = []
    for name in asked:
        for one in _candidates(view, name):
            if any(_same_place(one, other) for other in found):
                continue
            if _is_best(view, one):
                found.append(one)
    return sorted(found, key=lambda one: -one.share)


def hidden_copies(view: View, found: list[Sighting]) -> list[Sighting]:
    """Return copies of the things found that are partly behind them: doubled things."""
    taken = covered(found)
    free = (~taken).reshape(COARSE, FINE // COARSE, COARSE, FINE // COARSE).all((1, 3))
    hidden: list[Sighting] = []
    for name in {one.thing for one in found}:
        for size, share in SIZES.items():
            errors = _errors_where(view.coarse, free, name, size)
            for row, column in _peaks(errors, round(share * COARSE)):
                one = _placed(view, name, size, row, column, ~taken)
                if _part_is_right(view, one, taken):
                    hidden.append(one)
    return hidden


def strangers(view: View, found: list[Sighting]) -> list[Sighting]:
    """Return sightings of other things beside those found; only the likeliest are examined."""
    known = {one.thing for one in found}
    likely = []
    for (name, size), row in _bank()[0].items():
        if name in known:
            continue
        for down, right in _peaks(view.errors[row], round(SIZES[size] * COARSE))[:1]:
            likely.append((float(view.errors[row, down, right]), name, size, down, right))
    seen = []
    for _, *where in sorted(likely)[:STRANGERS]:
        one = _examined(view, _placed(view, *where))
        apart = one and not any(_same_place(one, other) for other in found)
        if one and apart and one.share >= STRANGER_SHARE:
            seen.append(one)
    return seen


def covered(found: Iterable[Sighting]) -> np.ndarray:
    """Return which pixels at FINE the sightings and their outlines cover, bool (FINE, FINE)."""
    mask = np.zeros((FINE + 2 * _EDGE,) * 2, bool)
    for one in found:
        rows, columns = (slice(s.start + _EDGE, s.stop + _EDGE) for s in (one.rows, one.columns))
        mask[rows, columns] |= _template(one.thing, one.pixels).opacity > 0.02
    return ndimage.binary_dilation(mask, iterations=2)[_EDGE:-_EDGE, _EDGE:-_EDGE]


def _average(pixels: np.ndarray, side: int) -> np.ndarray:
    fine = len(pixels) // side
    return pixels.reshape(side, fine, side, fine, 3).mean((1, 3), dtype=np.float32)


# --- coarse ----------------------------------------------------------------------------------


@cache
def _bank() -> tuple[dict[tuple[str, str], int], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return row numbers of things and sizes; transforms of masks and of colours; sums of both."""
    rows, masks, colours, squares, areas = {}, [], [], [], []
    for size, share in SIZES.items():
        side = round(share * COARSE)
        for thing in things():
            colour, opacity = _drawing(thing, side)
            mask = np.zeros((COARSE, COARSE), np.float32)
            mask[:side, :side] = opacity > min(SOLID, opacity.max() - 0.05)
            inside = np.zeros((3, COARSE, COARSE), np.float32)
            inside[:, :side, :side] = np.moveaxis(colour, -1, 0) * mask[:side, :side]
            rows[thing.name, size] = len(rows)
            masks.append(np.conj(fft.rfft2(mask)))
            colours.append(np.conj(fft.rfft2(inside)))
            squares.append((inside**2).sum())
            areas.append(mask.sum())
    return rows, np.stack(masks), np.stack(colours), np.array(squares), np.array(areas)


def _errors(image: np.ndarray) -> np.ndarray:
    """Return mean squared RGB distances to every drawing at every offset, (rows, 64, 64).

    Offsets at which a drawing leaves the image wrap around; `_peaks` ignores them.
    """
    _, masks, colours, squares, areas = _bank()
    channels = np.moveaxis(image, -1, 0)
    spectrum = masks * fft.rfft2(np.square(channels).sum(0))
    spectrum -= 2 * np.einsum("ncij,cij->nij", colours, fft.rfft2(channels))
    found = fft.irfft2(spectrum, s=(COARSE, COARSE))
    return (found + squares[:, None, None].astype(np.float32)) / areas[:, None, None]


def _errors_where(image: np.ndarray, free: np.ndarray, name: str, size: str) -> np.ndarray:
    """Return mean squared distances to one drawing at every offset, (64, 64), over free pixels.

    They are infinite where too little or all of the drawing is on free pixels.
    """
    rows, masks, colours, _, areas = _bank()
    row = rows[name, size]
    side = round(SIZES[size] * COARSE)
    mask = fft.irfft2(np.conj(masks[row]), s=(COARSE, COARSE))
    inside = fft.irfft2(np.conj(colours[row]), s=(COARSE, COARSE))
    lengths = np.conj(fft.rfft2(np.square(inside).sum(0) * (mask > 0.5)))
    channels = np.moveaxis(image, -1, 0) * free
    spectrum = masks[row] * fft.rfft2(np.square(channels).sum(0))
    spectrum -= 2 * (colours[row] * fft.rfft2(channels)).sum(0)
    spectrum += lengths * fft.rfft2(free.astype(np.float32))
    sums = fft.irfft2(spectrum, s=(COARSE, COARSE))
    count = fft.irfft2(masks[row] * fft.rfft2(free.astype(np.float32)), s=(COARSE, COARSE))
    part = (count > PART[0] * areas[row]) & (count < PART[1] * areas[row])
    return np.where(part, sums / np.maximum(count, 1), np.inf)[: COARSE - side + 1]


def _peaks(errors: np.ndarray, side: int) -> list[tuple[int, int]]:
    """Return rows and columns of the least errors, which are at least a fifth of a side apart."""
    valid = errors[: COARSE - side + 1, : COARSE - side + 1]
    least = ndimage.minimum_filter(valid, 2 * (side // 5) + 1, mode="nearest")
    rows, columns = np.nonzero((valid == least) & (valid < FAR**2))
    order = np.argsort(valid[rows, columns])[:PEAKS]
    return [(int(rows[i]), int(columns[i])) for i in order]


# --- fine ------------------------------------------------------------------------------------


@cache
def _by_name() -> dict[str, Thing]:
    return {thing.name: thing for thing in things()}


def _drawing(thing: Thing, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a thing's colours (side, side, 3) and opacity (side, side), float32."""
    large = rendering(thing, side * OVERSAMPLING).astype(np.float32)
    blocks = (side, OVERSAMPLING, side, OVERSAMPLING)
    opacity = (large[..., 3] / 255).reshape(blocks).mean((1, 3))
    weighted = large[..., :3] * (large[..., 3:] / 255)
    weighted = weighted.reshape(*blocks, 3).mean((1, 3))
    return weighted / np.maximum(opacity, 1e-3)[..., None], opacity


@cache
def _template(name: str, side: int) -> _Template:
    colour, opacity = _drawing(_by_name()[name], side)
    colour = np.pad(colour, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))
    opacity = np.pad(opacity, MARGIN)
    solid = opacity > min(SOLID, opacity.max() - 0.05)
    return _Template(colour, opacity, solid, _nearest_ground(opacity))


def _nearest_ground(opacity: np.ndarray) -> np.ndarray:
    inside = ndimage.binary_dilation(opacity > 0.05, iterations=3)
    return ndimage.distance_transform_edt(inside, return_distances=False, return_indices=True)


def _candidates(view: View, name: str) -> list[Sighting]:
    found = []
    for size, share in SIZES.items():
        errors = view.errors[_bank()[0][name, size]]
        for row, column in _peaks(errors, round(share * COARSE)):
            one = _examined(view, _placed(view, name, size, row, column))
            if one:
                found.append(one)
    return sorted(found, key=lambda one: -one.share * one.side)


def _placed(
    view: View, name: str, size: str, row: int, column: int, free: np.ndarray | None = None
) -> Sighting:
    """Return where and how large a drawing fits best near an offset found at COARSE.

    Only `free` pixels at FINE count if they are given.
    """
    counted = None if free is None else np.pad(free, _EDGE)
    best, least = None, np.inf
    step = FINE // COARSE
    side = round(SIZES[size] * FINE)
    for pixels in sorted({side, round(side * 0.96), round(side * 1.04)}):
        template = _template(name, pixels)
        rows, columns = np.nonzero(template.solid)
        colours = template.colour[rows, columns]
        top, left = (at * step + (side - pixels) // 2 - MARGIN for at in (row, column))
        for down in range(-2, 3):
            for right in range(-2, 3):
                at = rows + (top + down + _EDGE), columns + (left + right + _EDGE)
                squares = np.minimum(np.square(view.fine[at] - colours).sum(1), FAR**2)
                if counted is not None:  # not only of the few pixels that happen to fit
                    squares = np.where(counted[at], squares, FAR**2)
                error = squares.mean() if len(squares) else np.inf
                if error < least:
                    least, best = error, (pixels, top + down, left + right)
    pixels, top, left = best or (side, row * step - MARGIN, column * step - MARGIN)
    extent = pixels + 2 * MARGIN
    return Sighting(
        thing=name,
        size=size,
        x=(left + extent / 2) / FINE,
        y=(top + extent / 2) / FINE,
        share=0.0,
        rows=slice(top, top + extent),
        columns=slice(left, left + extent),
        pixels=pixels,
        softness=0.0,
    )


def _examined(view: View, one: Sighting) -> Sighting | None:
    """Return the sighting with its share, None if its pixels are not those of the thing."""
    measured = measure(view, one)
    if measured is None:
        return None
    share, half, opacity, softness = measured
    if share < MIN_SHARE or half < MIN_HALF_SHARE or opacity < MIN_OPACITY:
        return None
    return replace(one, share=share, softness=softness)


def measure(view: View, one: Sighting) -> tuple[float, float, float, float] | None:
    """Return share, least share of a half, opacity and softness; None if too little is visible."""
    template = _template(one.thing, one.pixels)
    seen = view.patch(one.rows, one.columns)
    ground = seen[template.ground[0], template.ground[1]]
    softness, predicted, errors = _predicted(view, one, template, ground)
    contrast = np.linalg.norm(predicted - ground, axis=-1)
    visible = template.solid & (contrast > VISIBLE)
    outline = template.solid & ~ndimage.binary_erosion(template.solid, iterations=2)
    if visible[template.solid].mean() < MIN_VISIBLE or visible[outline].mean() < MIN_VISIBLE:
        return None
    right = (errors < np.clip(NEAR * contrast, *NEAR_BOUNDS))[visible]
    rows, columns = np.nonzero(visible)
    halves = [
        side
        for at in (rows, columns)
        for side in (right[at <= np.median(at)], right[at >= np.median(at)])
    ]
    toward = predicted - ground
    opacity = float(
        ((seen - ground) * toward).sum(-1)[visible].sum() / np.square(toward)[visible].sum()
    )
    return float(right.mean()), float(min(half.mean() for half in halves)), opacity, softness


def _predicted(
    view: View, one: Sighting, template: _Template, ground: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the blur that suits best, the colours predicted with it, and distances to them."""
    sharp = ground + template.opacity[..., None] * (template.colour - ground)
    best = None
    for softness in SOFTNESS:
        soft = ndimage.gaussian_filter(sharp, (softness, softness, 0)) if softness else sharp
        errors = _distances(view, one.rows, one.columns, soft)
        mean = np.minimum(errors, FAR)[template.solid].mean()
        if best is None or mean < best[0]:
            best = (mean, softness, soft, errors)
    assert best is not None
    return best[1:]


def _part_is_right(view: View, one: Sighting, taken: np.ndarray) -> bool:
    """Return whether the visible pixels of a drawing outside of `taken` are those of the thing."""
    colour, opacity = _within(one, _WHOLE, _WHOLE)
    both = np.pad(taken, _EDGE) | (opacity > 0.05)
    at = ndimage.distance_transform_edt(
        ndimage.binary_dilation(both, iterations=2), return_distances=False, return_indices=True
    )
    ground = view.fine[at[0], at[1]]
    part = (opacity > SOLID) & ~np.pad(taken, _EDGE)
    contrast = np.linalg.norm(colour - ground, axis=-1)
    visible = part & (contrast > VISIBLE)
    if visible.sum() < PART[0] * (opacity > SOLID).sum() or visible[part].mean() < MIN_VISIBLE:
        return False
    errors = np.linalg.norm(view.fine - colour, axis=-1)
    right = errors < np.clip(NEAR * contrast, *NEAR_BOUNDS)
    return bool(right[visible].mean() >= MIN_PART_SHARE)


def _distances(view: View, rows: slice, columns: slice, predicted: np.ndarray) -> np.ndarray:
    """Return each pixel's RGB distance to its prediction, the least of shifts by one pixel."""
    return np.min(
        [
            np.linalg.norm(
                view.patch(_moved(rows, down), _moved(columns, right)) - predicted, axis=-1
            )
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
        ],
        axis=0,
    )


def _moved(where: slice, by: int) -> slice:
    return slice(where.start + by, where.stop + by)


# --- rivals ----------------------------------------------------------------------------------


def _is_best(view: View, one: Sighting) -> bool:
    """Return whether no other thing explains the pixels of both better."""
    return all(_explains_better(view, one, rival) for rival in _rivals(view, one))


def _rivals(view: View, one: Sighting) -> list[Sighting]:
    """Return the other things of similar size and place whose errors at COARSE are least."""
    found = []
    for (name, size), row in _bank()[0].items():
        side = round(SIZES[size] * COARSE)
        if name == one.thing or not 0.6 < SIZES[size] / SIZES[one.size] < 1.7:
            continue
        at = [round(c * COARSE - side / 2) for c in (one.y, one.x)]
        reach = max(2, side // 6)
        first, last = np.clip([[a - reach for a in at], [a + reach for a in at]], 0, COARSE - side)
        near = view.errors[row, first[0] : last[0] + 1, first[1] : last[1] + 1]
        down, right = np.unravel_index(near.argmin(), near.shape)
        found.append(
            (float(near[down, right]), name, size, int(first[0] + down), int(first[1] + right))
        )
    return [_placed(view, *where) for _, *where in sorted(found)[:RIVALS]]


def _explains_better(view: View, one: Sighting, other: Sighting) -> bool:
    rows = slice(min(one.rows.start, other.rows.start), max(one.rows.stop, other.rows.stop))
    columns = slice(
        min(one.columns.start, other.columns.start), max(one.columns.stop, other.columns.stop)
    )
    rows, columns = (
        slice(max(s.start, -_EDGE + 1), min(s.stop, FINE + _EDGE - 1)) for s in (rows, columns)
    )
    layers = [_within(candidate, rows, columns) for candidate in (one, other)]
    opacity = np.maximum(layers[0][1], layers[1][1])
    seen = view.patch(rows, columns)
    at = _nearest_ground(opacity)
    ground = seen[at[0], at[1]]
    means = []
    for colour, cover in layers:
        drawn = ground + cover[..., None] * (colour - ground)
        if one.softness:
            drawn = ndimage.gaussian_filter(drawn, (one.softness, one.softness, 0))
        errors = _distances(view, rows, columns, drawn)
        means.append(np.minimum(errors, FAR)[opacity > SOLID].mean())
    return bool(means[0] <= means[1])


def _within(one: Sighting, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return a drawing's colours and opacity in a larger area."""
    template = _template(one.thing, one.pixels)
    opacity = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.float32)
    colour = np.zeros((*opacity.shape, 3), np.float32)
    top, left = one.rows.start - rows.start, one.columns.start - columns.start
    y, x = (slice(max(0, at), at + len(template.solid)) for at in (top, left))
    cut = template.opacity[max(0, -top) :, max(0, -left) :]
    cut = cut[: len(opacity) - y.start, : opacity.shape[1] - x.start]
    height, width = cut.shape
    y, x = slice(y.start, y.start + height), slice(x.start, x.start + width)
    opacity[y, x] = cut
    colour[y, x] = template.colour[max(0, -top) :, max(0, -left) :][:height, :width]
    return colour, opacity


def _same_place(one: Sighting, other: Sighting) -> bool:
    near = APART * max(one.side, other.side)
    return abs(one.x - other.x) < near and abs(one.y - other.y) < near
