"""Input images on the canvas: fitting, outpainting, and masks of the area to repaint.

Everywhere a mask is uint8 (height, width): 255 where the image is repainted, 0 where it is kept.
"""

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from sana_cli.errors import UsageError
from sana_cli.images.files import Loaded, load
from sana_cli.shapes import Margins

Size = tuple[int, int]  # (width, height) in pixels
WHITE, TRANSPARENT = "white is repainted", "transparent is repainted"
FEATHER = 8  # pixels over which a repainted cell blends into the image beside it


def read_mask(path: str, alpha: bool = False, data: bytes | None = None) -> tuple[np.ndarray, str]:
    """Return the mask in an image file, and tell which convention it follows; see `to_mask`."""
    return to_mask(load(path, data, "--mask"), path, alpha)


def to_mask(loaded: Loaded, path: str, alpha: bool = False) -> tuple[np.ndarray, str]:
    """Convert a loaded image to a mask, and tell which convention it follows.

    With `alpha` only transparency counts. UsageError if it repaints nothing.
    """
    shown = path[:200]
    mask, convention = mask_of(loaded.image)
    if alpha and convention != TRANSPARENT:
        raise UsageError(
            f"--mask alpha: {shown} has no transparent part", "give a mask of its own: --mask FILE"
        )
    if not mask.any():
        raise UsageError(
            f"--mask {shown} repaints nothing: {convention}, and no pixel of it is",
            "paint white where the image is to change",
        )
    return mask, convention


def mask_of(image: Image.Image) -> tuple[np.ndarray, str]:
    """Convert an L, RGB or RGBA image to a mask, and return it with the convention it follows.

    If the alpha channel is not constant, transparent pixels are repainted, else white ones.
    """
    if image.mode == "RGBA":
        alpha = np.asarray(image.getchannel("A"))
        if alpha.min() != alpha.max():
            return np.where(alpha < 128, 255, 0).astype(np.uint8), TRANSPARENT
    grey = np.asarray(image.convert("L"))
    return np.where(grey > 127, 255, 0).astype(np.uint8), WHITE


def outpainted(
    pixels: np.ndarray, mask: np.ndarray | None, margins: Margins
) -> tuple[np.ndarray, np.ndarray]:
    """Grow the canvas by margins to be painted; return the image and its mask.

    The margins are filled with the image's edge, from which their latents start at a strength
    below 1.
    """
    around = ((margins.top, margins.bottom), (margins.left, margins.right))
    kept = np.zeros(pixels.shape[:2], np.uint8) if mask is None else mask
    grown = np.pad(kept, around, constant_values=255)
    return np.pad(pixels, (*around, (0, 0)), mode="edge"), grown


def fit(image: Image.Image, size: Size, mode: str) -> Image.Image:
    """Fit an image to a size: cropped about its centre, padded with its edge, or stretched."""
    if image.size == size:
        return image
    resampling = Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.LANCZOS
    if mode == "stretch":
        return image.resize(size, resampling)
    if mode == "crop":
        return ImageOps.fit(image, size, resampling)
    scale = min(size[0] / image.width, size[1] / image.height)
    width, height = (max(1, round(side * scale)) for side in image.size)  # one may be very short
    inside = image.resize((width, height), resampling)
    left, top = (size[0] - inside.width) // 2, (size[1] - inside.height) // 2
    around = (
        (top, size[1] - inside.height - top),
        (left, size[0] - inside.width - left),
    )
    pixels = np.asarray(inside)
    depth = ((0, 0),) * (pixels.ndim - 2)
    return Image.fromarray(np.pad(pixels, (*around, *depth), mode="edge"))


def on_canvas(image: Image.Image, size: Size, native: Size, mode: str) -> Image.Image:
    """Fit an image to the size of the result, then place it on the native canvas.

    The network draws `native`, which is then resized to cover `size` and cropped about its centre.
    The part that is cropped away is filled with the image's edge.
    """
    if size == native:
        return fit(image, native, mode)
    ratio = max(side / whole for side, whole in zip(size, native, strict=True))
    window = min(native[0], round(size[0] / ratio)), min(native[1], round(size[1] / ratio))
    resampling = Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.LANCZOS
    return fit(fit(image, size, mode).resize(window, resampling), native, "pad")


def cells(mask: np.ndarray, side: int) -> np.ndarray:
    """The latent cells to repaint: bool (h, w) of a mask whose sides are multiples of `side`.

    A cell is repainted if a pixel of the mask, grown by the width of the feather, lies in it: so
    blending into the kept image never reaches into the mask.
    """
    grown = np.asarray(Image.fromarray(mask).filter(ImageFilter.MaxFilter(2 * FEATHER + 1)))
    height, width = grown.shape[0] // side, grown.shape[1] // side
    return grown.reshape(height, side, width, side).max(axis=(1, 3)) > 0


def on_result(mask: np.ndarray, size: Size) -> np.ndarray:
    """Map a mask of the native canvas to the result: resize to cover it, then crop."""
    height, width = mask.shape
    ratio = max(side / whole for side, whole in zip(size, (width, height), strict=True))
    covering = max(size[0], int(width * ratio)), max(size[1], int(height * ratio))
    image = Image.fromarray(mask)
    if covering != image.size:
        image = image.resize(covering, Image.Resampling.NEAREST)
    left, top = (covering[0] - size[0]) // 2, (covering[1] - size[1]) // 2
    return np.asarray(image.crop((left, top, left + size[0], top + size[1])))


def paste(new: np.ndarray, old: np.ndarray, mask: np.ndarray, painted: np.ndarray) -> np.ndarray:
    """Put the kept pixels of `old` back into `new`, both uint8 RGB (height, width, 3).

    `painted` is the area of the repainted cells, a mask like `mask`. Outside of it every pixel is
    the old one, bit for bit; in the mask every pixel is the new one; between them, over at most
    FEATHER pixels inside the cells, the two are blended.
    """
    # Beyond the borders of the image there is nothing to blend with.
    padded = np.pad(painted, 2 * FEATHER, mode="edge")
    blurred = Image.fromarray(padded).filter(ImageFilter.BoxBlur(FEATHER))
    ramp = np.asarray(blurred, np.float32)[2 * FEATHER : -2 * FEATHER, 2 * FEATHER : -2 * FEATHER]
    weight = np.clip(2 * ramp / 255 - 1, 0, 1)
    weight[mask > 0] = 1
    weight[painted == 0] = 0
    blend = old + weight[..., None] * (new.astype(np.float32) - old)
    return blend.round().astype(np.uint8)
