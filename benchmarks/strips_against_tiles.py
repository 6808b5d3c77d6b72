"""A smooth gradient decoded by strips and by blended tiles, as one figure.

    python benchmarks/strips_against_tiles.py benchmarks/strips-against-tiles.png

The bundled model's autoencoder makes a latent of a 512x512 gradient. Left to right: decoded by
strips, decoded by diffusers in tiles of 256 pixels every 192 and blended, and eight times the
difference of the two to the untiled decode: above that of the strips, below that of the tiles.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC
from PIL import Image

from sana_cli.models.dc_ae import DCAE
from sana_cli.models.streaming.autoencoder import decode
from sana_cli.models.streaming.subpixel import fold_upsamples
from sana_cli.weights.checkpoint import load_weights, on_meta
from sana_cli.weights.layout import folder_parts
from sana_cli.weights.model_files import open_model

DEMO = Path(__file__).resolve().parents[1] / "sana_cli" / "demo"
SIDE = 512


def sky() -> torch.Tensor:
    """(1, 3, 512, 512) in [-1, 1]: orange above, blue below, brighter to the right."""
    line = torch.linspace(0, 1, SIDE)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([0.9 - 0.6 * y, 0.2 + 0.5 * x, 0.3 + 0.6 * y])[None] * 2 - 1


def to_rgb8(image: torch.Tensor) -> np.ndarray:
    unit = (image * 0.5 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)
    return (unit * 255).round().to(torch.uint8).numpy()


@torch.inference_mode()
def main(target: Path) -> None:
    theirs = AutoencoderDC.from_pretrained(DEMO / "vae", local_files_only=True).eval()
    latent = theirs.encode(sky()).latent
    untiled = to_rgb8(theirs.decode(latent).sample)
    theirs.enable_tiling(256, 256, 192, 192)
    tiles = to_rgb8(theirs.decode(latent).sample)
    files = open_model(folder_parts(DEMO))
    decoder = on_meta(DCAE, files.vae, files.parts["vae"].config).decoder
    load_weights(decoder, files.parts["vae"].weights, torch.float32, only="decoder.")
    fold_upsamples(decoder)
    strips = decode(decoder, latent, strip_bytes=1 << 16).pixels.numpy()
    differences = []
    for name, pixels in (("strips", strips), ("tiles", tiles)):
        off = pixels.astype(int) - untiled
        sys.stdout.write(
            f"{name}: mean {np.abs(off).mean():.2f}, most {np.abs(off).max()} of 255\n"
        )
        differences.append(np.clip(128 + 8 * off, 0, 255).astype(np.uint8)[::2, ::2])
    gap = np.full((SIDE, 8, 3), 255, np.uint8)
    figure = np.concatenate([strips, gap, tiles, gap, np.concatenate(differences)], axis=1)
    Image.fromarray(figure).save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
