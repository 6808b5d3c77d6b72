"""Operations of both checkers on connected patches of an image: scaling and relative position."""

import numpy as np
from scipy import ndimage


def scaled_grid(patch: np.ndarray, side: int) -> list[np.ndarray]:
    """Return rows and columns, each (side, side), of sampling points in a square around a patch.

    The square is centred on the patch's centroid, and the patch has a fifth of its area.
    """
    rows, columns = np.nonzero(patch)
    scale = np.sqrt(patch.sum() / (side * side / 5))
    steps = (np.arange(side) - (side - 1) / 2) * scale
    return np.meshgrid(rows.mean() + steps, columns.mean() + steps, indexing="ij")


def resample(mask: np.ndarray, grid: list[np.ndarray]) -> np.ndarray:
    """Interpolate a bool mask bilinearly at the points of a grid; float32 from 0 to 1."""
    return ndimage.map_coordinates(mask.astype(np.float32), grid, order=1)


def along_and_across(relation: str, dx: float, dy: float) -> tuple[float, float]:
    """Split the offset (dx, dy) of the second object from the first by their relation.

    The first part is positive where the relation holds ("left of": the second is further right),
    the second part is perpendicular to it.
    """
    along, across = (dy, dx) if relation in ("above", "below") else (dx, dy)
    return (-along if relation in ("below", "right of") else along), across
