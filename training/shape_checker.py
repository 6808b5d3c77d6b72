"""Check from the pixels alone, fact by fact, whether an image of shapes matches its scene.

Every pixel is assigned the nearest colour. The object of a colour is its largest connected patch,
and its shape the one whose outline, after scaling to the same area and centring, overlaps most.
"""

from functools import cache

import numpy as np
from scipy import ndimage

from training.patches import along_and_across, resample, scaled_grid
from training.shapes import COLOURS, POSITIONS, SHAPES, SIZES, Object, Scene, shape_distance

NAMES = list(COLOURS)
PALETTE = np.array(list(COLOURS.values()), np.float32)
GRID = 96  # side of the square in which outlines are compared; a shape fills a fifth of it
# Least intersection over union for a patch to be a shape. It was chosen by eye on images of the
# bundled model: above it every star, ring and cross is clearly one (thin shapes lose overlap fast),
# below it there are circles with tails.
MIN_OVERLAP = 0.75
MIN_AREA = 0.012  # of the image; smaller patches are ignored
MIN_COVER = 0.9  # least share of a background's pixels in its colour
FAR_COLOUR = 60.0  # largest RGB distance of a patch's mean from its colour


def check(scene: Scene, pixels: np.ndarray) -> dict[str, bool]:
    """Return for every attribute that a caption can state whether uint8 RGB `pixels` show it."""
    names = nearest_colours(pixels)
    verdict = {"background": ground_is(scene.background, scene.axis, names, pixels)}
    patches = [_patch(thing, scene, names) for thing in scene.objects]
    if len(patches) == 2 and scene.objects[0].colour == scene.objects[1].colour:
        patches = _two_patches(scene, names)
    for i, (thing, patch) in enumerate(zip(scene.objects, patches, strict=True), 1):
        verdict[f"colour {i}"] = patch is not None and _is_colour(thing.colour, patch, pixels)
        verdict[f"shape {i}"] = patch is not None and shape_of(patch) == thing.shape
    found = [patch for patch in patches if patch is not None]
    if scene.relation:
        whole = len(found) == 2 and _in_relation(scene.relation, *found)
        verdict["relation"] = whole
    else:
        thing = scene.objects[0]
        if thing.position:
            verdict["position"] = bool(found) and position_of(found[0]) == thing.position
        if thing.size:
            verdict["size"] = bool(found) and size_of(found[0]) == thing.size
    taken = np.zeros_like(names, bool)
    for patch in found:
        taken |= ndimage.binary_dilation(patch, iterations=4)
    verdict["nothing else"] = nothing_else(scene.background, scene.axis, names, taken)
    return verdict


def nearest_colours(pixels: np.ndarray) -> np.ndarray:
    """Return indices into `NAMES`, (H, W), after light smoothing against single stray pixels."""
    smooth = ndimage.uniform_filter(pixels.astype(np.float32), size=(3, 3, 1))
    distance = [np.square(smooth - colour).sum(-1) for colour in PALETTE]
    return np.argmin(distance, axis=0)


def ground_is(
    background: tuple[str, ...],
    axis: int,
    names: np.ndarray,
    pixels: np.ndarray,
    taken: np.ndarray | None = None,
) -> bool:
    """Check that the pixels near the edge of each half (or the whole) have its colour.

    Pixels that are `taken` by something else do not count.
    """
    height, width = names.shape
    frame = np.ones_like(names, bool)
    edge = height // 24
    frame[edge:-edge, edge:-edge] = False
    if taken is not None:
        frame &= ~taken
    if len(background) == 1:
        areas = [frame]
    else:
        middle = np.indices(names.shape)[axis] * 2 - (height, width)[axis]
        margin = height // 12
        areas = [frame & (middle < -margin), frame & (middle > margin)]
    return all(
        (names[area] == NAMES.index(colour)).mean() >= MIN_COVER
        and _is_colour(colour, area & (names == NAMES.index(colour)), pixels)
        for area, colour in zip(areas, background, strict=True)
    )


def _is_colour(colour: str, area: np.ndarray, pixels: np.ndarray) -> bool:
    if not area.any():
        return False
    mean = pixels[area].astype(np.float32).mean(0)
    return float(np.linalg.norm(mean - COLOURS[colour])) < FAR_COLOUR


