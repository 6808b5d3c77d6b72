"""Illustrated scenes of a sky, a land and objects, one of the two kinds of training images.

A `Scene` determines its image completely; `painter` paints it and `captions` describes it. Lengths
are fractions of the image's side, with x to the right and y down. Every kind of object has a fixed
size and is placed on a grid of `STEP`, like the sprites of an old game: a latent cell at 512²
always holds the same part of an object, which a small model can memorise. The position of an object
follows from the caption (`captions`), since a small model that may choose between two positions
draws something at both.
"""

from dataclasses import dataclass
from functools import cache
from zlib import crc32

import numpy as np

from training.palette import COLOURS, land_colour, sky_colours, snow_colour, thing_colour
from training.things import REACH

SKIES = ("dawn", "noon", "sunset", "starry night", "moonlit night")
LANDS = ("mountains", "snowy mountains", "hills", "dunes", "sea", "city")
FLYING = ("balloon", "cloud", "bird")
STANDING = ("house", "tree", "pine", "cactus")
SAILING = ("boat", "bridge")
KINDS = (*STANDING, *SAILING, *FLYING)
PLACES = ("left", "middle", "right")
RELATIONS = ("left of", "right of", "above", "below")
STEP = 1 / 16  # one latent cell at 512²
AT = {"left": 0.25, "middle": 0.5, "right": 0.75}
WEARS = {
    "house": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white"),
    "tree": ("green", "red", "orange", "yellow", "pink"),
    "pine": ("green", "blue", "white", "orange"),
    "cactus": ("green", "purple", "pink"),
    "boat": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white"),
    "bridge": ("red", "orange", "white", "purple"),
    "balloon": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white"),
    "bird": ("red", "yellow", "blue", "purple", "white", "orange"),
    "cloud": ("white",),
}
HORIZON = {  # upper end of the ground or the water
    "mountains": 0.76,
    "snowy mountains": 0.76,
    "hills": 0.78,
    "dunes": 0.78,
    "sea": 0.56,
    "city": 0.78,
}
CONTRAST = 55.0  # least RGB distance of an object's colour from everything behind it


@dataclass(frozen=True)
class Group:
    """One to three objects of a kind and colour; `spots` are x, y and half the height of each."""

    kind: str
    colour: str
    spots: tuple[tuple[float, float, float], ...]
    place: str | None = None  # only of an object that is alone in its row

    @property
    def count(self) -> int:
        return len(self.spots)


@dataclass(frozen=True)
class Scene:
    sky: str
    land: str
    groups: tuple[Group, ...]  # at most two
    relation: str | None  # of the first group to the second
    shore: bool  # whether a sea has a beach, on which objects can stand
    seed: int  # of details in no caption: ridges, stars, position of sun or moon

    @property
    def light(self) -> str:
        return "night" if self.sky.endswith("night") else self.sky

    @property
    def one_row(self) -> bool:
        """Whether all objects fly, all stand, or all are in the water."""
        return len({_row(group.kind) for group in self.groups}) == 1

    @property
    def held_out(self) -> bool:
        """Whether training omits these objects (for one: with sky and land); 1 set in 12."""
        if not self.groups:
            return False
        parts = sorted(f"{g.count} {g.colour} {g.kind}" for g in self.groups)
        parts += [self.relation or ""] if len(parts) == 2 else [self.sky, self.land]
        return crc32("|".join(parts).encode()) % 12 == 0

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """Left, right, top and bottom of every object."""
        return [
            (x - half * wide, x + half * wide, y + half * top, y + half * bottom)
            for group in self.groups
            for wide, top, bottom in (REACH[group.kind],)
            for x, y, half in group.spots
        ]


@cache
def wearable(kind: str, light: str, land: str) -> tuple[str, ...]:
    """Return the colours of an object that stand out from everything that can be behind it."""
    sky, body = sky_colours(light, 12), land_colour(light, land, "body")
    ground = land_colour(light, land, "ground")
    if kind in SAILING:
        behind = [body, body * 0.9]
    elif kind in FLYING:
        behind = [*sky[1:9]]
    else:
        behind = [ground, body, *sky[7:]] if land != "sea" else [ground, body]
    if kind != "cloud" and land == "snowy mountains":
        behind.append(snow_colour(light))
    return tuple(
        colour
        for colour in WEARS[kind]
        if kind == "cloud"
        or min(np.linalg.norm(thing_colour(light, colour) - b) for b in behind) >= CONTRAST
    )


def sample_scene(rng: np.random.Generator) -> Scene:
    while True:
        sky = str(rng.choice(SKIES, p=(0.24, 0.24, 0.24, 0.14, 0.14)))
        land = str(rng.choice(LANDS, p=(0.15, 0.15, 0.15, 0.14, 0.26, 0.15)))
        scene = _arranged(rng, sky, land, _kinds(rng, land))
        if scene is not None:
            return scene


def training_scene(rng: np.random.Generator) -> Scene:
    while True:
        scene = sample_scene(rng)
        if not scene.held_out:
            return scene


def _kinds(rng: np.random.Generator, land: str) -> tuple[str, ...]:
    known = [*FLYING, *STANDING, *(SAILING if land == "sea" else ())]
    likely = np.array([3.0 if kind in SAILING else 1.0 for kind in known])
    count = int(rng.choice(3, p=(0.06, 0.42, 0.52)))
    chosen = rng.choice(known, count, replace=False, p=likely / likely.sum())
    return tuple(str(kind) for kind in chosen)


