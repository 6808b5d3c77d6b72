"""DC-AE strip by strip: latents to an image, an image to latents, and the memory either takes."""

from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sana_cli.kernels.convolution import lay_out_by_taps
from sana_cli.models.configs import DCAEConfig
from sana_cli.models.dc_ae import (
    DCAE,
    Decoder,
    EfficientViTBlock,
    Encoder,
    MultiscaleLinearAttention,
    group_mean,
)
from sana_cli.models.streaming import STRIP_BYTES
from sana_cli.models.streaming.layers import SplitAttention
from sana_cli.models.streaming.ops import Size, normalise, repeat
from sana_cli.models.streaming.strip_pipeline import Decoded, StripPipeline
from sana_cli.models.streaming.subpixel import fold_upsamples
from sana_cli.system.memory import PeakMemory

STRIPS = 8  # of a sweep that are run to predict memory: further strips take the same
SLACK = 1.05  # later strips may hold a little more


def prepare(network: Decoder | Encoder, dtype: torch.dtype) -> None:
    """Bring a network with its own weights, wide enough for sums, into the form that runs fastest.

    Without this it computes the same, up to rounding.
    """
    if isinstance(network, Decoder):
        fold_upsamples(network)
    cast(Any, network).to(dtype, memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, EfficientViTBlock):
            module.attn = SplitAttention(cast(MultiscaleLinearAttention, module.attn))
            depth = module.conv_out.conv_depth
            depth.weight = nn.Parameter(lay_out_by_taps(depth.weight), requires_grad=False)


@torch.inference_mode()
def decode(
    decoder: Decoder,
    latent: Tensor,
    *,
    resized: Size | None = None,
    size: Size | None = None,
    strip_bytes: int = STRIP_BYTES,
    most_strips: int | None = None,
) -> Decoded:
    """Decode latents (1, 32, h, w), unscaled, to 8 bits: `decoder(latent)` from [-1, 1] to 0..255.

    The pixels are on the CPU: they are copied once, at the end, as a copy waits for the device.

    The image is resized to `resized` first, bilinearly and without antialiasing, then cropped about
    its centre to `size`. `strip_bytes` is roughly the size of the widest tensor of a strip. Only
    `most_strips` strips of each sweep are run, if given: enough to predict memory.
    """
    pipeline = decode_pipeline(decoder, latent, strip_bytes, most_strips)
    return pipeline.to_image(resized, size).on_cpu()


def decode_pipeline(
    decoder: Decoder, latent: Tensor, strip_bytes: int, most_strips: int | None = None
) -> StripPipeline:
    """Return the pipeline of a decode; its `materialise()` is the float image (1, 3, H, W)."""
    dtype = decoder.norm_out.weight.dtype
    pipeline = StripPipeline(
        latent.to(dtype, memory_format=torch.channels_last), dtype, strip_bytes, most_strips
    )
    pipeline.through(decoder.conv_in, repeat(decoder.repeats) if decoder.shortcut else None)
    for stage in reversed(decoder.up_blocks):
        for block in cast(nn.Sequential, stage):
            pipeline.through(block)
    width = decoder.norm_out.weight.numel()
    pipeline.add(partial(normalise, decoder.norm_out, activation=decoder.activation), width)
    pipeline.through(decoder.conv_out)
    return pipeline


@torch.inference_mode()
def encode(
    encoder: Encoder,
    pixels: Tensor,
    *,
    strip_bytes: int = STRIP_BYTES,
    most_strips: int | None = None,
) -> Tensor:
    """Encode an image, uint8 (H, W, 3) with sides that are multiples of 32, to (1, 32, h, w).

    The result is `encoder(image)` of the image in [-1, 1], unscaled, in the dtype and on the device
    of the encoder. The pixels may be on the CPU: each strip is moved and converted by itself.
    `most_strips` as in `decode`.
    """
    weight = encoder.conv_out.weight
    pipeline = StripPipeline(pixels.permute(2, 0, 1)[None], weight.dtype, strip_bytes, most_strips)
    pipeline.add(lambda x: x.to(weight.device).float().div_(127.5).sub_(1).to(weight.dtype), 3)
    pipeline.through(encoder.conv_in)
    for stage in encoder.down_blocks:
        for block in cast(nn.Sequential, stage):
            pipeline.through(block)
    mean = partial(group_mean, groups=encoder.conv_out.out_channels)
    pipeline.through(encoder.conv_out, mean if encoder.shortcut else None)
    return pipeline.materialise()


def peak_bytes(
    config: DCAEConfig,
    half: Literal["encoder", "decoder"],
    dtype: torch.dtype,
    grid: Size,
    *,
    strip_bytes: int = STRIP_BYTES,
) -> int:
    """Predict the most bytes that `decode` or `encode` holds on the device, weights included.

    grid: (h, w) of the latents.
    """
    with torch.device("meta"):
        network: Encoder | Decoder = getattr(DCAE(config).requires_grad_(False), half)
        prepare(network, dtype)
    weights = sum(parameter.nbytes for parameter in network.parameters())
    activations = int(activation_bytes(network, grid, strip_bytes=strip_bytes) * SLACK)
    return weights + activations


def activation_bytes(
    network: Decoder | Encoder,
    grid: Size,
    *,
    resized: Size | None = None,
    size: Size | None = None,
    strip_bytes: int = STRIP_BYTES,
) -> int:
    """Predict the most bytes that `decode` or `encode` holds besides the weights.

    The network is on the meta device, in the dtype and state (folded or not) that will run; the
    first strips of each sweep are run there. The uint8 image counts, 3·H·W bytes; memory that
    libraries allocate within one operation does not.
    """
    height, width = grid
    cut = {"strip_bytes": strip_bytes, "most_strips": STRIPS}
    with PeakMemory() as memory:
        if isinstance(network, Decoder):
            channels = network.conv_in.in_channels
            latent = torch.empty((1, channels, height, width), device="meta")
            decode(network, latent, resized=resized, size=size, **cut)
        else:
            cell = 2 ** (len(network.down_blocks) - 1)
            shape = (height * cell, width * cell, 3)
            pixels = torch.empty(shape, dtype=torch.uint8, device="meta")
            encode(network, pixels, **cut)
    return memory.peak
