"""The decoder's Triton kernels against float64, for shapes that fit no tile, and in a decode.

With a GPU the compiled kernels run, without one Triton's interpreter on the CPU (see conftest).
"""

import math

import pytest
import torch
import torch.nn.functional as F

from examples import exhaustive
from kernel_checks import DEVICE, MIN_TRITON
from networks import DC_AE, DC_AE_LITE, FEW, TINY, random_dc_ae, random_image, random_latents

pytest.importorskip("triton", minversion=MIN_TRITON)

from sana_cli.kernels import convolution, convolution_triton, dispatch
from sana_cli.kernels.kv_state import kv_state
from sana_cli.kernels.linear_attention import attention_state
from sana_cli.kernels.multiscale import aggregate
from sana_cli.kernels.projection import gated_residual_linear_
from sana_cli.kernels.rgb import conv_to_rgb
from sana_cli.kernels.rms_norm import rms_norm
from sana_cli.kernels.selfcheck import TENSOR_CORES, decibels, least
from sana_cli.models.streaming.autoencoder import decode, decode_pipeline, encode
from sana_cli.models.streaming.subpixel import fold_upsamples


@pytest.fixture
def triton(monkeypatch):
    """Force the kernels to run in Triton, whatever the device; call with False for torch."""

    def choose(yes: bool = True) -> None:
        monkeypatch.setattr(dispatch, "uses_triton", lambda operation, x, dtype=None: yes)

    choose()
    return choose


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 1, 1, 128), (2, 3, 7, 100), (1, 1, 33, 256), (3, 1024), (5, 513)]
)
def test_rms_norm(draw, triton, shape, adds, activation):
    x, weight, bias = draw(*shape, size=3.0), draw(shape[-1]), draw(shape[-1])
    residual = draw(*shape) if adds else None
    wide = x.double()
    exact = F.rms_norm(wide, shape[-1:], weight.double(), 1e-5) + bias
    exact = {None: exact, "relu": exact.relu(), "silu": F.silu(exact)}[activation]
    exact = exact + residual.double() if adds else exact
    again = rms_norm(x.clone(), weight, bias, 1e-5, residual, activation)
    found = rms_norm(x, weight, bias, 1e-5, residual, activation)
    assert found is x
    assert torch.equal(found, again)
    assert decibels(found, exact) > least(x.dtype)


def test_any_layout_is_taken_and_results_go_where_they_belong(draw, triton):
    """Convolutions promise no layout: what is not contiguous is copied."""

    def channels_first(*shape: int) -> torch.Tensor:
        return draw(shape[0], shape[3], *shape[1:3]).movedim(1, -1)

    x, vectors = channels_first(1, 5, 7, 40), draw(40, 2)
    weight, bias = vectors.unbind(1)  # of stride 2
    plain = (x.clone(memory_format=torch.contiguous_format), weight.clone(), bias.clone())
    found = rms_norm(x, weight, bias, 1e-5, channels_first(1, 5, 7, 40).zero_())
    assert found is x
    assert torch.equal(x, rms_norm(*plain, 1e-5))
    tokens, y, square = channels_first(1, 5, 7, 40).flatten(1, 2), draw(1, 35, 16), draw(40, 16)
    expected = gated_residual_linear_(tokens.contiguous(), y, square, bias, weight)
    assert gated_residual_linear_(tokens, y, square, bias, weight) is tokens
    assert torch.equal(tokens, expected)
    window, out = channels_first(1, 9, 7, 32), channels_first(1, 5, 7, 32)
    weights = draw(32, 1, 5, 5), draw(32, 32, 1, 1)
    expected = aggregate(window.contiguous(), *weights, torch.empty_like(window[:, 2:-2]))
    assert torch.equal(aggregate(window, *weights, out), expected)
    assert torch.equal(out, expected)


