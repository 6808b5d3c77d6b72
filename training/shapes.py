"""Flat shapes on plain or two-tone backgrounds, one of the two kinds of training images.

A `Scene` determines its image completely; `draw` paints it and `describe` writes one of many
captions. Lengths are fractions of the image's side, with x to the right and y down. As in `scenes`,
position and size of a shape follow from the caption: a shape without either is of medium size and
in the centre.
"""

from dataclasses import dataclass
from zlib import crc32

import numpy as np

from training.captions import Pick, article
from training.outlines import box, fan, polygon

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (45, 160, 70),
    "cyan": (60, 205, 215),
    "blue": (40, 85, 215),
    "purple": (130, 55, 180),
    "pink": (250, 145, 185),
    "brown": (120, 72, 38),
    "black": (22, 22, 26),
    "white": (245, 245, 245),
    "gray": (140, 142, 146),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "hexagon")
SIZES = {"small": 0.14, "medium": 0.2, "large": 0.28}
POSITIONS = {
    "centre": (0.5, 0.5),
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
}
OUTER = 1.2  # reach of the largest shape, in radii
RELATIONS = ("above", "below", "left of", "right of")


@dataclass(frozen=True)
class Object:
    shape: str
    colour: str
    x: float
    y: float
    radius: float
    size: str | None = None  # as stated in the caption, None if it is not
    position: str | None = None


@dataclass(frozen=True)
class Scene:
    """One object, or two with the `relation` of the first to the second."""

    objects: tuple[Object, ...]
    background: tuple[str, ...]  # one colour, or two
    axis: int = 0  # of a two-tone background: 0: first above second, 1: first left of second
    relation: str | None = None

    @property
    def held_out(self) -> bool:
        """Whether training omits these colours, shapes and relation; 1 set in 12."""
        parts = [f"{o.colour} {o.shape}" for o in self.objects]
        key = "|".join([*parts, *self.background, self.relation or ""])
        return crc32(key.encode()) % 12 == 0

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """Left, right, top and bottom of every object."""
        return [
            (
                o.x - OUTER * o.radius,
                o.x + OUTER * o.radius,
                o.y - OUTER * o.radius,
                o.y + OUTER * o.radius,
            )
            for o in self.objects
        ]


def sample_scene(rng: np.random.Generator, objects: int | None = None) -> Scene:
    """Sample a scene of one or two objects, with probability 0.45 and 0.55 if not given."""
    count = objects or (2 if rng.random() < 0.55 else 1)
    two_tone = rng.random() < 0.25
    names = [str(c) for c in rng.permutation(list(COLOURS))]
    background = tuple(names[: 1 + two_tone])
    palette = names[1 + two_tone :]
    axis = int(rng.integers(2))
    if count == 1:
        size = str(rng.choice(list(SIZES)))
        position = "centre" if rng.random() < 0.4 else str(rng.choice(list(POSITIONS)))
        radius = SIZES[size]
        inset = OUTER * radius  # keeps every shape completely inside the image
        x, y = (float(np.clip(at, inset, 1 - inset)) for at in POSITIONS[position])
        found = Object(
            shape=str(rng.choice(SHAPES)),
            colour=palette[0],
            x=x,
            y=y,
            radius=radius,
            size=size if size != "medium" or rng.random() < 0.3 else None,
            position=position if position != "centre" or rng.random() < 0.4 else None,
        )
        return Scene((found,), background, axis)
    relation = str(rng.choice(RELATIONS))
    upright = relation in ("above", "below")
    first_end = -1 if relation in ("above", "left of") else 1
    pair = []
    for i, end in enumerate((first_end, -first_end)):
        centre = (0.5, 0.5 + 0.25 * end)
        pair.append(
            Object(
                shape=str(rng.choice(SHAPES)),
                colour=palette[i if rng.random() < 0.9 else 0],
                x=centre[0 if upright else 1],
                y=centre[1 if upright else 0],
                radius=0.17,
            )
        )
    return Scene(tuple(pair), background, axis, relation)


def training_scene(rng: np.random.Generator) -> Scene:
    while True:
        scene = sample_scene(rng)
        if not scene.held_out:
            return scene


# --- captions ------------------------------------------------------------------------------


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """Write a caption in one of many wordings; all that it states is true."""
    pick = lambda *options: str(options[int(rng.integers(len(options)))])  # noqa: E731
    names = [_name(o, pick) for o in scene.objects]
    ground = _ground(scene.background, scene.axis, pick)
    if scene.relation:
        relation = {
            "above": pick("above", "above", "over"),
            "below": pick("below", "below", "under"),
            "left of": pick("to the left of", "left of"),
            "right of": pick("to the right of", "right of"),
        }[scene.relation]
        what = f"{names[0]} {relation} {names[1]}"
    else:
        what = names[0]
        position = scene.objects[0].position
        if position:
            where = {
                "centre": pick("in the centre", "in the middle", "at the center"),
                "left": pick("on the left", "at the left", "on the left side"),
                "right": pick("on the right", "at the right", "on the right side"),
                "top": pick("at the top", "in the top", "near the top"),
                "bottom": pick("at the bottom", "in the bottom", "near the bottom"),
            }[position]
            what = f"{what} {where}"
    opening = pick("", "", "", "", "a picture of ", "an image of ", "a drawing of ", "there is ")
    return _before(what, ground, opening, pick)


