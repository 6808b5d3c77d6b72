"""Paint scenes at any size, in flat colours, with anti-aliasing by analytic coverage.

Layers are painted from far to near: sky, stars, sun or moon, ridges, water, ground, objects.
Details that a scene does not specify (peaks, towers, stars) depend on its seed, not on the size.
"""

import numpy as np

from training.outlines import Field, polygon
from training.palette import (
    LIGHTS,
    SHADE,
    land_colour,
    mix,
    sky_at,
    snow_colour,
    thing_colour,
)
from training.scenes import HORIZON, STEP, Scene
from training.things import REACH, THINGS


def paint(scene: Scene, side: int, window: tuple[int, int, int] | None = None) -> np.ndarray:
    """Paint a scene, uint8 RGB (side, side, 3), or only a `window` (top, left, size) of it."""
    busy = [x for g in scene.groups for x, y, half in g.spots if y < 0.5]
    canvas = backdrop(scene, busy, side, window)
    for group in scene.groups:
        for x, y, half in group.spots:
            _thing(canvas, group.kind, group.colour, scene, x, y, half)
    return canvas.pixels()


def backdrop(
    scene: Scene, busy: list[float], side: int, window: tuple[int, int, int] | None = None
) -> "Canvas":
    """Paint sky and land only, with sun or moon away from the positions across in `busy`."""
    top, left, size = window or (0, 0, side)
    canvas = Canvas(side, top - 1, left - 1, size + 2)  # slopes at the border need one more pixel
    rng = np.random.default_rng(scene.seed)
    disc = _sky(canvas, scene, busy, rng)
    _LANDS[scene.land](canvas, scene, rng, disc)
    return canvas


class Canvas:
    """float32 pixels of a window of the image, and their coordinates."""

    def __init__(self, side: int, top: int, left: int, size: int) -> None:
        self.side = side
        self.x = (np.arange(left, left + size, dtype=np.float32) + 0.5) / side
        self.y = (np.arange(top, top + size, dtype=np.float32) + 0.5) / side
        self.image = np.empty((size, size, 3), np.float32)

    def pixels(self) -> np.ndarray:
        """Return the window without its border, uint8 RGB."""
        return np.rint(np.clip(self.image[1:-1, 1:-1], 0, 255)).astype(np.uint8)

    def blend(self, rows: slice, columns: slice, cover: Field, colour: np.ndarray) -> None:
        area = self.image[rows, columns]
        area += cover[..., None] * (np.asarray(colour, np.float32) - area)

    def within(self, x0: float, x1: float, y0: float, y1: float) -> tuple[slice, slice] | None:
        """Return the rows and columns that a rectangle touches, None if it is outside."""
        pad = 1.0 / self.side
        rows = slice(*np.searchsorted(self.y, (y0 - pad, y1 + pad)))
        columns = slice(*np.searchsorted(self.x, (x0 - pad, x1 + pad)))
        empty = rows.start == rows.stop or columns.start == columns.stop
        return None if empty else (rows, columns)

    def box(
        self, x0: float, x1: float, y0: float, y1: float, colour: np.ndarray, alpha: float = 1
    ) -> None:
        found = self.within(x0, x1, y0, y1)
        if found:
            across = self._share(self.x[found[1]], x0, x1)
            down = self._share(self.y[found[0]], y0, y1)
            self.blend(*found, alpha * down[:, None] * across, colour)

    def _share(self, at: np.ndarray, start: float, end: float) -> np.ndarray:
        """Return the share of each pixel along one axis that is between `start` and `end`."""
        half = 0.5 / self.side
        covered = np.minimum(at + half, end) - np.maximum(at - half, start)
        return np.clip(covered * self.side, 0, 1)

    def below(
        self,
        height: np.ndarray,
        colour: np.ndarray,
        until: np.ndarray | None = None,
        alpha: float | np.ndarray = 1.0,
    ) -> None:
        """Fill the area below the curve y = height(x), down to the curve `until`."""
        lowest = 1.0 if until is None else float(until.max())
        found = self.within(-1, 2, float(height.min()), lowest)
        if not found:
            return
        y = self.y[found[0]][:, None]
        cover = self._under(y, height)
        if until is not None:
            cover = cover - self._under(y, np.maximum(until, height))
        self.blend(*found, cover * alpha, colour)

    def _under(self, y: np.ndarray, curve: np.ndarray) -> np.ndarray:
        slope = np.gradient(curve, self.x) if len(curve) > 1 else np.zeros_like(curve)
        return np.clip(0.5 + (y - curve) * self.side / np.sqrt(1 + slope**2), 0, 1)

    def spot(
        self, x: float, y: float, radius: float, colour: np.ndarray, alpha: float = 1.0
    ) -> None:
        found = self.within(x - radius, x + radius, y - radius, y + radius)
        if found:
            rows, columns = found
            distance = np.hypot(self.x[columns] - x, self.y[rows][:, None] - y) - radius
            self.blend(*found, alpha * np.clip(0.5 - distance * self.side, 0, 1), colour)

    def glow(self, x: float, y: float, radius: float, colour: np.ndarray, alpha: float) -> None:
        """Blend a light that fades to zero at `radius`."""
        found = self.within(x - radius, x + radius, y - radius, y + radius)
        if found:
            rows, columns = found
            near = 1 - np.hypot(self.x[columns] - x, self.y[rows][:, None] - y) / radius
            self.blend(*found, alpha * np.clip(near, 0, 1) ** 2, colour)


