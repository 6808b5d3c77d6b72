"""The style that `training.lora` teaches: an image as a blueprint, white lines on blue."""

import numpy as np
from PIL import Image, ImageFilter

from training.world import Sample, draw

DARK, LIGHT = np.array((10, 40, 110)), np.array((36, 84, 170))  # the blue of black and of white
LINE = np.array((235, 244, 255))
LUMA = np.array((0.299, 0.587, 0.114))
STEP = 20  # least difference of two neighbouring pixels that becomes a line


def blueprint(sample: Sample, side: int) -> np.ndarray:
    """Draw a sample as a blueprint, uint8 RGB (side, side, 3)."""
    pixels = draw(sample, side).astype(np.float32)
    line = _lines(pixels)[..., None]
    brightness = (pixels @ LUMA / 255)[..., None]
    return np.rint((1 - line) * (DARK + brightness * (LIGHT - DARK)) + line * LINE).astype(np.uint8)


def _lines(pixels: np.ndarray) -> np.ndarray:
    """Return how much of each pixel is line, 0 to 1; lines are a hundredth of the side wide."""
    across, down = (np.abs(np.diff(pixels, axis=axis)).max(-1) for axis in (1, 0))
    edge = np.zeros(pixels.shape[:2], bool)
    edge[:, :-1] = across >= STEP
    edge[:-1] |= down >= STEP
    width = 2 * round(len(pixels) / 256) + 1
    line = Image.fromarray(edge).convert("L").filter(ImageFilter.MaxFilter(width))
    return np.asarray(line.filter(ImageFilter.GaussianBlur(0.7)), np.float32) / 255