def on_ground(what: str, background: tuple[str, ...], axis: int, opening: str, pick: Pick) -> str:
    """Write a caption of something else on such a background."""
    one_of = lambda *options: pick(options)  # noqa: E731
    return _before(what, _ground(background, axis, one_of), opening, one_of)


def _before(what: str, ground: str, opening: str, pick) -> str:
    return pick(
        f"{opening}{what} on {ground}",
        f"{opening}{what} on {ground}",
        f"{opening}{what}, {ground}",
        f"{opening}{what} against {ground}",
        f"{ground} with {what}",
    )


def _name(thing: Object, pick) -> str:
    size = {
        None: "",
        "small": pick("small ", "little "),
        "medium": pick("medium ", "medium-sized "),
    }
    size["large"] = pick("large ", "big ")
    colour = pick("gray", "grey") if thing.colour == "gray" else thing.colour
    return article(f"{size[thing.size]}{colour} {thing.shape}")


def _ground(background: tuple[str, ...], axis: int, pick) -> str:
    if len(background) == 1:
        colour = background[0]
        return pick(
            article(f"{colour} background"),
            article(f"{colour} background"),
            article(f"plain {colour} background"),
            colour,
        )
    first, second = background
    if axis == 0:
        return pick(
            f"a background of {first} over {second}",
            f"a background that is {first} above and {second} below",
            f"a background with a {first} top half and a {second} bottom half",
        )
    return pick(
        f"a background of {first} beside {second}",
        f"a background that is {first} on the left and {second} on the right",
        f"a background with a {first} left half and a {second} right half",
    )


# --- pixels --------------------------------------------------------------------------------


def draw(scene: Scene, side: int, window: tuple[int, int, int] | None = None) -> np.ndarray:
    """Draw uint8 RGB (side, side, 3), anti-aliased, or only a `window` (top, left, size) of it."""
    top, left, size = window or (0, 0, side)
    x = (np.arange(left, left + size, dtype=np.float32) + 0.5)[None, :] / side
    y = (np.arange(top, top + size, dtype=np.float32) + 0.5)[:, None] / side
    image = np.empty((size, size, 3), np.float32)
    image[:] = COLOURS[scene.background[0]]
    if len(scene.background) == 2:
        along = y if scene.axis == 0 else x
        _paint(image, (0.5 - along) * side + np.zeros_like(image[..., 0]), scene.background[1])
    for thing in scene.objects:
        u, v = np.broadcast_arrays((x - thing.x) / thing.radius, (y - thing.y) / thing.radius)
        reach = 1.35 * thing.radius
        if abs(x - thing.x).min() < reach and abs(y - thing.y).min() < reach:
            distance = shape_distance(thing.shape, u, v) * thing.radius * side
            _paint(image, distance, thing.colour)
    return np.rint(image).astype(np.uint8)


def _paint(image: np.ndarray, distance: np.ndarray, colour: str) -> None:
    """Fill the pixels with a negative signed distance (in pixels), edges by coverage."""
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    image += cover * (np.array(COLOURS[colour], np.float32) - image)


def shape_distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the signed distance to a shape of radius about 1 around the origin."""
    if shape == "circle":
        return np.hypot(u, v) - 0.95
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.76) - 0.24
    if shape == "square":
        return box(u, v, 0.85, 0.85)
    if shape == "cross":
        return np.minimum(box(u, v, 1.0, 0.32), box(u, v, 0.32, 1.0))
    if shape == "heart":
        return _heart(u, v)
    return polygon(_CORNERS[shape], u, v)


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Two circular lobes of radius √2/4 over a square corner, tip down."""
    scale = 1.75
    p, q = np.abs(u) / scale, 0.56 - v / scale
    lobe = np.hypot(p - 0.25, q - 0.75) - np.sqrt(2) / 4
    along = np.maximum(p + q, 0) / 2
    corner = np.minimum(np.hypot(p, q - 1), np.hypot(p - along, q - along)) * np.sign(p - q)
    return np.where(p + q > 1, lobe, corner) * scale


_CORNERS = {
    "triangle": fan((1.2,), 3, -np.pi / 2, down=0.25),
    "star": fan((1.18, 0.5), 10, -np.pi / 2, down=0.08),
    "hexagon": fan((1.05,), 6, 0.0),
}