def test_norm_and_activation_propagate_nan(draw, triton):
    for activation in (None, "relu", "silu"):
        x = draw(3, 64)
        x[1, 7] = math.nan
        found = rms_norm(x, draw(64), draw(64), 1e-5, None, activation)
        assert found.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("batch", "height", "width", "groups", "group", "kernel", "reach"),
    [(1, 1, 1, 1, 32, 5, 2), (1, 3, 5, 3, 32, 5, 2), (2, 9, 17, 1, 32, 5, 3),
     (1, 8, 16, 1, 8, 3, 3), (1, 2, 33, 2, 24, 7, 3), (1, 17, 1, 1, 64, 5, 2),
     (1, 4, 3, 2, 32, 1, 0), (2, 9, 17, 1, 32, 5, 0), (1, 1, 3, 1, 16, 7, 0)],
)  # fmt: skip
def test_multiscale_aggregation(draw, triton, batch, height, width, groups, group, kernel, reach):
    channels = groups * group
    window = draw(batch, height + 2 * reach, width, channels)
    depth = draw(channels, 1, kernel, kernel, size=1 / kernel)
    point = draw(channels, group, 1, 1, size=group**-0.5)
    margin = kernel // 2
    exact = F.conv2d(
        window.movedim(-1, 1).double(), depth.double(), padding=margin, groups=channels
    )
    exact = exact[:, :, reach : len(window[0]) - reach]
    exact = F.conv2d(exact, point.double(), groups=groups).movedim(1, -1)
    among = torch.full((batch, height, width, 2 * channels + 3), 7.0).to(window)
    out = among[..., channels : 2 * channels]
    found = aggregate(window, depth, point, out).clone()
    assert torch.equal(found, aggregate(window, depth, point, torch.empty_like(out)))
    assert decibels(found, exact) > least(window.dtype)
    assert (among[..., :channels] == 7).all() and (among[..., 2 * channels :] == 7).all()


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head"),
    [(1, 1, 1, 32), (2, 70, 3, 32), (1, 1030, 1, 32), (1, 65, 2, 8), (1, 63, 1, 64), (1, 5, 2, 24)],
)
def test_kv_state(draw, triton, batch, tokens, heads, head):
    kv = draw(batch, tokens, heads * 2 * head)
    by_role = kv.double().unflatten(-1, (heads, 2, head)).permute(3, 0, 2, 4, 1)
    key, value = by_role.relu()[0], by_role[1]
    exact = torch.cat([value, torch.ones_like(value[:, :, :1])], 2) @ key.transpose(-1, -2)
    found = kv_state(kv, head)
    assert found.dtype == torch.float32
    assert torch.equal(found, kv_state(kv, head))
    needed = least(kv.dtype, tokens) if kv.dtype == torch.float32 else TENSOR_CORES
    assert decibels(found, exact) > needed
    triton(False)
    assert decibels(kv_state(kv, head), exact) > least(torch.float32, tokens)
    roles = kv.unflatten(-1, (heads, 2, head)).permute(3, 0, 2, 4, 1)
    assert decibels(attention_state(*roles), exact) > least(torch.float32, tokens)


@pytest.mark.parametrize(
    ("batch", "channels", "out", "height", "width"),
    [(1, 64, 128, 1, 1), (2, 64, 256, 5, 7), (1, 128, 128, 3, 50), (1, 64, 40, 9, 15)],
)
def test_convolutions_with_what_follows(draw, batch, channels, out, height, width):
    x, residual = (
        draw(batch, n, height, width).contiguous(memory_format=torch.channels_last)
        for n in (channels, out)
    )
    weight, bias = draw(out, channels, 3, 3, size=(9 * channels) ** -0.5), draw(out, size=0.1)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    silu = F.silu(exact + bias.double()[:, None, None])
    normed = F.rms_norm(exact.movedim(1, -1), (out,), bias.double(), 1e-5).movedim(-1, 1)
    added = normed + bias.double()[:, None, None] + residual.double()
    needed = least(x.dtype, 9 * channels)
    for module in (convolution, convolution_triton):
        found = module.conv_silu(x, weight, bias)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert decibels(found, silu) > needed
        assert torch.equal(found, module.conv_silu(x, weight, bias))
        if module is convolution_triton and out not in convolution.NORMED:
            continue
        found = module.conv_norm_add(x, weight, bias, bias, 1e-5, residual)
        assert found.is_contiguous(memory_format=torch.channels_last)
        # Without the kernel the convolution is rounded before the norm too.
        assert decibels(found, added) > needed - 3


