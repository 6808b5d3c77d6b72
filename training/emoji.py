"""Noto's drawings of things, in the illustrated scenes or on plain and two-tone grounds.

A `Scene` determines its image completely; `draw` paints it and `emoji_captions` describes it. As in
`scenes`, lengths are steps of `STEP`, one latent cell at 512². A thing has one fixed rendering of
each size, whose corner is on that grid. Size and position follow from what a caption says:

- a thing alone is large and in the middle; with a place it is medium; a stated size overrides both
- two things are medium, three are small and in a row
- of two different things without a relation, the first is on the left; in a scene, a thing of the
  sky is above one that is not

In a scene, "the middle" is the row in which a thing is by nature: the sky, or the ground or sea.
"""

from dataclasses import dataclass
from functools import cache
from zlib import crc32

import numpy as np

from training import painter, scenes, shapes
from training.noto import Thing, rendering, things
from training.palette import land_colour, sky_colours, snow_colour
from training.scenes import LANDS, SKIES, STEP

SIZES = {"small": 4, "medium": 6, "large": 8}  # side of a drawing in steps
ACROSS = {"left": 1, "middle": 5, "right": 9}  # left end of a medium drawing
ROW = {"small": (1, 6, 11), "medium": (1, 9)}  # left ends of three and of two
FOOT = {"small": 14, "medium": 15, "large": 14}  # lower end of what stands or swims
SKY_TOP = {"small": 2, "medium": 1, "large": 2}  # upper end of what flies
UPRIGHT = {"above": (1, 9), "on": (3, 9)}  # upper ends of two medium drawings
RELATIONS = ("left of", "right of", "beside", "above", "below", "on")
CONTRAST = 60.0  # least RGB distance of the edge of a thing from a plain ground
SCENE_CONTRAST = 40.0  # the same from everything in a scene that can be behind it


@dataclass(frozen=True)
class Scene:
    """One to three of a thing, or two things, with the relation of the first to the second."""

    things: tuple[Thing, ...]
    count: int  # of the first, if it is the only one
    size: str
    spots: tuple[tuple[int, int], ...]  # left and upper end of every drawing, in steps
    says_size: bool
    place: str | None  # which the caption must state
    relation: str | None
    ground: tuple[str, ...]  # one colour or two of `shapes.COLOURS`; empty in an illustrated scene
    axis: int  # of two colours: 0: first above second, 1: first left of second
    land: scenes.Scene | None  # sky and land without objects, unless on a plain ground

    @property
    def held_out(self) -> bool:
        """Whether training omits this combination; 1 in 12.

        It is of two things and their relation, of a thing and its number, or, of one thing alone,
        of the thing and what is around it.
        """
        parts = sorted(thing.name for thing in self.things)
        if len(self.things) == 2:
            parts.append(self.relation or "")
        elif self.count > 1:
            parts.append(str(self.count))
        elif self.land:
            parts += [self.land.sky, self.land.land]
        else:
            parts += self.ground
        return crc32("|".join(parts).encode()) % 12 == 0

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """Left, right, top and bottom of every drawing, as fractions of the image's side."""
        wide = SIZES[self.size]
        return [
            (STEP * left, STEP * (left + wide), STEP * top, STEP * (top + wide))
            for left, top in self.spots
        ]


def flies(thing: Thing) -> bool:
    return thing.place == "sky"


def sample_scene(rng: np.random.Generator) -> Scene:
    while True:
        two = rng.random() < 0.35
        chosen = tuple(things()[int(i)] for i in rng.permutation(len(things()))[: 1 + two])
        plain = rng.random() < 0.5
        scene = _plain(rng, chosen) if plain else _illustrated(rng, chosen)
        if scene is not None:
            return scene


def training_scene(rng: np.random.Generator) -> Scene:
    while True:
        scene = sample_scene(rng)
        if not scene.held_out:
            return scene


@cache
def grounds(thing: Thing) -> tuple[str, ...]:
    """Return the plain colours before which a thing can be seen."""
    return tuple(c for c, rgb in shapes.COLOURS.items() if _apart(thing, [rgb]) >= CONTRAST)


@cache
def stands_out(thing: Thing, sky: str, land: str) -> bool:
    """Whether a thing can be seen before everything that can be behind it in a scene."""
    light = "night" if sky.endswith("night") else sky
    above = sky_colours(light, 12)
    behind = [*above[1:9]]
    if not flies(thing):
        behind = [land_colour(light, land, part) for part in ("body", "ground")] + [*above[5:]]
        if land == "snowy mountains":
            behind.append(snow_colour(light))
    return _apart(thing, behind) >= SCENE_CONTRAST


def _apart(thing: Thing, behind: list) -> float:
    """Return the least RGB distance of a thing's edge from some colours."""
    return min(float(np.linalg.norm(np.subtract(a, b))) for a in thing.edge for b in behind)


