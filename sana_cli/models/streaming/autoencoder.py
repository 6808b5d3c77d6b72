"""DC-AE strip by strip: latents to a picture, a picture to latents, and what either would take."""

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from sana_cli.models.dc_ae import Decoder, Encoder, group_mean
from sana_cli.models.streaming.ops import Size, normalise, repeat
from sana_cli.models.streaming.strip_pipeline import Decoded, StripPipeline
from sana_cli.system.memory import PeakMemory

STRIP_BYTES = 16 << 20


@torch.inference_mode()
def decode(
    decoder: Decoder,
    latent: Tensor,
    *,
    resized: Size | None = None,
    size: Size | None = None,
    strip_bytes: int = STRIP_BYTES,
) -> Decoded:
    """(1, 32, h, w), unscaled -> the picture `decoder(latent)`, from [-1, 1] to 0..255.

    It is resized to `resized` first, bilinearly and without antialiasing, then cropped about its
    centre to `size`. `strip_bytes` is roughly the size of the widest tensor of a strip.
    """
    return decoding(decoder, latent, strip_bytes).draw(resized, size)


def decoding(decoder: Decoder, latent: Tensor, strip_bytes: int) -> StripPipeline:
    """Return the pipeline whose `draw` is `decode`; its `materialise()` is float (1, 3, H, W)."""
    dtype = decoder.norm_out.weight.dtype
    pipeline = StripPipeline(
        latent.to(dtype, memory_format=torch.channels_last), dtype, strip_bytes
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
def encode(encoder: Encoder, pixels: Tensor, *, strip_bytes: int = STRIP_BYTES) -> Tensor:
    """uint8 (H, W, 3), sides multiples of 32 -> (1, 32, h, w), unscaled.

    The latent `encoder(image)` of the image in [-1, 1], in the dtype and on the device of the
    encoder. The pixels may stay on the CPU: they are moved and made real numbers by the strip.
    """
    weight = encoder.conv_out.weight
    pipeline = StripPipeline(pixels.permute(2, 0, 1)[None], weight.dtype, strip_bytes)
    pipeline.add(lambda x: x.to(weight.device).float().div_(127.5).sub_(1).to(weight.dtype), 3)
    pipeline.through(encoder.conv_in)
    for stage in encoder.down_blocks:
        for block in cast(nn.Sequential, stage):
            pipeline.through(block)
    mean = partial(group_mean, groups=encoder.conv_out.out_channels)
    pipeline.through(encoder.conv_out, mean if encoder.shortcut else None)
    return pipeline.materialise()


def rehearse(
    network: Decoder | Encoder,
    latent_size: Size,
    *,
    resized: Size | None = None,
    size: Size | None = None,
    strip_bytes: int = STRIP_BYTES,
) -> int:
    """The peak bytes above the weights of `decode` or `encode`, without computing anything.

    The network is on the meta device, of the dtype and in the state (folded or not) that will
    run; its sweeps are run there for a few strips each. Included are the picture, 3·H·W bytes,
    which is always on the CPU, and not what libraries allocate inside one operation.
    """
    height, width = latent_size
    with PeakMemory() as memory:
        if isinstance(network, Decoder):
            channels = network.conv_in.in_channels
            latent = torch.empty((1, channels, height, width), device="meta")
            decode(network, latent, resized=resized, size=size, strip_bytes=strip_bytes)
        else:
            cell = 2 ** (len(network.down_blocks) - 1)
            shape = (height * cell, width * cell, 3)
            pixels = torch.empty(shape, dtype=torch.uint8, device="meta")
            encode(network, pixels, strip_bytes=strip_bytes)
    return memory.peak