def _row(kind: str) -> str:
    return next(
        name for name, of in (("fly", FLYING), ("stand", STANDING), ("sail", SAILING)) if kind in of
    )


def _arranged(
    rng: np.random.Generator, sky: str, land: str, kinds: tuple[str, ...]
) -> Scene | None:
    """Arrange objects; return None if they do not fit this sky and land."""
    rows = [_row(kind) for kind in kinds]
    if ("sail" in rows and land != "sea") or set(rows) == {"sail", "stand"}:
        return None
    if kinds.count("bridge") > 1 or set(kinds) == {"bridge", "boat"}:
        return None
    light = "night" if sky.endswith("night") else sky
    colours = []
    for kind in kinds:
        free = [c for c in wearable(kind, light, land) if c not in colours or rng.random() < 0.1]
        if not free:
            return None
        colours.append(str(rng.choice(free)))
    likely = (0.5, 0.26, 0.24) if len(kinds) == 1 else (0.7, 0.18, 0.12)
    counts = tuple(1 if k == "bridge" else 1 + int(rng.choice(3, p=likely)) for k in kinds)
    shared = len(kinds) == 2 and rows[0] == rows[1]
    if sum(counts) > 4 or (shared and sum(counts) > 3):
        return None
    under = sky in ("noon", "moonlit night")  # sun or moon is high and needs room
    spots = _spots(rng, kinds, counts, rows, under)
    groups, places = [], []
    for kind, colour, row_spots, count in zip(kinds, colours, spots, counts, strict=True):
        x = row_spots[0][0]
        alone = count == 1 and not shared and kind != "bridge"
        places.append(next((p for p in PLACES if abs(AT[p] - x) < 0.08), None) if alone else None)
        groups.append(Group(kind, colour, tuple(row_spots), places[-1]))
    relation = _relation(groups) if len(groups) == 2 else None
    shore = land == "sea" and "stand" in rows
    return Scene(sky, land, tuple(groups), relation, shore, int(rng.integers(2**31)))


def _spots(
    rng: np.random.Generator,
    kinds: tuple[str, ...],
    counts: tuple[int, ...],
    rows: list[str],
    under: bool,
) -> list[list[tuple[float, float, float]]]:
    """Place objects: those of one row share its width, those of two rows are independent."""
    result: list[list[tuple[float, float, float]]] = []
    if len(kinds) == 2 and rows[0] == rows[1]:
        across = _across(sum(counts))
        if rng.random() < 0.5:  # the first group may be on either side
            halves = across[: counts[0]], across[counts[0] :]
        else:
            halves = across[counts[1] :], across[: counts[1]]
    elif len(kinds) == 2 and counts == (1, 1) and "bridge" not in kinds and rng.random() < 0.4:
        ends = [AT["left"]], [AT["right"]]
        halves = ends if rng.random() < 0.5 else ends[::-1]
    elif counts == (1,):
        halves = ([AT[str(rng.choice(PLACES, p=(0.25, 0.5, 0.25)))]],)
    else:
        halves = tuple(_across(count) for count in counts)
    crowd = sum(counts) if len(set(rows)) < len(rows) else max(counts, default=1)
    for kind, row, across in zip(kinds, rows, halves if kinds else (), strict=True):
        half = {"fly": 0.155, "stand": 0.185, "sail": 0.17}[row]
        half *= {"cloud": 1.1, "bird": 0.95, "bridge": 2.2}.get(kind, 1.0)
        half = min(half, 0.38 / (1 if kind == "bridge" else crowd) / REACH[kind][0])
        if kind == "bridge":
            across = [0.5]
        foot = {"stand": 14.5 * STEP, "sail": 13 * STEP}
        y = {
            "fly": STEP * (5 if under and len(across) > 1 else 4),
            "stand": foot["stand"] - half,
            "sail": 10.5 * STEP if kind == "bridge" else foot["sail"] - half,
        }[row]
        result.append([(x, y, half) for x in across])
    return result


def _across(count: int) -> list[float]:
    """Return the positions of objects in a row, from left to right."""
    first, pitch = {1: (8, 0), 2: (4, 8), 3: (3, 5)}[count]
    return [STEP * (first + pitch * i) for i in range(count)]


def _relation(groups: list[Group]) -> str | None:
    """Return the relation of the first group to the second if it is unmistakable."""
    first, second = groups
    rows = _row(first.kind), _row(second.kind)
    dx = np.mean([s[0] for s in first.spots]) - np.mean([s[0] for s in second.spots])
    if rows[0] == rows[1]:
        return "left of" if dx < 0 else "right of"
    if first.count == second.count == 1:
        if abs(dx) < 0.12:
            return "above" if rows[0] == "fly" else "below"
        if abs(dx) > 0.4:
            return "left of" if dx < 0 else "right of"
    return None


def named_colours(kind: str) -> bool:
    """Whether captions name the colour of this kind. Clouds have only one."""
    return len(WEARS[kind]) > 1


assert set(COLOURS) == {colour for wears in WEARS.values() for colour in wears}
