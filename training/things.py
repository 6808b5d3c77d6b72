"""The nine kinds of objects as lists of parts, which are painted in order.

A part is a role and an outline in the object's own units: u from -1 to 1 to the right, v from -1 at
its top to 1 at its bottom. "main" is the colour named in captions, "shade" a darker tone of it, and
all other roles are details.
"""

from collections.abc import Callable

import numpy as np

from training.outlines import (
    Field,
    both,
    box,
    capsule,
    convex,
    corners,
    disc,
    ellipse,
    polygon,
    union,
)

Part = tuple[str, Callable[[Field, Field], Field]]


def _roofline(u: Field, v: Field) -> Field:
    return convex(corners((0.0, -0.98), (0.86, -0.06), (-0.86, -0.06)), u, v)


def _walls(u: Field, v: Field) -> Field:
    return box(u, v - 0.46, 0.64, 0.54)


def _crown(u: Field, v: Field) -> Field:
    return union(
        disc(u, v, 0.0, -0.55, 0.42),
        disc(u, v, -0.4, -0.14, 0.38),
        disc(u, v, 0.4, -0.14, 0.38),
        disc(u, v, 0.0, -0.05, 0.4),
    )


def _tiers(u: Field, v: Field) -> Field:
    return union(
        convex(corners((0, -1.0), (0.36, -0.38), (-0.36, -0.38)), u, v),
        convex(corners((0, -0.68), (0.5, 0.14), (-0.5, 0.14)), u, v),
        convex(corners((0, -0.26), (0.64, 0.7), (-0.64, 0.7)), u, v),
    )


def _trunk(u: Field, v: Field) -> Field:
    return both(capsule(u, v, (0, -0.78), (0, 1.3), 0.21), v - 1.0)


def _saguaro(u: Field, v: Field) -> Field:
    return union(
        _trunk(u, v),
        capsule(u, v, (-0.52, -0.3), (-0.52, 0.16), 0.14),
        capsule(u, v, (-0.52, 0.2), (0, 0.28), 0.14),
        capsule(u, v, (0.52, -0.5), (0.52, 0.0), 0.14),
        capsule(u, v, (0.52, 0.0), (0, 0.1), 0.14),
    )


def _hull(u: Field, v: Field) -> Field:
    return convex(corners((-0.92, 0.42), (0.92, 0.42), (0.6, 0.92), (-0.6, 0.92)), u, v)


def _envelope(u: Field, v: Field) -> Field:
    skirt = corners((-0.6, 0.04), (0.6, 0.04), (0.18, 0.54), (-0.18, 0.54))
    return union(disc(u, v, 0, -0.27, 0.7), convex(skirt, u, v))


def _cloud(u: Field, v: Field) -> Field:
    return union(
        disc(u, v, -0.5, 0.06, 0.32),
        disc(u, v, -0.06, -0.16, 0.46),
        disc(u, v, 0.44, 0.0, 0.36),
        box(u, v - 0.22, 0.66, 0.0) - 0.18,
    )


def _bird(u: Field, v: Field) -> Field:
    return union(
        ellipse(u, v, 0.05, 0.3, 0.56, 0.27),
        disc(u, v, 0.54, 0.08, 0.22),
        polygon(corners((-0.3, 0.2), (-0.98, 0.02), (-0.8, 0.3), (-0.94, 0.5), (-0.2, 0.42)), u, v),
        _wing(u, v),
    )


def _wing(u: Field, v: Field) -> Field:
    feathers = ((-0.28, 0.34), (-0.62, -0.5), (-0.44, -0.86), (-0.02, -0.4), (0.3, 0.22))
    return polygon(corners(*feathers), u, v)


def _arches(u: Field, v: Field) -> Field:
    holes = union(*(ellipse(u, v, x, 0.5, 0.22, 0.46) for x in (-0.56, 0.0, 0.56)))
    return both(box(u, v - 0.1, 0.98, 0.38), -holes)


