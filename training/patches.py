"""What both checkers do with connected patches of an image: scale them, and relate their places."""

import numpy as np
from scipy import ndimage


def scaled_grid(patch: np.ndarray, side: int) -> list[np.ndarray]:
    """Return sampling points, rows and columns (side, side), of a square around a bool patch.

    Its centre is the patch's centroid, and its size such that the patch has a fifth of its area.
    """
    rows, columns = np.nonzero(patch)
    scale = np.sqrt(patch.sum() / (side * side / 5))
    steps = (np.arange(side) - (side - 1) / 2) * scale
    return np.meshgrid(rows.mean() + steps, columns.mean() + steps, indexing="ij")


def resample(mask: np.ndarray, grid: list[np.ndarray]) -> np.ndarray:
    """Sample a bool mask at the points of a grid, bilinearly: float32 from 0 to 1."""
    return ndimage.map_coordinates(mask.astype(np.float32), grid, order=1)


def along_and_across(relation: str, dx: float, dy: float) -> tuple[float, float]:
    """Split the way (dx, dy) from the first object to the second by their relation.

    `along` is positive where the relation holds ("left of": the second is further right), and
    `across` is the part at right angles to it.
    """
    along, across = (dy, dx) if relation in ("above", "below") else (dx, dy)
    return (-along if relation in ("below", "right of") else along), across
