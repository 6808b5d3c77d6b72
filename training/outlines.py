"""Signed distances to outlines: negative inside, in the units of u (right) and v (down)."""

import numpy as np

Field = np.ndarray


def disc(u: Field, v: Field, x: float, y: float, radius: float) -> Field:
    return np.hypot(u - x, v - y) - radius


def ellipse(u: Field, v: Field, x: float, y: float, a: float, b: float) -> Field:
    """Correct to first order in the distance, which suffices for an edge one pixel wide."""
    p, q = (u - x) / a, (v - y) / b
    near = np.hypot(p, q)
    return near * (near - 1) / np.maximum(np.hypot(p / a, q / b), 1e-6)


def box(u: Field, v: Field, half_width: float, half_height: float) -> Field:
    a, b = np.abs(u) - half_width, np.abs(v) - half_height
    return np.hypot(np.maximum(a, 0), np.maximum(b, 0)) + np.minimum(np.maximum(a, b), 0)


def capsule(
    u: Field, v: Field, start: tuple[float, float], end: tuple[float, float], radius: float
) -> Field:
    (ax, ay), (bx, by) = start, end
    dx, dy = bx - ax, by - ay
    t = np.clip(((u - ax) * dx + (v - ay) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(u - ax - t * dx, v - ay - t * dy) - radius


def polygon(corners: np.ndarray, u: Field, v: Field) -> Field:
    """The sign is the parity of the edges crossed on the way to the right."""
    nearest = np.full(u.shape, np.inf, np.float32)
    inside = np.zeros(u.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        dx, dy = bx - ax, by - ay
        t = np.clip(((u - ax) * dx + (v - ay) * dy) / (dx * dx + dy * dy), 0, 1)
        np.minimum(nearest, (u - ax - t * dx) ** 2 + (v - ay - t * dy) ** 2, out=nearest)
        if ay != by:
            crosses = (ay > v) != (by > v)
            inside ^= crosses & (u < ax + (v - ay) * dx / dy)
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def convex(corners: np.ndarray, u: Field, v: Field) -> Field:
    """For corners in clockwise order on screen. Exact at edges, too small beyond corners."""
    distance = np.full(u.shape, -np.inf, np.float32)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        length = np.hypot(bx - ax, by - ay)
        np.maximum(distance, ((u - ax) * (by - ay) - (v - ay) * (bx - ax)) / length, out=distance)
    return distance


def union(*fields: Field) -> Field:
    result = fields[0]
    for field in fields[1:]:
        result = np.minimum(result, field)
    return result


def both(first: Field, second: Field) -> Field:
    return np.maximum(first, second)


def corners(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, np.float32)


def fan(radii: tuple[float, ...], count: int, start: float, down: float = 0.0) -> np.ndarray:
    """Return corners around the origin, with the radii in turn, the first at angle `start`."""
    angles = start + 2 * np.pi * np.arange(count) / count
    reach = np.resize(radii, count)
    return np.stack([reach * np.cos(angles), reach * np.sin(angles) + down], 1).astype(np.float32)