_CRATERS = ((-0.022, -0.018, 0.017), (0.026, 0.012, 0.022), (-0.012, 0.034, 0.011))

# --- sky -----------------------------------------------------------------------------------


def _sky(
    canvas: Canvas, scene: Scene, busy: list[float], rng: np.random.Generator
) -> tuple[float, float]:
    """Paint gradient, stars, and sun or moon; return the position of the disc."""
    horizon = 0.72 if scene.land != "sea" else HORIZON["sea"]
    canvas.image[:] = sky_at(scene.light, np.clip(canvas.y / horizon, 0, 1))[:, None]
    light = LIGHTS[scene.light]
    colour = np.array(light.disc, np.float32)
    places = STEP * rng.permutation(np.arange(2, 15, 2))
    x = float(max(places[:5], key=lambda p: min((abs(p - b) for b in busy), default=1)))
    if scene.light == "night":
        _stars(canvas, rng, 26 if scene.sky == "starry night" else 7)
        y = 2.5 * STEP
        if scene.sky == "moonlit night":
            canvas.glow(x, y, 0.3, colour, 0.28)
            canvas.spot(x, y, 0.075, colour)
            for dx, dy, radius in _CRATERS:
                canvas.spot(x + dx, y + dy, radius, colour * 0.93)
        return x, y
    y = STEP * {"dawn": 7.5, "noon": 2, "sunset": 7.5}[scene.sky]
    canvas.glow(x, y, 0.46 if scene.sky != "noon" else 0.28, colour, 0.5)
    canvas.spot(x, y, 0.07 if scene.sky == "noon" else 0.085, colour)
    return x, y