THINGS: dict[str, tuple[Part, ...]] = {
    "house": (
        ("rust", lambda u, v: box(u - 0.42, v + 0.66, 0.1, 0.24)),
        ("main", _walls),
        ("shade", lambda u, v: both(_walls(u, v), 0.3 - u)),
        ("rust", _roofline),
        ("wood", lambda u, v: box(u, v - 0.72, 0.15, 0.28)),
        (
            "window",
            lambda u, v: union(
                box(u + 0.4, v - 0.4, 0.12, 0.15), box(u - 0.4, v - 0.4, 0.12, 0.15)
            ),
        ),
    ),
    "tree": (
        (
            "wood",
            lambda u, v: convex(corners((-0.1, 0.0), (0.1, 0.0), (0.16, 1), (-0.16, 1)), u, v),
        ),
        ("main", _crown),
        ("shade", lambda u, v: both(_crown(u, v), -disc(u, v, -0.22, -0.38, 0.66))),
    ),
    "pine": (
        ("wood", lambda u, v: box(u, v - 0.8, 0.11, 0.2)),
        ("main", _tiers),
        ("shade", lambda u, v: both(_tiers(u, v), 0.04 - u)),
    ),
    "cactus": (
        ("main", _saguaro),
        ("shade", lambda u, v: both(_trunk(u, v), 0.06 - u)),
    ),
    "boat": (
        ("wood", lambda u, v: box(u + 0.02, v + 0.24, 0.035, 0.7)),
        ("cream", lambda u, v: convex(corners((0.07, -0.94), (0.72, 0.3), (0.07, 0.3)), u, v)),
        ("cream", lambda u, v: convex(corners((-0.11, -0.72), (-0.11, 0.3), (-0.6, 0.3)), u, v)),
        ("main", _hull),
        ("shade", lambda u, v: both(_hull(u, v), 0.7 - v)),
    ),
    "balloon": (
        ("wood", lambda u, v: capsule(np.abs(u), v, (0.16, 0.5), (0.12, 0.8), 0.02)),
        ("wood", lambda u, v: box(u, v - 0.87, 0.16, 0.13)),
        ("main", _envelope),
        ("shade", lambda u, v: both(_envelope(u, v), ellipse(u, v, 0, -0.2, 0.48, 0.95))),
        ("main", lambda u, v: both(_envelope(u, v), ellipse(u, v, 0, -0.2, 0.19, 0.95))),
    ),
    "cloud": (
        ("main", _cloud),
        ("shade", lambda u, v: both(_cloud(u, v), 0.2 - v)),
    ),
    "bird": (
        ("wood", lambda u, v: convex(corners((0.7, 0.0), (0.98, 0.14), (0.7, 0.2)), u, v)),
        ("main", _bird),
        ("shade", _wing),
        ("ink", lambda u, v: disc(u, v, 0.6, 0.04, 0.055)),
    ),
    "bridge": (
        ("main", _arches),
        ("shade", lambda u, v: both(_arches(u, v), v + 0.16)),
        ("main", lambda u, v: box(u, v + 0.36, 0.98, 0.035)),
        *(
            ("main", lambda u, v, x=x: box(u - x, v + 0.31, 0.03, 0.07))
            for x in (-0.95, -0.57, -0.19, 0.19, 0.57, 0.95)
        ),
    ),
}
# Extent of the outline, as (width, top, bottom) in the same units, for the layout.
REACH = {
    "house": (0.88, -1.0, 1.0),
    "tree": (0.8, -1.0, 1.0),
    "pine": (0.66, -1.0, 1.0),
    "cactus": (0.68, -1.0, 1.0),
    "boat": (0.94, -0.98, 0.94),
    "balloon": (0.72, -1.0, 1.0),
    "cloud": (0.86, -0.64, 0.42),
    "bird": (1.0, -0.88, 0.6),
    "bridge": (1.0, -0.42, 0.5),
}
