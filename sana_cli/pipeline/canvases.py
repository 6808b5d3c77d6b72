"""Input images on the canvas that a recipe draws on, and back in its result."""

from collections.abc import Mapping

import numpy as np
from PIL import Image

from sana_cli.images.masks import cells, fit, on_canvas, on_result, outpainted, paste
from sana_cli.recipe import Recipe
from sana_cli.shapes import parse_outpaint

Images = Mapping[str, np.ndarray]  # SHA-256 of an input image -> uint8 RGB (height, width, 3)


class Canvases:
    """Those of the recipes of one call. `compression`: pixels along a side of a latent cell."""

    def __init__(self, images: Images, compression: int) -> None:
        self.images, self.compression = images, compression

    def control(self, recipe: Recipe) -> Image.Image:
        """The control image of a recipe, on the native canvas."""
        assert recipe.control is not None
        image, mode = Image.fromarray(self.images[recipe.control]), recipe.image_fit or "stretch"
        native = recipe.native_width, recipe.native_height
        size = native if mode == "stretch" else (recipe.width, recipe.height)
        return on_canvas(image, size, native, mode)

    def input_of(self, recipe: Recipe) -> tuple[np.ndarray, np.ndarray | None]:
        """The input image of a recipe and its mask, if it has one, with the margins around."""
        assert recipe.image is not None
        pixels = self.images[recipe.image]
        mask = self.images[recipe.mask] if recipe.mask else None
        if recipe.outpaint:
            pixels, mask = outpainted(pixels, mask, parse_outpaint(recipe.outpaint))
        return pixels, mask

    def canvas(self, recipe: Recipe) -> tuple[Image.Image, Image.Image | None]:
        """The input image of a recipe and its mask, on the native canvas."""
        pixels, mask = self.input_of(recipe)
        mode = recipe.image_fit or "stretch"
        size, native = (recipe.width, recipe.height), (recipe.native_width, recipe.native_height)
        if mode == "stretch" and mask is None:
            size = native  # the whole canvas, as the reference does for SANA-Sprint
        image = on_canvas(Image.fromarray(pixels), size, native, mode)
        return image, None if mask is None else on_canvas(Image.fromarray(mask), size, native, mode)

    def cells_of(self, recipe: Recipe) -> np.ndarray | None:
        """The latent cells that a recipe repaints, bool (h, w); None for all."""
        if not recipe.mask and not recipe.outpaint:
            return None
        _, mask = self.canvas(recipe)
        return cells(np.asarray(mask), self.compression)

    def with_kept_pixels(self, pixels: np.ndarray, recipe: Recipe) -> np.ndarray:
        """Put the pixels of the input image back wherever the recipe does not repaint."""
        painted = self.cells_of(recipe)
        if painted is None:
            return pixels
        image, mask = self.input_of(recipe)
        assert mask is not None  # there are cells to repaint
        size, mode = (recipe.width, recipe.height), recipe.image_fit or "stretch"
        cell = self.compression
        area = np.repeat(np.repeat(painted.astype(np.uint8) * 255, cell, 0), cell, 1)
        old, where = (np.asarray(fit(Image.fromarray(x), size, mode)) for x in (image, mask))
        return paste(pixels, old, where, on_result(area, size))
