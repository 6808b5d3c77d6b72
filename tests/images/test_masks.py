"""Masks, outpainting and fits: which pixels are repainted, and which stay as they are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sana_cli.errors import UsageError
from sana_cli.images.masks import (
    FEATHER,
    cells,
    fit,
    on_canvas,
    on_result,
    outpainted,
    paste,
    read_mask,
)
from sana_cli.shapes import Margins

CELL = 32


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_white_is_repainted_and_an_alpha_channel_decides_if_it_says_anything(tmp_path):
    grey = np.zeros((40, 60), np.uint8)
    grey[:, 30:] = 255
    Image.fromarray(grey).save(tmp_path / "grey.png")
    mask, said = read_mask(str(tmp_path / "grey.png"))
    assert (mask == grey).all() and said == "white is repainted"
    Image.fromarray(np.dstack([noise(40, 60), 255 - grey])).save(tmp_path / "clear.png")
    mask, said = read_mask(str(tmp_path / "clear.png"))
    assert (mask == grey).all() and said == "transparent is repainted"
    opaque = np.dstack([np.stack([grey] * 3, -1), np.full((40, 60), 255, np.uint8)])
    Image.fromarray(opaque).save(tmp_path / "opaque.png")
    mask, said = read_mask(str(tmp_path / "opaque.png"))
    assert (mask == grey).all() and said == "white is repainted"


def test_a_mask_that_repaints_nothing_is_refused(tmp_path):
    Image.new("L", (64, 64), 0).save(tmp_path / "black.png")
    with pytest.raises(UsageError, match="repaints nothing"):
        read_mask(str(tmp_path / "black.png"))
    with pytest.raises(UsageError, match="--mask .*none.png cannot be read"):
        read_mask(str(tmp_path / "none.png"))


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_kept_pixels_are_the_input_s_own_and_the_mask_is_all_new(rows, columns, data):
    height, width = rows * CELL, columns * CELL
    mask = np.zeros((height, width), np.uint8)
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom = data.draw(st.integers(top, height - 1))
    right = data.draw(st.integers(left, width - 1))
    mask[top : bottom + 1, left : right + 1] = 255
    painted = cells(mask, CELL)
    area = np.repeat(np.repeat(painted.astype(np.uint8) * 255, CELL, 0), CELL, 1)
    old, new = noise(height, width), noise(height, width, 1)
    made = paste(new, old, mask, area)
    assert (made[area == 0] == old[area == 0]).all()
    assert (made[mask > 0] == new[mask > 0]).all()
    far = np.asarray(Image.fromarray(area), bool)
    assert far[max(0, top - FEATHER) : bottom + FEATHER, max(0, left - FEATHER) : right].all()


def test_the_feather_blends_inside_the_painted_cells():
    mask = np.zeros((4 * CELL, 4 * CELL), np.uint8)
    mask[48:80, 48:80] = 255
    area = np.repeat(np.repeat(cells(mask, CELL).astype(np.uint8) * 255, CELL, 0), CELL, 1)
    old, new = np.zeros((*mask.shape, 3), np.uint8), np.full((*mask.shape, 3), 200, np.uint8)
    row = paste(new, old, mask, area)[64, :, 0].astype(int)
    assert (np.diff(row[32:48]) >= 0).all() and row[31] == 0 and row[48] == 200
    assert 0 < row[36] < 200, "there is a ramp between the two"


def test_outpainting_keeps_the_image_in_its_place_and_masks_the_rest():
    image = noise(20, 30)
    grown, mask = outpainted(image, None, Margins(4, 5, 6, 7))
    assert grown.shape == (32, 40, 3)
    assert (grown[5:25, 4:34] == image).all()
    assert (mask[5:25, 4:34] == 0).all() and (mask > 0).sum() == 32 * 40 - 20 * 30


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(64, 64), (96, 32), (40, 100)])
def test_every_fit_gives_the_size_and_the_same_size_is_left_alone(mode, size):
    image = Image.fromarray(noise(48, 80))
    assert fit(image, size, mode).size == size
    assert fit(image, image.size, mode) is image


@pytest.mark.parametrize("shape", [(3000, 1), (1, 3000)])
def test_a_very_thin_image_is_a_line_when_padded(shape):
    padded = np.asarray(fit(Image.fromarray(np.full((*shape, 3), 7, np.uint8)), (64, 64), "pad"))
    assert padded.shape == (64, 64, 3) and (padded == 7).all()


def test_a_crop_keeps_the_middle_and_a_pad_keeps_everything():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 40:] = 255
    crop = np.asarray(fit(Image.fromarray(image), (40, 40), "crop"))
    assert (crop[:, :18] == 0).all() and (crop[:, 22:] == 255).all()
    pad = np.asarray(fit(Image.fromarray(image), (80, 80), "pad"))
    assert (pad[20:60] == image).all() and (pad[0] == pad[20]).all()


@given(st.integers(20, 90), st.integers(20, 90), st.integers(1, 3), st.integers(1, 3))
def test_what_is_put_on_the_canvas_comes_back_in_its_place(width, height, columns, rows):
    """A cross on the native canvas is a cross in the result, wherever the two sizes differ."""
    native = (columns * CELL, rows * CELL)
    image = np.zeros((height, width), np.uint8)
    image[height // 2 - 2 : height // 2 + 2] = image[:, width // 2 - 2 : width // 2 + 2] = 255
    there = np.asarray(on_canvas(Image.fromarray(image), (width, height), native, "crop"))
    assert there.shape == (native[1], native[0])
    back = on_result(there, (width, height))
    assert back.shape == image.shape
    assert back[height // 2, width // 2] == 255
