"""What a decode holds at most: counted on real tensors, and foretold without any."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples import exhaustive
from networks import (
    DC_AE,
    DC_AE_LITE,
    SMALL,
    few_examples,
    random_dc_ae,
    random_image,
    random_latents,
)
from sana_cli.models.configs import DCAEConfig
from sana_cli.models.dc_ae import Decoder, Encoder
from sana_cli.models.streaming.autoencoder import activation_bytes, decode, encode
from sana_cli.models.streaming.subpixel import fold_upsamples
from sana_cli.pipeline.plan import GPU_STRIP_BYTES
from sana_cli.system.memory import PeakMemory

MB = 1 << 20


def on_meta(kind: dict, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(DCAEConfig(**kind)).eval().requires_grad_(False)
        fold_upsamples(decoder)
    return decoder.to(dtype)


def weights(decoder: Decoder) -> int:
    return sum(parameter.nbytes for parameter in decoder.parameters())


def test_tensors_are_counted_while_they_live_and_views_are_not():
    given = torch.ones(1000)
    with PeakMemory() as memory:
        view = given[:500].view(50, 10).t()
        a = view + 1  # 2000 bytes
        b = a.double()  # 4000
        a.mul_(2)
        c = b[:, 3]
        assert (memory.held, memory.peak) == (6000, 6000)
        del a, b
        assert memory.held == 4000  # c is a view of b
        del c
        given.add_(1)
        d = torch.zeros(100)  # 400
        assert (memory.held, memory.peak) == (400, 6000)
    del d
    assert memory.held == 0


@pytest.mark.hypothesis
@pytest.mark.parametrize("kind", [DC_AE, *exhaustive(DC_AE_LITE)], ids=["released", "lite"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *exhaustive(torch.float32)])
def test_the_rehearsal_foretells_the_peak_within_a_tenth(kind, dtype):
    model = random_dc_ae(kind | SMALL).to(dtype)
    fold_upsamples(model.decoder)

    @few_examples
    @given(
        st.tuples(st.integers(4, 30), st.integers(4, 20)),
        st.sampled_from([1, 100_000, 1_000_000, 1 << 30]),
        st.booleans(),
    )
    def check(size, strip_bytes, resizes):
        call = {"strip_bytes": strip_bytes}
        if resizes:
            call |= {"resized": (size[0] * 35, size[1] * 35), "size": (size[0] * 35, 100)}
        latent = random_latents(*size)
        with PeakMemory() as memory:
            decode(model.decoder, latent, **call)
        rehearsed = Decoder(model.config).eval().requires_grad_(False).to("meta")
        fold_upsamples(rehearsed)
        assert activation_bytes(rehearsed.to(dtype), size, **call) == pytest.approx(
            memory.peak, rel=0.1
        )

    check()


@pytest.mark.parametrize("strip_bytes", [1_000_000, *exhaustive(100_000)])
def test_the_rehearsal_of_the_encoder_too(strip_bytes):
    model = random_dc_ae(DC_AE | SMALL)
    with PeakMemory() as memory:
        encode(model.encoder, random_image(640, 384), strip_bytes=strip_bytes)
    rehearsed = Encoder(model.config).eval().requires_grad_(False).to("meta")
    foretold = activation_bytes(rehearsed, (20, 12), strip_bytes=strip_bytes)
    assert foretold == pytest.approx(memory.peak, rel=0.1)


@pytest.mark.parametrize(("strip_bytes", "most"), [(GPU_STRIP_BYTES, 2.5e9), (64 * MB, 1.3e9)])
def test_4096_square_is_decoded_in_few_gigabytes_with_the_weights(strip_bytes, most):
    decoder = on_meta(DC_AE)
    activations = activation_bytes(decoder, (128, 128), strip_bytes=strip_bytes)
    assert weights(decoder) + activations <= most


def test_from_2048_to_4096_only_small_maps_and_the_picture_grow():
    decoder = on_meta(DC_AE)
    small, large = (
        activation_bytes(decoder, (side, side), strip_bytes=8 * MB) for side in (64, 128)
    )

    def maps_and_picture(side: int) -> int:
        """bfloat16: the map at 1/8 (512 channels) and at 1/16 (1024), both held at a doubling."""
        eighth, sixteenth = 512 * (4 * side) ** 2 * 2, 1024 * (2 * side) ** 2 * 2
        return eighth + sixteenth + 3 * (32 * side) ** 2

    assert large - small <= maps_and_picture(128) - maps_and_picture(64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_4096_square_on_a_gpu():
    decoder = Decoder(DCAEConfig(**DC_AE)).eval().requires_grad_(False)
    fold_upsamples(decoder)
    decoder.to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    decode(decoder, random_latents(128, 128).cuda(), strip_bytes=64 * MB)
    assert torch.cuda.max_memory_allocated() <= 1.3e9
