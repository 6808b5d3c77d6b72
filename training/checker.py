"""Check from the pixels alone, fact by fact, whether an image of a scene matches its caption.

The gradient of the sky determines the light, and the colours below it the land. Then every pixel
is assigned the nearest colour that can occur in this light and land. An object is a connected
patch of one colour whose outline, after scaling to the same area and centring, overlaps that of
its kind, with the kind's details (trunk, roof, sail, basket) in the right places. A land is
recognised by its colours alone, so a badly drawn ridge of the right colour passes.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from training.palette import (
    COLOURS,
    DETAILS,
    LIGHTS,
    SHADE,
    land_colour,
    mix,
    sky_at,
    sky_colours,
    snow_colour,
    thing_colour,
)
from training.patches import along_and_across, resample, scaled_grid
from training.scenes import AT, HORIZON, KINDS, LANDS, PLACES
from training.things import THINGS

GRID = 64  # side of the square in which outlines are compared; the main patch fills a fifth of it
# Least overlap of outline and details together for a patch to be an object. It was chosen by eye on
# distorted drawings: those below it are visibly crooked, although many could still be recognised.
# One blob in nine reaches it for some kind, and hardly any for the kind that it should be.
MIN_OVERLAP = 0.66
MIN_AREA = 0.003  # of the image; smaller patches are ignored
DETAILED = 0.35  # weight of the details, for kinds that have any
FAR_COLOUR = 46.0  # RGB distance beyond which a sky or a land does not explain a pixel
MIN_SKY, MIN_LAND = 0.5, 0.6  # least shares of explained pixels


@dataclass(frozen=True)
class Detection:
    """A detected object: its kind and colour, the centre of its box, and its overlap."""

    kind: str
    colour: str
    x: float
    y: float
    overlap: float


@dataclass(frozen=True)
class Seen:
    light: str | None
    land: str | None
    moon: bool
    stars: int
    objects: tuple[Detection, ...]


def check(facts: dict[str, str], pixels: np.ndarray) -> dict[str, bool]:
    """Return for every fact of a caption (`Caption.facts`) whether uint8 RGB `pixels` show it."""
    seen = look(pixels)
    verdict = {}
    groups = []
    for i in ("1", "2"):
        kind = facts.get(f"kind {i}")
        if not kind:
            continue
        things = [thing for thing in seen.objects if thing.kind == kind]
        groups.append(things)
        verdict[f"kind {i}"] = bool(things)
        count = facts[f"count {i}"]
        verdict[f"count {i}"] = len(things) > 1 if count == "many" else len(things) == int(count)
        if f"colour {i}" in facts:
            colour = facts[f"colour {i}"]
            verdict[f"colour {i}"] = bool(things) and all(t.colour == colour for t in things)
        if f"place {i}" in facts:
            verdict[f"place {i}"] = bool(things) and place_of(things[0]) == facts[f"place {i}"]
    if "relation" in facts:
        both = all(groups)
        verdict["relation"] = both and in_relation(facts["relation"], *groups)
    return verdict | check_surroundings(facts, seen)


def check_surroundings(facts: dict[str, str], seen: Seen) -> dict[str, bool]:
    """Return whether the sky and the land that a caption states were seen."""
    verdict = {}
    if "sky" in facts:
        verdict["sky"] = _sky_is(facts["sky"], seen)
    if "land" in facts:
        verdict["land"] = seen.land == facts["land"]
    return verdict


def look(pixels: np.ndarray, taken: np.ndarray | None = None) -> Seen:
    """Detect light, land, moon, stars and objects in a square uint8 RGB image.

    Pixels that are `taken` by something else, bool (n, n) of any n that divides 256, do not count
    for light, land, moon and stars.
    """
    fine = max(1, len(pixels) // 256)  # no fact needs more than 256 pixels a side
    shape = (len(pixels) // fine, fine, len(pixels) // fine, fine, 3)
    coarse = pixels.reshape(shape).mean((1, 3), dtype=np.float32)
    smooth = ndimage.uniform_filter(coarse, size=(3, 3, 1))
    free = np.ones(smooth.shape[:2], bool)
    if taken is not None:
        scale = len(smooth) // len(taken)
        free = ~taken.repeat(scale, 0).repeat(scale, 1)
    light = _light_of(smooth, free)
    land = _land_of(smooth, light, free) if light else None
    if light is None or land is None:
        return Seen(light, land, False, 0, ())
    names, nearest = _nearest(light, land)
    labels = nearest[_cells(smooth)]
    named = lambda name: labels == names.index(name)  # noqa: E731
    details = {name: named(name) for name in (*DETAILS, "window")}
    found = []
    for colour in COLOURS:
        found += _objects(named(colour), details, colour)
    moon, stars = (
        _moon_and_stars(named("disc") & free, smooth, free) if light == "night" else (False, 0)
    )
    return Seen(light, land, moon, stars, tuple(found))


# --- sky and land --------------------------------------------------------------------------


def _light_of(smooth: np.ndarray, free: np.ndarray) -> str | None:
    """Return the light whose gradient explains most of the upper sky, None if none does."""
    side = len(smooth)
    rows = (np.arange(side) + 0.5) / side
    upper = rows < 0.42
    share = {}
    for light in LIGHTS:
        explained = np.zeros((int(upper.sum()), side), bool)
        for horizon in (0.72, HORIZON["sea"]):
            sky = sky_at(light, np.clip(rows[upper] / horizon, 0, 1))
            explained |= np.linalg.norm(smooth[upper] - sky[:, None], axis=-1) < FAR_COLOUR
        share[light] = explained[free[upper]].mean() if free[upper].any() else 0.0
    best = max(share, key=lambda light: share[light])
    return best if share[best] >= MIN_SKY else None


def _land_of(smooth: np.ndarray, light: str, free: np.ndarray) -> str | None:
    """Return the land whose colours explain most of the lower half, None if none does."""
    side = len(smooth)
    lower = (np.arange(side) + 0.5) / side > 0.5
    cells = _cells(smooth[lower][free[lower]])
    if not len(cells):
        return None
    share = {land: float(_explained(light, land)[cells].mean()) for land in LANDS}
    best = max(share, key=lambda land: share[land])
    return best if share[best] >= MIN_LAND else None


@cache
def _explained(light: str, land: str) -> np.ndarray:
    """Return how well this land explains every colour, from 0 to 1; objects and sky count 0.7."""
    colours = _cube()
    others = np.concatenate([*_thing_colours(light).values(), sky_colours(light, 9)])
    other = np.sqrt(_squares(colours, others).min(1))
    far = np.sqrt(_squares(colours, land_colours(light, land)).min(1))
    return np.where(far < other, np.exp(-((far / 24) ** 2)), 0.7 * (other < FAR_COLOUR)).astype(
        np.float32
    )


@cache
def land_colours(light: str, land: str) -> np.ndarray:
    """Return all colours in which the painter fills a land."""
    body, ground = land_colour(light, land, "body"), land_colour(light, land, "ground")
    colours = [ground, ground * 0.94, ground * 0.86]
    if land in ("mountains", "snowy mountains"):
        colours += [body, body * 0.86, land_colour(light, land, "body", 0.62)]
        if land == "snowy mountains":
            colours += [snow_colour(light), snow_colour(light) * 0.9]
    elif land == "hills":
        colours += [land_colour(light, land, "body", far) for far in (0.75, 0.42, 0.1)]
    elif land == "dunes":
        for far in (0.5, 0.15):
            colours += [land_colour(light, land, "body", far) * shade for shade in (1, 0.88)]
    elif land == "sea":
        pale = mix(body, LIGHTS[light].disc, 0.3)
        horizon = mix(body, LIGHTS[light].sky[2], 0.3)
        colours += [body, body * 0.93, horizon, mix(horizon, body, 0.5), mix(body, pale, 0.55)]
        colours += [mix(body, (255, 255, 255), 0.45)]
    elif land == "city":
        for far in (0.6, 0.0):
            colours += [land_colour(light, land, "body", far) * tone for tone in (0.9, 1, 1.07)]
        if light in ("dawn", "noon"):
            colours += [mix(body, LIGHTS[light].window, 0.45)]
    return np.stack(colours).astype(np.float32)


def _moon_and_stars(disc: np.ndarray, smooth: np.ndarray, free: np.ndarray) -> tuple[bool, int]:
    """Detect a moon, a round patch of the disc's colour, and count stars, small bright spots."""
    side = len(disc)
    labels, count = ndimage.label(disc)
    moon = False
    for rows, columns in ndimage.find_objects(labels):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        area = disc[rows, columns].sum()
        if area > 0.008 * disc.size and 0.75 < width / height < 1.33:
            moon = moon or bool(area / (width * height) > 0.62)
    upper = smooth[: int(0.42 * side)].mean(-1)
    bright = ndimage.white_tophat(upper, size=max(5, side // 18)) > 22
    _, stars = ndimage.label(bright & free[: len(bright)])
    return moon, int(stars)


def _sky_is(sky: str, seen: Seen) -> bool:
    if sky == "moonlit night":
        return seen.light == "night" and seen.moon
    if sky == "starry night":
        return seen.light == "night" and not seen.moon and seen.stars >= 5
    return seen.light == sky


# --- objects -------------------------------------------------------------------------------


@cache
def _thing_colours(light: str) -> dict[str, np.ndarray]:
    """Return the tones in which every colour and detail is painted."""
    tones = {}
    for name in COLOURS:
        main = thing_colour(light, name)
        tones[name] = np.stack([main, main * SHADE])
    cloud = np.array(LIGHTS[light].cloud, np.float32)
    tones["white"] = np.stack([*tones["white"], cloud, cloud * 0.95])
    for name in DETAILS:
        tones[name] = thing_colour(light, name)[None]
    return tones | {"window": np.array([LIGHTS[light].window], np.float32)}


@cache
def _nearest(light: str, land: str) -> tuple[list[str], np.ndarray]:
    """Return names of all that can occur in this light, and the nearest's index for each colour."""
    sky, disc = sky_colours(light, 14), np.array(LIGHTS[light].disc, np.float32)
    ground = {
        "sky": np.concatenate([sky, mix(sky, disc, 0.22), mix(sky[5:], disc, 0.42)]),
        "land": land_colours(light, land),
        "disc": np.stack([disc, disc * 0.93]),
    }
    tones = ground | _thing_colours(light)
    index = np.concatenate([[i] * len(colours) for i, colours in enumerate(tones.values())])
    palette = np.concatenate(list(tones.values())).astype(np.float32)
    return list(tones), index[_squares(_cube(), palette).argmin(1)].astype(np.uint8)


STEP = 8  # colours are quantised to cubes of this width, which keeps the tables small


@cache
def _cube() -> np.ndarray:
    """Return the centre of every colour cube, (32768, 3) float32."""
    axis = np.arange(0, 256, STEP, dtype=np.float32) + (STEP - 1) / 2
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)


def _cells(pixels: np.ndarray) -> np.ndarray:
    """Return the index of each pixel's cube in `_cube`."""
    red, green, blue = np.moveaxis(np.clip(pixels, 0, 255).astype(np.intp) // STEP, -1, 0)
    return (red * (256 // STEP) + green) * (256 // STEP) + blue


def _squares(pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Return squared distances (n, m) between colours (n, 3) and (m, 3)."""
    squares = np.square(pixels).sum(1)[:, None] + np.square(palette).sum(1)
    return np.maximum(squares - 2 * pixels @ palette.T, 0)


def _objects(mask: np.ndarray, details: dict[str, np.ndarray], colour: str) -> list[Detection]:
    found = []
    labels, count = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())[1:]
    for i, window in enumerate(ndimage.find_objects(labels)):
        if sizes[i] < MIN_AREA * mask.size:
            continue
        patch = np.zeros_like(mask)
        patch[window] = ndimage.binary_fill_holes(labels[window] == i + 1)
        overlap = overlaps(patch, details)
        kind = max(overlap, key=lambda name: overlap[name])
        if overlap[kind] >= MIN_OVERLAP and (kind != "cloud" or colour == "white"):
            rows, columns = window
            x = (columns.start + columns.stop) / 2 / mask.shape[1]
            y = (rows.start + rows.stop) / 2 / mask.shape[0]
            found.append(Detection(kind, colour, x, y, overlap[kind]))
    return found


def overlaps(patch: np.ndarray, details: dict[str, np.ndarray]) -> dict[str, float]:
    """Return how well a patch and the details around it fit each kind, from 0 to 1.

    Only details in the tones of a kind count: a hull under a roof is not a boat.
    """
    grid = scaled_grid(patch, GRID)
    main = resample(patch, grid) > 0.5
    tones = {name: resample(mask, grid) for name, mask in details.items()}
    result = {}
    for kind, (outline, parts) in _templates().items():
        shape = float((main & outline).sum() / (main | outline).sum())
        if parts is None:
            result[kind] = shape
        else:
            beside = sum(tones[role] for role in {role for role, _ in THINGS[kind]} & set(tones))
            there = float(((beside > 0.5) & parts).sum() / parts.sum())
            result[kind] = (1 - DETAILED) * shape + DETAILED * min(1.0, there / 0.8)
    return result


@cache
def _templates() -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Return the outline of each kind's main colour, and its details if they are large enough."""
    axis = np.linspace(-1.8, 1.8, 460, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    result = {}
    for kind in KINDS:
        main, beside = np.zeros(u.shape, bool), np.zeros(u.shape, bool)
        for role, outline in THINGS[kind]:
            inside = outline(u, v) < 0
            if role in ("main", "shade"):
                main, beside = main | inside, beside & ~inside
            else:
                main, beside = main & ~inside, beside | inside
        main = ndimage.binary_fill_holes(main)
        beside &= ~main
        grid = scaled_grid(main, GRID)
        small = [resample(mask, grid) > 0.5 for mask in (main, beside)]
        enough = small[1].sum() > 0.06 * small[0].sum()
        result[kind] = (small[0], small[1] if enough else None)
    return result


# --- places --------------------------------------------------------------------------------


def place_of(thing: Detection) -> str:
    return min(PLACES, key=lambda place: abs(AT[place] - thing.x))


def in_relation(relation: str, first: list[Detection], second: list[Detection]) -> bool:
    dx = np.mean([t.x for t in second]) - np.mean([t.x for t in first])
    dy = np.mean([t.y for t in second]) - np.mean([t.y for t in first])
    along, across = along_and_across(relation, dx, dy)
    return bool(along > 0.12 and (abs(across) < along or relation in ("left of", "right of")))