def _stars(canvas: Canvas, rng: np.random.Generator, count: int) -> None:
    colour = np.array((255, 250, 226), np.float32)
    cells = rng.permutation(40)[:count]  # at most one star in each cell of an 8 by 5 grid
    for cell, dx, dy, bright in zip(cells, *rng.uniform(0, 1, (3, count)), strict=True):
        x, y = (cell % 8 + 0.2 + 0.6 * dx) / 8, (cell // 8 + 0.2 + 0.6 * dy) / 9
        if bright > 0.6:  # four rays
            reach = 0.018
            found = canvas.within(x - reach, x + reach, y - reach, y + reach)
            if found:
                u = np.abs(canvas.x[found[1]] - x)[None, :] / reach
                v = np.abs(canvas.y[found[0]] - y)[:, None] / reach
                distance = (np.sqrt(u) + np.sqrt(v)) ** 2 - 1
                canvas.blend(
                    *found, np.clip(0.5 - distance * reach * canvas.side / 2, 0, 1), colour
                )
        else:
            canvas.spot(x, y, 0.0045 + 0.003 * bright, colour, 0.9)


# --- lands: each is painted from the horizon to the bottom of the image ------------------------


def _ranges(canvas: Canvas, scene: Scene, rng: np.random.Generator, disc, snow: bool = False):
    """Paint two ranges of peaks: a pale far one, and a near one with lit and shaded sides."""
    _peaks(canvas, scene, rng, base=0.62, tall=0.14, count=6, far=0.62, snow=False)
    _peaks(canvas, scene, rng, base=0.8, tall=0.36, count=4, far=0.0, snow=snow)
    _meadow(canvas, scene, rng)


def _peaks(canvas, scene, rng, base, tall, count, far, snow):
    centres = (np.arange(count) + rng.uniform(0.2, 0.8, count)) / count
    tops = base - tall * rng.uniform(0.72, 1.12, count)
    steep = rng.uniform(0.85, 1.25, (2, count)) * tall * count * 0.72
    heights = np.stack(
        [
            top + np.where(canvas.x < c, (c - canvas.x) * left, (canvas.x - c) * right)
            for c, top, left, right in zip(centres, tops, *steep, strict=True)
        ]
    )
    ridge = np.minimum(heights.min(0), base + 0.02)
    colour = land_colour(scene.light, scene.land, "body", far)
    canvas.below(ridge, colour)
    if far:
        return
    lean = rng.uniform(-0.25, 0.25, count)
    snowline = rng.uniform(0.3, 0.42, count) * tall
    for c, top, slope, (left, right), cap in zip(
        centres, tops, lean, steep.T, snowline, strict=True
    ):
        foot = 0.84
        edge = [(c, top)]
        for i, wobble in enumerate((0.5, -0.35, 0.3), 1):
            down = (foot - top) * i / 3
            edge.append((c + slope * down + wobble * 0.07 * tall * i, top + down))
        reach = (foot - top) / right
        side = np.array([*edge, (c + reach, foot)], np.float32)
        _facet(canvas, side, colour * 0.86)
        if snow:
            white = snow_colour(scene.light)
            teeth = [(c - cap / left, top + cap)]
            across = cap / left + cap / right
            for k, depth in enumerate((1.22, 0.86, 1.3, 0.9, 1.2), 1):
                teeth.append((c - cap / left + across * k / 6, top + cap * depth))
            teeth.append((c + cap / right, top + cap))
            cap_outline = np.array([(c, top), *teeth[::-1]], np.float32)
            _facet(canvas, cap_outline, white)
            dark = [p for p in teeth if p[0] > c + slope * cap]
            shaded = np.array([(c, top), (c + cap / right, top + cap), *dark[-2::-1]], np.float32)
            _facet(canvas, shaded, white * 0.9)


def _facet(canvas: Canvas, outline: np.ndarray, colour: np.ndarray) -> None:
    """Fill a polygon on a mountain."""
    x0, y0 = outline.min(0)
    x1, y1 = outline.max(0)
    found = canvas.within(float(x0), float(x1), float(y0), float(y1))
    if found:
        rows, columns = found
        x, y = np.broadcast_arrays(canvas.x[columns], canvas.y[rows][:, None])
        cover = np.clip(0.5 - polygon(outline, x, y) * canvas.side, 0, 1)
        canvas.blend(*found, cover, colour)


def _meadow(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    """Paint the ground on which objects stand, as two gentle waves."""
    top = HORIZON[scene.land]
    colour = land_colour(scene.light, scene.land, "ground")
    for lift, shade in ((0.0, 0.94), (0.05, 1.0)):
        phase, wide = rng.uniform(0, 6.28), rng.uniform(3, 5)
        canvas.below(top + lift + 0.014 * np.sin(wide * canvas.x + phase), colour * shade)


def _hills(canvas: Canvas, scene: Scene, rng: np.random.Generator, disc) -> None:
    for level, far in ((0.56, 0.75), (0.63, 0.42), (0.7, 0.1)):
        a, b = rng.uniform(0, 6.28, 2)
        wide = rng.uniform(4.5, 7)
        ridge = (
            level + 0.036 * np.sin(wide * canvas.x + a) + 0.018 * np.sin(2.3 * wide * canvas.x + b)
        )
        canvas.below(ridge, land_colour(scene.light, scene.land, "body", far))
    _meadow(canvas, scene, rng)


def _dunes(canvas: Canvas, scene: Scene, rng: np.random.Generator, disc) -> None:
    """Paint dunes with sharp crests: a lit slope before the crest and a shaded one behind."""
    for level, tall, far in ((0.6, 0.09, 0.5), (0.68, 0.12, 0.15)):
        crest = rng.uniform(0.25, 0.75)
        colour = land_colour(scene.light, scene.land, "body", far)
        left = (canvas.x - crest) / rng.uniform(0.5, 0.75)
        right = (crest - canvas.x) / rng.uniform(0.35, 0.55)
        away = np.where(canvas.x < crest, left, right)
        ridge = level + 0.05 - tall * np.exp(2.2 * away)
        canvas.below(ridge, colour)
        edge = crest + 0.1 * np.sin(2.6 * (canvas.y - level + tall)) + 0.22 * (canvas.y - level)
        found = canvas.within(-1, 2, level - tall, 1)
        if found:
            rows, columns = found
            side = np.clip(0.5 + (canvas.x[None, :] - edge[rows][:, None]) * canvas.side, 0, 1)
            under = canvas._under(canvas.y[rows][:, None], ridge)
            canvas.blend(rows, columns, side * under, colour * 0.88)
    _meadow(canvas, scene, rng)


def _sea(canvas: Canvas, scene: Scene, rng: np.random.Generator, disc: tuple[float, float]) -> None:
    """Paint water that darkens towards the viewer, waves, reflections, and a beach if needed."""
    top = HORIZON["sea"]
    body = land_colour(scene.light, "sea", "body")
    found = canvas.within(-1, 2, top, 1)
    if found:
        rows, columns = found
        near = np.clip((canvas.y[rows] - top) / (1 - top), 0, 1)[:, None, None]
        water = mix(body, LIGHTS[scene.light].sky[2], 0.3) * (1 - near) + body * 0.93 * near
        cover = canvas._share(canvas.y[rows], top, 2)[:, None, None]
        area = canvas.image[rows, columns]
        area += cover * (water - area)
    pale = mix(body, LIGHTS[scene.light].disc, 0.3)
    for y, x, long in zip(
        np.linspace(top + 0.04, 0.97, 12),
        rng.uniform(0, 1, 12),
        rng.uniform(0.05, 0.12, 12),
        strict=True,
    ):
        canvas.box(x - long, x + long, y - 0.003, y + 0.003, pale, 0.55)
    if scene.sky not in ("noon", "starry night"):
        x = disc[0]
        for i, (wide, shift) in enumerate(rng.uniform(0.4, 1, (9, 2))):
            y, half = top + 0.014 + 0.036 * i, (0.085 - 0.006 * i) * wide
            at = x + 0.05 * (shift - 0.7)
            canvas.box(at - half, at + half, y, y + 0.011, np.array(LIGHTS[scene.light].disc), 0.75)
    if scene.shore:
        phase = rng.uniform(0, 6.28)
        beach = 0.79 + 0.014 * np.sin(4 * canvas.x + phase)
        ground = land_colour(scene.light, "sea", "ground")
        canvas.below(beach - 0.018, mix(body, (255, 255, 255), 0.45))
        canvas.below(beach, ground * 0.93)
        canvas.below(beach + 0.03 + 0.008 * np.sin(7 * canvas.x), ground)


def _city(canvas: Canvas, scene: Scene, rng: np.random.Generator, disc) -> None:
    """Paint two rows of towers, the near one with windows: pale by day, lit from sunset on."""
    for far, count, low, high in ((0.6, 9, 0.42, 0.6), (0.0, 7, 0.46, 0.66)):
        edges = np.cumsum(rng.uniform(0.6, 1.4, count + 1))
        edges = (edges - edges[0]) / (edges[-1] - edges[0]) * 1.04 - 0.02
        colour = land_colour(scene.light, "city", "body", far)
        for i, (x0, x1) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            top = float(rng.uniform(low, high))
            tone = float(rng.choice((0.9, 1.0, 1.07)))
            narrow = 0.1 * (x1 - x0) * (i % 2)
            if rng.random() < 0.35:
                middle = (x0 + x1) / 2
                canvas.box(middle - 0.006, middle + 0.006, top - 0.05, top, colour * tone)
            canvas.box(x0 + narrow, x1 - narrow, top, 0.82, colour * tone)
            lit = rng.random((5, 9)) < (0.55 if scene.light in ("night", "sunset") else 0.8)
            if not far:
                _windows(canvas, x0 + narrow, x1 - narrow, top, lit, scene)
    _meadow(canvas, scene, rng)


def _windows(
    canvas: Canvas, x0: float, x1: float, top: float, lit: np.ndarray, scene: Scene
) -> None:
    columns = max(2, min(5, round((x1 - x0) / 0.05)))
    pitch = (x1 - x0) / columns
    colour = np.array(LIGHTS[scene.light].window, np.float32)
    alpha = 0.95 if scene.light in ("night", "sunset") else 0.45
    found = canvas.within(x0, x1, top, 0.78)
    if not found:
        return
    x, y = (canvas.x[found[1]] - x0) / pitch, (canvas.y[found[0]] - top - 0.02) / 0.045
    across = _dashes(x, 0.28, 0.72, canvas.side * pitch)
    down = _dashes(y, 0.2, 0.75, canvas.side * 0.045)
    inside = (x > 0) & (x < columns)
    i = np.clip(x.astype(int), 0, columns - 1)
    j = np.floor(y).astype(int)
    there = inside[None, :] & (j >= 0)[:, None] & (j < 7)[:, None]
    on = lit[i[None, :] % 5, np.clip(j, 0, 8)[:, None]] & there
    canvas.blend(*found, alpha * on * down[:, None] * across, colour)


def _dashes(at: np.ndarray, start: float, end: float, pixels: float) -> np.ndarray:
    """Return the share of each pixel in the interval `start` to `end` of its unit cell."""
    within = at - np.floor(at)
    half = 0.5 / pixels
    return np.clip(
        (np.minimum(within + half, end) - np.maximum(within - half, start)) * pixels, 0, 1
    )


_LANDS = {
    "mountains": _ranges,
    "snowy mountains": lambda *a: _ranges(*a, snow=True),
    "hills": _hills,
    "dunes": _dunes,
    "sea": _sea,
    "city": _city,
}


# --- objects -------------------------------------------------------------------------------


def _thing(
    canvas: Canvas, kind: str, colour: str, scene: Scene, x: float, y: float, half: float
) -> None:
    width, top, bottom = REACH[kind]
    if kind in ("house", "tree", "pine", "cactus"):
        ground = land_colour(scene.light, scene.land, "ground")
        _shadow(canvas, x, y + half * bottom, half * width, ground * 0.86)
    found = canvas.within(x - width * half, x + width * half, y + top * half, y + bottom * half)
    if not found:
        return
    rows, columns = found
    u, v = np.broadcast_arrays((canvas.x[columns] - x) / half, (canvas.y[rows][:, None] - y) / half)
    for role, outline in THINGS[kind]:
        cover = np.clip(0.5 - outline(u, v) * half * canvas.side, 0, 1)
        canvas.blend(rows, columns, cover, role_colour(role, kind, colour, scene.light))


def _shadow(canvas: Canvas, x: float, y: float, half: float, colour: np.ndarray) -> None:
    found = canvas.within(x - half, x + half, y - 0.02, y + 0.02)
    if found:
        u = (canvas.x[found[1]] - x)[None, :] / half
        v = (canvas.y[found[0]] - y)[:, None] / 0.016
        distance = (np.hypot(u, v) - 1) * 0.016
        canvas.blend(*found, np.clip(0.5 - distance * canvas.side, 0, 1), colour)


def role_colour(role: str, kind: str, colour: str, light: str) -> np.ndarray:
    if role == "window":
        return np.array(LIGHTS[light].window, np.float32)
    if role not in ("main", "shade"):
        return thing_colour(light, role)
    if kind == "cloud":
        main, shade = np.array(LIGHTS[light].cloud, np.float32), 0.95
    else:
        main, shade = thing_colour(light, colour), SHADE
    return main * shade if role == "shade" else main