def _components(colour: str, names: np.ndarray) -> list[np.ndarray]:
    """Return the connected patches of a colour, largest first, without small ones."""
    labels, count = ndimage.label(names == NAMES.index(colour))
    sizes = ndimage.sum_labels(np.ones_like(names), labels, range(1, count + 1))
    order = np.argsort(-np.asarray(sizes))
    return [labels == i + 1 for i in order if sizes[i] >= MIN_AREA * names.size]


def _patch(thing: Object, scene: Scene, names: np.ndarray) -> np.ndarray | None:
    if thing.colour in scene.background:
        return None
    patches = _components(thing.colour, names)
    return patches[0] if patches else None


def _two_patches(scene: Scene, names: np.ndarray) -> list[np.ndarray | None]:
    """Assign two patches of one colour to the two objects by the relation between them."""
    patches = _components(scene.objects[0].colour, names)[:2]
    if len(patches) < 2:
        return [patches[0] if patches else None, None]
    first, second = patches
    return [first, second] if _in_relation(scene.relation or "", first, second) else [second, first]


def _centre(patch: np.ndarray) -> tuple[float, float]:
    """Return the centre (x, y) of the bounding box, as fractions of the image."""
    rows, columns = np.nonzero(patch)
    height, width = patch.shape
    return (
        (columns.min() + columns.max() + 1) / 2 / width,
        (rows.min() + rows.max() + 1) / 2 / height,
    )


def _in_relation(relation: str, first: np.ndarray, second: np.ndarray) -> bool:
    (x1, y1), (x2, y2) = _centre(first), _centre(second)
    dx, dy = x2 - x1, y2 - y1
    along, across = along_and_across(relation, dx, dy)
    return along > 0.15 and abs(across) < along


def position_of(patch: np.ndarray) -> str:
    return position_at(*_centre(patch))


def position_at(x: float, y: float) -> str:
    return min(POSITIONS, key=lambda name: np.hypot(x - POSITIONS[name][0], y - POSITIONS[name][1]))


def size_of(patch: np.ndarray) -> str:
    """Classify the size by the radius of a shape of this kind and area."""
    area = patch.mean() / _unit_area(shape_of(patch) or "circle")
    return min(SIZES, key=lambda name: abs(np.log(np.sqrt(area) / SIZES[name])))


def shape_of(patch: np.ndarray) -> str | None:
    """Return the shape whose outline overlaps most, None if none overlaps enough."""
    normal = _normalised(patch)
    overlap = {
        shape: float((normal & template).sum() / (normal | template).sum())
        for shape, template in _templates().items()
    }
    best = max(overlap, key=lambda shape: overlap[shape])
    return best if overlap[best] >= MIN_OVERLAP else None


def _normalised(patch: np.ndarray) -> np.ndarray:
    """Resample a patch to bool (GRID, GRID), centred and scaled to a fixed area."""
    return resample(patch, scaled_grid(patch, GRID)) > 0.5


@cache
def _templates() -> dict[str, np.ndarray]:
    return {shape: _normalised(_unit_shape(shape)) for shape in SHAPES}


@cache
def _unit_area(shape: str) -> float:
    return float(_unit_shape(shape).mean() * 3.2**2)


def _unit_shape(shape: str) -> np.ndarray:
    """Rasterise a shape of radius 1 in a square of side 3.2 around it."""
    axis = np.linspace(-1.6, 1.6, 512, dtype=np.float32)
    return shape_distance(shape, *np.meshgrid(axis, axis)) < 0


def nothing_else(
    background: tuple[str, ...], axis: int, names: np.ndarray, taken: np.ndarray
) -> bool:
    """Check that there is no patch besides the background and the pixels that are `taken`."""
    ground = [NAMES.index(colour) for colour in background]
    stray = ~taken & ~np.isin(names, ground)
    if len(ground) == 2:  # between the halves, colours are mixed
        middle = np.indices(names.shape)[axis] * 2 - names.shape[axis]
        stray &= np.abs(middle) > names.shape[axis] // 16
    labels, count = ndimage.label(ndimage.binary_opening(stray, iterations=2))
    sizes = ndimage.sum_labels(np.ones_like(names), labels, range(1, count + 1))
    return not np.any(np.asarray(sizes) >= MIN_AREA * names.size)
