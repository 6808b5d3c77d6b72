"""Sizes: what a person may ask for and what the network is then asked to draw."""

import pytest
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import (
    ASPECT_RATIO_512_BIN,
    ASPECT_RATIO_1024_BIN,
)
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN
from hypothesis import given
from hypothesis import strategies as st

from sana_cli.errors import UsageError
from sana_cli.shapes import (
    TRAINED_SHAPES,
    Canvas,
    Margins,
    SizeRequest,
    choose_canvas,
    parse_aspect,
    parse_outpaint,
    parse_resolution,
)

TABLES = {
    512: ASPECT_RATIO_512_BIN,
    1024: ASPECT_RATIO_1024_BIN,
    2048: ASPECT_RATIO_2048_BIN,
    4096: ASPECT_RATIO_4096_BIN,
}


@pytest.mark.parametrize("side", TABLES)
def test_the_trained_shapes_are_those_of_diffusers(side):
    theirs = [(float(ratio), int(h), int(w)) for ratio, (h, w) in TABLES[side].items()]
    assert list(TRAINED_SHAPES[side]) == theirs


@pytest.mark.parametrize(
    ("asked", "request_"),
    [
        ("512", SizeRequest(side=512)),
        ("4k", SizeRequest(side=4096)),
        (" 2K ", SizeRequest(side=2048)),
        ("1280x720", SizeRequest(None, 1280, 720)),
        ("1280×720", SizeRequest(None, 1280, 720)),
    ],
)
def test_ways_to_write_a_resolution(asked, request_):
    assert parse_resolution(asked) == request_


@given(st.text(max_size=12))
def test_any_text_is_a_resolution_or_a_usage_error(text):
    try:
        request = parse_resolution(text)
    except UsageError:
        return
    side, *size = request
    assert side >= 32 if side is not None else min(size) >= 32


@pytest.mark.parametrize(
    ("aspect", "canvas"),
    [
        ("1:1", Canvas(1024, 1024, 1024, 1024)),
        ("16:9", Canvas(1344, 768, 1344, 768)),
        ("2:3", Canvas(832, 1216, 832, 1216)),
        ("1:4", Canvas(512, 2048, 512, 2048)),
    ],
)
def test_an_aspect_takes_the_nearest_trained_shape(aspect, canvas):
    assert choose_canvas(SizeRequest(side=1024), parse_aspect(aspect), "trained", 1024) == canvas


def test_an_exact_size_is_drawn_at_a_trained_shape_and_cropped():
    assert choose_canvas(SizeRequest(None, 1280, 720), None, "trained", 1024) == Canvas(
        1280, 720, 1344, 768
    )


def test_fit_exact_draws_the_next_multiple_of_32():
    assert choose_canvas(SizeRequest(None, 1280, 720), None, "exact", 1024) == Canvas(
        1280, 720, 1280, 736
    )


@given(
    st.sampled_from(list(TABLES)),
    st.floats(0.26, 3.9),
    st.sampled_from(["trained", "exact"]),
)
def test_a_canvas_is_always_drawable_and_covers_the_picture(side, aspect, fit):
    canvas = choose_canvas(SizeRequest(side=side), aspect, fit, side)
    assert canvas.native_width % 32 == canvas.native_height % 32 == 0
    assert 0 <= canvas.native_width - canvas.width < 32
    assert 0 <= canvas.native_height - canvas.height < 32
    assert 0.8 < canvas.width * canvas.height / side**2 < 1.2


@pytest.mark.parametrize(
    ("request_", "side"),
    [
        (SizeRequest(side=256), 256),
        (SizeRequest(side=512), 512),
        (SizeRequest(None, 300, 300), 256),
        (SizeRequest(None, 400, 380), 512),
    ],
)
def test_a_model_of_squares_draws_the_one_nearest_in_area(request_, side):
    canvas = choose_canvas(request_, None, "trained", 256, squares=(256, 512))
    assert canvas[2:] == (side, side)
    assert canvas[:2] == ((side, side) if request_.side else request_[1:])


@pytest.mark.parametrize(
    ("request_", "aspect"),
    [
        (SizeRequest(side=1024), None),
        (SizeRequest(side=512), 16 / 9),
        (SizeRequest(None, 800, 800), None),
    ],
    ids=["side", "aspect", "area"],
)
def test_a_model_of_squares_draws_nothing_else(request_, aspect):
    with pytest.raises(UsageError, match="256x256 or 512x512|nearest is 512x512|too large"):
        choose_canvas(request_, aspect, "trained", 256, squares=(256, 512))


@pytest.mark.parametrize(
    ("request_", "aspect"),
    [
        (SizeRequest(side=4096), None),
        (SizeRequest(None, 2048, 2048), None),
        (SizeRequest(None, 1024, 32), None),
        (SizeRequest(side=1024), 10.0),
        (SizeRequest(None, 512, 512), 1.0),
    ],
    ids=["side", "area", "aspect of a size", "aspect", "both"],
)
def test_what_a_model_cannot_draw_is_refused(request_, aspect):
    with pytest.raises(UsageError):
        choose_canvas(request_, aspect, "trained", 1024)


@pytest.mark.parametrize(
    ("text", "margins"), [("256,0,128,64", Margins(256, 0, 128, 64)), ("32", Margins(*[32] * 4))]
)
def test_outpaint_is_left_top_right_bottom_or_one_for_all(text, margins):
    assert parse_outpaint(text) == margins


@pytest.mark.parametrize("text", ["", "1,2", "a,b,c,d", "-1,0,0,0", "0,0,0,0", "1.5", "1,2,3,4,5"])
def test_other_margins_are_refused(text):
    with pytest.raises(UsageError, match="--outpaint"):
        parse_outpaint(text)