@pytest.mark.parametrize(
    ("channels", "out", "repeats", "height", "width"),
    [(64, 128, 8, 1, 1), (128, 128, 4, 3, 50), (64, 256, None, 5, 7)],
)
def test_upsampling_with_its_shortcut(draw, channels, out, repeats, height, width):
    x = draw(2, channels, height, width).contiguous(memory_format=torch.channels_last)
    upper, lower = (
        draw(2 * out, channels, 2, 2, size=(4 * channels) ** -0.5).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    bias = draw(2 * out)
    exact = torch.empty(2, out, 2 * height, 2 * width, dtype=torch.float64, device=x.device)
    padded = F.pad(x.double(), (1, 1, 1, 1))
    for i, weight in enumerate((upper, lower)):
        for j in (0, 1):
            half = slice(j * out, (j + 1) * out)
            window = padded[:, :, i : i + height + 1, j : j + width + 1]
            exact[:, :, i::2, j::2] = F.conv2d(window, weight[half].double(), bias[half].double())
    if repeats:
        exact += F.pixel_shuffle(x.double().repeat_interleave(repeats, 1), 2)
    for module in (convolution, convolution_triton):
        found = module.upsample(x, upper, lower, bias, repeats)
        assert found.is_contiguous(memory_format=torch.channels_last)
        # Without the kernel the convolution is rounded before the shortcut too.
        assert decibels(found, exact) > least(x.dtype, 4 * channels) - 3
        assert torch.equal(found, module.upsample(x, upper, lower, bias, repeats))


def test_the_state_of_a_nan_is_nan(draw, triton):
    kv = draw(1, 70, 2 * 2 * 16)
    kv[0, 66, 3] = math.nan  # of a key of the first head
    found = kv_state(kv, 16)
    assert found[0, 0, :, 3].isnan().all() and not found[0, 1].isnan().any()


@pytest.mark.parametrize(
    ("height", "width", "channels", "left", "wide"),
    [(1, 1, 1, 0, 1), (3, 5, 40, 0, 5), (2, 131, 64, 0, 131), (2, 140, 16, 5, 130),
     (1, 9, 128, 8, 1)],
)  # fmt: skip
@pytest.mark.parametrize("halo", [True, False])
def test_conv_to_rgb(draw, triton, height, width, channels, left, wide, halo):
    window = draw(1, height + 2 * halo, width, channels)
    weight, bias = draw(3, channels, 3, 3, size=0.3 * channels**-0.5), draw(3, size=0.1)
    inputs = window.double().movedim(-1, 1), weight.double(), bias.double()
    exact = F.conv2d(*inputs, padding=(1 - halo, 1))[0, ..., left : left + wide].permute(1, 2, 0)
    exact = (exact * 0.5 + 0.5).clamp(0, 1)
    pixels, low, high = conv_to_rgb(window, weight, bias, left, wide, halo)
    assert pixels.shape == (height, wide, 3) and pixels.dtype == torch.uint8
    # Rounded to the nearest level, up to the error of float32 sums.
    assert (pixels - 255 * exact).abs().max() < 0.501
    assert low.item() == pytest.approx(exact.min().item(), abs=2e-6)
    assert high.item() == pytest.approx(exact.max().item(), abs=2e-6)
    again = conv_to_rgb(window, weight, bias, left, wide, halo)
    assert all(map(torch.equal, (pixels, low, high), again))


@pytest.mark.parametrize(("column", "inside"), [(4, True), (9, False)])
def test_extremes_are_nan_if_a_value_inside_the_crop_is(draw, triton, column, inside):
    window = draw(1, 4, 12, 16)
    window[0, 1, column, 3] = math.nan
    for in_triton in (True, False):
        triton(in_triton)
        _, low, high = conv_to_rgb(window, draw(3, 16, 3, 3), draw(3), 1, 6)
        assert low.isnan() == high.isnan() == inside


def test_a_value_between_two_levels_rounds_to_even(triton):
    """As torch.round does."""
    window = torch.zeros(1, 3, 1, 16, device=DEVICE)
    for level in (0, 1, 2, 127, 254):
        bias = torch.full((3,), (level + 0.5) / 255 * 2 - 1, device=DEVICE)
        exact = (bias * 0.5 + 0.5) * 255
        pixels, _, _ = conv_to_rgb(window, torch.zeros(3, 16, 3, 3, device=DEVICE), bias, 0, 1)
        assert torch.equal(pixels.flatten(), exact.round().to(torch.uint8))


KINDS = {
    "released": DC_AE | TINY | FEW,
    "lite": DC_AE_LITE | TINY | {"decoder_layers_per_block": (0, 1, 1, 1, 1, 1)},
}


@pytest.mark.parametrize(
    ("kind", "strip_bytes", "grid", "size"),
    [
        ("released", 9_000, (2, 1), (60, 27)),
        *exhaustive(("released", 1 << 30, (1, 1), (32, 27))),
        ("lite", 1 << 30, (2, 1), (60, 27)),
    ],
)
def test_a_decode_in_triton_matches_torch(triton, kind, strip_bytes, grid, size):
    decoder = random_dc_ae(KINDS[kind]).decoder.to(DEVICE)
    fold_upsamples(decoder)
    latent = random_latents(*grid).to(DEVICE)
    found = {}
    for in_triton in (True, False):
        triton(in_triton)
        with torch.inference_mode():
            image = decode_pipeline(decoder, latent, strip_bytes).materialise()
        decoded = decode(decoder, latent, size=size, strip_bytes=strip_bytes)
        found[in_triton] = image, decoded
    assert decibels(found[True][0], found[False][0].double()) > 90
    one, other = found[True][1], found[False][1]
    off = (one.pixels.int() - other.pixels.int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.001
    assert one.low.item() == pytest.approx(other.low.item(), abs=1e-5)
    assert one.high.item() == pytest.approx(other.high.item(), abs=1e-5)


def test_an_encode_in_triton_matches_torch(triton):
    encoder = random_dc_ae(KINDS["released"]).encoder.to(DEVICE)
    found = {}
    for in_triton in (True, False):
        triton(in_triton)
        found[in_triton] = encode(encoder, random_image(64, 32), strip_bytes=20_000)
    assert decibels(found[True], found[False].double()) > 90