def _plain(rng: np.random.Generator, chosen: tuple[Thing, ...]) -> Scene | None:
    clear = [c for c in grounds(chosen[0]) if c in grounds(chosen[-1])]
    two_tone = int(rng.random() < 0.25)
    if len(clear) < 1 + two_tone:
        return None
    ground = tuple(str(c) for c in rng.permutation(clear)[: 1 + two_tone])
    axis = int(rng.integers(2))
    if len(chosen) == 2:
        relation = str(rng.choice(["left of", "right of", "beside", "above", "below", "on"]))
        spots = _pair(relation, (5, 5))
        return Scene(chosen, 1, "medium", spots, False, None, relation, ground, axis, None)
    count = _count(rng)
    place = None
    if count == 1 and rng.random() < 0.35:
        place = str(rng.choice(["left", "right", "top", "bottom"]))
    size, says_size = _size(rng, count, place)
    side = SIZES[size]
    middle = 8 - side // 2
    if count > 1:
        spots = tuple((left, middle) for left in ROW[size])
    else:
        near, far = 4 - side // 2, 12 - side // 2
        spot = {"left": (near, middle), "right": (far, middle)}
        spot |= {"top": (middle, near), "bottom": (middle, far)}
        spots = (spot[place] if place else (middle, middle),)
    return Scene(chosen, count, size, spots, says_size, place, None, ground, axis, None)


def _illustrated(rng: np.random.Generator, chosen: tuple[Thing, ...]) -> Scene | None:
    sky, land = str(rng.choice(SKIES)), str(rng.choice(LANDS))
    swim = [thing.place == "sea" for thing in chosen]
    if any(swim):
        land = "sea"
    if not all(stands_out(thing, sky, land) for thing in chosen):
        return None
    stand = [thing.place in ("ground", "any") for thing in chosen]
    shore = land == "sea" and any(stand) and not any(swim)
    behind = scenes.Scene(sky, land, (), None, shore, int(rng.integers(2**31)))
    if len(chosen) == 2:
        relation = _relation(rng, chosen)
        if relation is None:
            return None
        spots = _pair(relation, (_top(chosen[0], "medium"), _top(chosen[1], "medium")))
        return Scene(chosen, 1, "medium", spots, False, None, relation, (), 0, behind)
    count = _count(rng)
    place = None
    if count == 1 and rng.random() < 0.35:
        place = str(rng.choice(["left", "right"]))
    size, says_size = _size(rng, count, place)
    top = _top(chosen[0], size)
    if count > 1:
        spots = tuple((left, top) for left in ROW[size])
    else:
        centre = {None: 8, "left": 4, "right": 12}[place]
        spots = ((centre - SIZES[size] // 2, top),)
    return Scene(chosen, count, size, spots, says_size, place, None, (), 0, behind)


def _count(rng: np.random.Generator) -> int:
    return 1 + int(rng.choice(3, p=(0.66, 0.18, 0.16)))


def _size(rng: np.random.Generator, count: int, place: str | None) -> tuple[str, bool]:
    """Return a size, and whether the caption must state it."""
    if count > 1:
        return ("medium" if count == 2 else "small"), False
    usual = "medium" if place else "large"
    if rng.random() < 0.65:
        return usual, False
    return str(rng.choice(["small", "medium"] if place else list(SIZES))), True


def _top(thing: Thing, size: str) -> int:
    return SKY_TOP[size] if flies(thing) else FOOT[size] - SIZES[size]


def _pair(relation: str, tops: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Place two medium drawings; side by side they keep the upper ends `tops`."""
    if relation in UPRIGHT:
        high, low = UPRIGHT[relation]
        return (5, high), (5, low)
    if relation == "below":
        low, high = _pair("above", tops)
        return high, low
    left, right = ROW["medium"]
    if relation == "right of":
        left, right = right, left
    return (left, tops[0]), (right, tops[1])


def _relation(rng: np.random.Generator, chosen: tuple[Thing, ...]) -> str | None:
    """Choose a relation that two things can have in a scene."""
    first, second = (thing.place for thing in chosen)
    if {first, second} in ({"sea", "ground"}, {"sea", "any"}):
        return "on" if second == "sea" and chosen[1].category == "vehicle" else None
    if first != "sky" and second == "sky":
        return "below"
    if first == "sky" and second != "sky":
        return "above"
    options = ["left of", "right of", "beside"]
    if "sea" not in (first, second) and first != "sky":
        options.append("on")
    return str(rng.choice(options))


def draw(scene: Scene, side: int, window: tuple[int, int, int] | None = None) -> np.ndarray:
    """Draw uint8 RGB (side, side, 3), or only a `window` (top, left, size) of it.

    `side` is a multiple of 16. Raises `npm.PackageUnavailable` if there are no drawings.
    """
    top, left, size = window or (0, 0, side)
    if scene.land:
        busy = [(l + r) / 2 for l, r, upper, _ in scene.boxes if upper < 0.3]  # noqa: E741
        image = painter.backdrop(scene.land, busy, side, window).pixels()
    else:
        image = shapes.draw(shapes.Scene((), scene.ground, scene.axis), side, window)
    whole = image.astype(np.float32)
    step = side // 16
    pixels = SIZES[scene.size] * step
    for i, (column, row) in enumerate(scene.spots):
        sprite = rendering(scene.things[i % len(scene.things)], pixels)
        x, y = column * step - left, row * step - top
        x0, x1, y0, y1 = max(x, 0), min(x + pixels, size), max(y, 0), min(y + pixels, size)
        if x0 < x1 and y0 < y1:
            part = sprite[y0 - y : y1 - y, x0 - x : x1 - x].astype(np.float32)
            area = whole[y0:y1, x0:x1]
            area += part[..., 3:] / 255 * (part[..., :3] - area)
    return np.rint(whole).astype(np.uint8)
