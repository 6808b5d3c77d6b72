"""The decoder and encoder in strips against the plain networks, which hold whole feature maps."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from examples import exhaustive
from networks import (
    DC_AE,
    DC_AE_LITE,
    FEW,
    TINY,
    few_examples,
    random_dc_ae,
    random_image,
    random_latents,
    relative_error,
)
from sana_cli.models.configs import DCAEConfig
from sana_cli.models.dc_ae import DCAE, Decoder
from sana_cli.models.streaming.autoencoder import decode, decode_pipeline, encode, prepare
from sana_cli.models.streaming.subpixel import fold_upsamples

DEMO = Path(__file__).resolve().parents[2] / "sana_cli" / "demo"
CONVOLUTIONS = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
KINDS = {
    "released": DC_AE | TINY | FEW,
    "lite": DC_AE_LITE | TINY | {"decoder_layers_per_block": (0, 2, 1, 1, 1, 1)},
    "several scales": DC_AE
    | TINY
    | FEW
    | {
        "decoder_qkv_multiscales": ((), (), (), (), (3, 5), (7,)),
        "encoder_qkv_multiscales": ((), (), (), (3,), (), (5, 3)),
        "decoder_in_shortcut": False,
        "encoder_out_shortcut": False,
    },
    "folded pixels": DC_AE
    | TINY
    | {
        "encoder_layers_per_block": (0, 2, 1, 1, 1, 1),
        "decoder_layers_per_block": (0, 1, 1, 1, 1, 1),
        "downsample_block_type": "pixel_unshuffle",
    },
    "convolutions": DC_AE | TINY | FEW | CONVOLUTIONS,
    "convolutions, folded pixels": DC_AE_LITE
    | TINY
    | FEW
    | CONVOLUTIONS
    | {"downsample_block_type": "pixel_unshuffle"},
}

ONLY_CONVOLUTIONS = {
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": (32,) * 3,
    "decoder_block_out_channels": (32,) * 3,
    "encoder_layers_per_block": (1, 2, 1),
    "decoder_layers_per_block": (1, 2, 1),
    "encoder_qkv_multiscales": ((),) * 3,
    "decoder_qkv_multiscales": ((),) * 3,
}

latent_sizes = st.tuples(st.integers(1, 40), st.integers(1, 24))
# From strips of one row, through several strips per sweep, to the whole map at once.
strip_sizes = st.sampled_from([1, 3_000, 20_000, 77_777, 400_000, 1 << 30])


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def levels(image: torch.Tensor) -> torch.Tensor:
    """(1, 3, H, W) in [-1, 1] -> uint8 (H, W, 3)."""
    unit = (image.float() * 0.5 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8)[0].permute(1, 2, 0)


@pytest.mark.hypothesis
@pytest.mark.parametrize("kind", KINDS)
def test_strips_decode_the_untiled_image(kind):
    plain, prepared = random_dc_ae(KINDS[kind]).decoder, random_dc_ae(KINDS[kind]).decoder
    prepare(prepared, torch.float32)

    @few_examples
    @given(latent_sizes, strip_sizes)
    def check(size, strip_bytes):
        latent = random_latents(*size)
        untiled = plain(latent)
        for decoder in (plain, prepared):
            with torch.inference_mode():
                image = decode_pipeline(decoder, latent, strip_bytes).materialise()
            assert relative_error(image, untiled) < 1e-5
        decoded = decode(prepared, latent, strip_bytes=strip_bytes)
        off = (decoded.pixels.int() - levels(untiled).int()).abs()
        assert off.max() <= 1
        assert (off > 0).float().mean() < 0.001
        unit = (untiled * 0.5 + 0.5).clamp(0, 1)
        assert decoded.low.item() == pytest.approx(unit.min().item(), abs=1e-5)
        assert decoded.high.item() == pytest.approx(unit.max().item(), abs=1e-5)

    check()


@pytest.mark.hypothesis
@pytest.mark.parametrize("upsample", ["interpolate", "pixel_shuffle"])
@pytest.mark.parametrize("cheaper", [False, True], ids=["plain", "sub-pixel"])
def test_convolutions_in_strips_are_equal_bit_for_bit(upsample, cheaper):
    """In float32 on the CPU, channels-last, where every convolution has 20,481 inputs or more.

    Below that PyTorch uses another algorithm, which adds in another order. Channels are a multiple
    of the 16 in a vector register, as SiLU differs by a bit in the remainder of a vector loop.
    """
    model = random_dc_ae(ONLY_CONVOLUTIONS | {"upsample_block_type": upsample})
    if cheaper:
        fold_upsamples(model.decoder)

    @few_examples
    @given(st.integers(30, 100), st.integers(48, 64), st.sampled_from([1_200_000, 2_000_001]))
    def check(height, width, strip_bytes):
        latent = random_latents(height, width)
        untiled = model.decoder(latent)
        with torch.inference_mode():
            image = decode_pipeline(model.decoder, latent, strip_bytes).materialise()
        assert torch.equal(image, untiled)
        decoded = decode(model.decoder, latent, strip_bytes=strip_bytes)
        assert torch.equal(decoded.pixels, levels(untiled))

    check()


@pytest.mark.hypothesis
@pytest.mark.parametrize("kind", KINDS)
def test_strips_encode_the_untiled_latent(kind):
    model, prepared = random_dc_ae(KINDS[kind]), random_dc_ae(KINDS[kind]).encoder
    prepare(prepared, torch.float32)

    @few_examples
    @given(st.tuples(st.integers(1, 12), st.integers(1, 8)), strip_sizes)
    def check(size, strip_bytes):
        pixels = random_image(32 * size[0], 32 * size[1])
        image = channels_last(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1)
        untiled = model.encode(image)
        for encoder in (model.encoder, prepared):
            latent = encode(encoder, pixels, strip_bytes=strip_bytes)
            assert relative_error(latent, untiled) < 1e-5

    check()


@pytest.mark.parametrize("downsample", ["Conv", "pixel_unshuffle"])
@pytest.mark.parametrize("strip_bytes", [3_000_000, 4_000_001])
def test_encoding_convolutions_in_strips_is_equal_bit_for_bit(downsample, strip_bytes):
    model = random_dc_ae(ONLY_CONVOLUTIONS | {"downsample_block_type": downsample})
    pixels = random_image(300, 256)
    image = channels_last(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1)
    latent = encode(model.encoder, pixels, strip_bytes=strip_bytes)
    assert torch.equal(latent, model.encode(image))


@pytest.mark.exhaustive
@pytest.mark.parametrize("strip_bytes", [1 << 20, 5 << 20])
def test_the_released_configuration_at_full_width(strip_bytes):
    torch.manual_seed(0)
    decoder = Decoder(DCAEConfig(**DC_AE)).eval().requires_grad_(False)
    decoder.to(memory_format=torch.channels_last)
    latent = random_latents(9, 7)
    untiled = decoder(latent)
    fold_upsamples(decoder)
    with torch.inference_mode():
        image = decode_pipeline(decoder, latent, strip_bytes).materialise()
    assert relative_error(image, untiled) < 1e-5


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
        ),
    ],
)
def test_in_bfloat16_strips_are_as_close_to_float32_as_the_untiled_decode(device):
    model = random_dc_ae(KINDS["released"]).to(device)
    latent = random_latents(20, 11).to(device)
    truth = model.decoder(latent)
    half = random_dc_ae(KINDS["released"]).to(device, torch.bfloat16).decoder
    untiled = half(latent.bfloat16()).float()
    fold_upsamples(model.decoder)
    model.to(torch.bfloat16)
    with torch.inference_mode():
        image = decode_pipeline(model.decoder, latent, 20_000).materialise().float()
    assert relative_error(image, truth) <= 1.05 * relative_error(untiled, truth)


@pytest.mark.hypothesis
@pytest.mark.parametrize("kind", ["released", "lite"])
def test_an_image_is_resized_and_cropped_as_if_untiled(kind):
    decoder = random_dc_ae(KINDS[kind]).decoder

    @few_examples
    @given(
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
        st.tuples(st.integers(20, 300), st.integers(20, 300)),
        st.tuples(st.integers(0, 9), st.integers(0, 9)),
        strip_sizes,
    )
    def check(latent_size, resized, margin, strip_bytes):
        latent = random_latents(*latent_size)
        size = resized[0] - margin[0], resized[1] - margin[1]
        whole = F.interpolate(decoder(latent), size=resized, mode="bilinear", align_corners=False)
        top, left = margin[0] // 2, margin[1] // 2
        expected = levels(whole[..., top : top + size[0], left : left + size[1]])
        decoded = decode(decoder, latent, resized=resized, size=size, strip_bytes=strip_bytes)
        off = (decoded.pixels.int() - expected.int()).abs()
        assert off.max() <= 1
        # A value on the edge between two levels may round to either.
        assert (off > 0).sum() <= max(2, 0.001 * off.numel())

    check()


def test_a_nan_anywhere_makes_both_extremes_nan():
    decoder = random_dc_ae(KINDS["lite"]).decoder
    latent = random_latents(6, 5)
    latent[0, 3, 5, 4] = torch.nan
    decoded = decode(decoder, latent, strip_bytes=1)
    assert decoded.low.isnan() and decoded.high.isnan()


@pytest.mark.parametrize(
    ("strip_bytes", "resized", "capturable"),
    [(1 << 30, None, True), (1 << 30, (40, 30), False), (1, None, False)],
)
def test_a_graph_may_hold_one_strip_that_is_not_resized(strip_bytes, resized, capturable):
    decoder = random_dc_ae(KINDS["released"]).decoder
    pipeline = decode_pipeline(decoder, random_latents(2, 2), strip_bytes)
    pipeline.to_image(resized, (40, 30))
    assert pipeline.capturable == capturable


def test_the_inputs_of_the_caller_are_not_modified():
    model = random_dc_ae(KINDS["released"])
    latent, pixels = random_latents(4, 3), random_image(64, 96)
    before = latent.clone(), pixels.clone()
    decode(model.decoder, latent)
    encode(model.encoder, pixels)
    assert torch.equal(latent, before[0]) and torch.equal(pixels, before[1])


class LargestConvolution(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "conv" in str(func):
            LargestConvolution.elements = max(self.elements, args[0].numel(), result.numel())
        return result


@pytest.mark.parametrize("side", [4096, *exhaustive(16384)])
def test_no_convolution_has_more_elements_than_31_bits_count(side):
    with torch.device("meta"):
        decoder = Decoder(DCAEConfig(**DC_AE)).eval().requires_grad_(False)
        latent = torch.empty(1, 32, side // 32, side // 32)
        fold_upsamples(decoder)
    with LargestConvolution() as largest:
        decode(decoder, latent, strip_bytes=1 << 40)
    assert 2**26 < largest.elements < 2**31


# --- seams: strips against blended tiles -------------------------------------------------------


@pytest.fixture(scope="module")
def gradient():
    """A smooth sky of 512x512, as a latent of the bundled model."""
    from diffusers import AutoencoderDC

    theirs = AutoencoderDC.from_pretrained(DEMO / "vae").eval().requires_grad_(False)
    y, x = torch.meshgrid(torch.linspace(0, 1, 512), torch.linspace(0, 1, 512), indexing="ij")
    sky = torch.stack([0.9 - 0.6 * y, 0.2 + 0.5 * x, 0.3 + 0.6 * y])[None] * 2 - 1
    return theirs, theirs.encode(sky).latent


def largest_step(pixels: np.ndarray, untiled: np.ndarray) -> float:
    """Largest step between adjacent rows, in levels of 255, beyond that of the untiled image."""
    steps, expected = (np.diff(p.mean(axis=(1, 2), dtype=float)) for p in (pixels, untiled))
    return float(np.abs(steps - expected).max())


def test_a_smooth_gradient_has_no_step_where_strips_meet(gradient):
    theirs, latent = gradient
    untiled = levels(theirs.decode(latent).sample).numpy()
    fields = {k: v for k, v in theirs.config.items() if k in DCAEConfig.__dataclass_fields__}
    model = DCAE(DCAEConfig(**fields)).eval().requires_grad_(False)
    model.load_state_dict(theirs.state_dict())
    fold_upsamples(model.decoder)
    strips = decode(model.decoder, latent, strip_bytes=1).pixels.numpy()  # of a few rows each
    assert np.abs(strips.astype(int) - untiled).max() <= 1
    assert largest_step(strips, untiled) < 0.01
    theirs.enable_tiling(256, 256, 192, 192)
    tiles = levels(theirs.decode(latent).sample).numpy()
    # The measure is sensitive enough: blended tiles change tones, here by up to 17 levels.
    assert largest_step(tiles, untiled) > 0.2
