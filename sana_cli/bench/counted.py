"""What one text, one step and one decode give a device to do, as the networks run there.

Steps and decodes are run on the meta device, where tensors have shapes but take no memory; every
operand counts as read once and every result as written once.
"""

from dataclasses import dataclass, replace

from sana_cli.models.streaming import STRIP_BYTES
from sana_cli.pipeline.plan import GPU_STRIP_BYTES, is_guided
from sana_cli.recipe import Recipe
from sana_cli.weights.model_files import ModelFiles

PROMPT_TOKENS = 30
CHARACTERS = 4  # of English in a token
SAMPLE = 8  # cells of the side of the latent that is decoded; larger ones take as much a cell

Capability = tuple[int, int] | None  # of a GPU that runs the kernels; None: all runs as torch


@dataclass(frozen=True)
class Count:
    flops: float  # of matrix products and convolutions
    bytes: float
    operations: float

    def enlarged(self, ratio: float) -> "Count":
        """Return the same operations on so many times larger tensors."""
        return Count(self.flops * ratio, self.bytes * ratio, self.operations)


def cells_of(recipe: Recipe, files: ModelFiles) -> float:
    """Return the number of cells of the latent, each of which is a token of the transformer."""
    return recipe.native_width * recipe.native_height / files.vae.compression**2


def count_text(recipe: Recipe, files: ModelFiles) -> Count:
    """Count the prompt with its instruction, of which nothing is in the cache."""
    tokens = PROMPT_TOKENS + len(recipe.instruction) / CHARACTERS
    weights = files.text.linear_weights
    size = {"float32": 4, "int8": 1}.get(recipe.text_dtype, 2)
    return Count(2 * weights * tokens, weights * size, 0)


def count_step(recipe: Recipe, files: ModelFiles, capability: Capability) -> Count:
    """Count a step of one image: from one block and from two, as blocks are all alike."""
    import torch

    from sana_cli.bench.roofline import launches
    from sana_cli.models.dit import DiT
    from sana_cli.models.fused_dit import FusedDiT, TimeModulation

    dtype = getattr(torch, recipe.dit_dtype)
    height, width = (
        side // files.vae.compression for side in (recipe.native_height, recipe.native_width)
    )
    lengths = [PROMPT_TOKENS]
    if is_guided(recipe, files):
        lengths.insert(0, PROMPT_TOKENS if recipe.negative else 1)

    def blocks(count: int) -> Count:
        config = replace(files.dit, num_layers=count)
        with torch.device("meta"):
            fused = FusedDiT(DiT(config).requires_grad_(False).to(dtype))
            sample = torch.empty((1, config.in_channels, height, width), dtype=dtype)
            states = torch.empty((1, PROMPT_TOKENS, config.caption_channels), dtype=dtype)
            modulation = torch.empty((6, config.width), dtype=dtype)
        texts = [fused.encode_text(states[:, :length]) for length in lengths]
        time = TimeModulation(modulation, modulation[0], modulation[:0])
        found = launches(lambda: fused(sample, time, texts), capability)
        return Count(found.flops, found.bytes, found.count)

    one, two, others = blocks(1), blocks(2), files.dit.num_layers - 1
    return Count(
        one.flops + others * (two.flops - one.flops),
        one.bytes + others * (two.bytes - one.bytes),
        one.operations + others * (two.operations - one.operations),
    )


def count_decode(recipe: Recipe, files: ModelFiles, capability: Capability) -> Count:
    """Count a decode of SAMPLE x SAMPLE cells. What a larger one takes is proportional to them."""
    import torch

    from sana_cli.bench.roofline import launches
    from sana_cli.models.dc_ae import DCAE
    from sana_cli.models.streaming.autoencoder import decode, prepare

    dtype = getattr(torch, recipe.vae_dtype)
    with torch.device("meta"):
        decoder = DCAE(files.vae).decoder.requires_grad_(False)
        prepare(decoder, dtype)
        latent = torch.empty((1, files.vae.latent_channels, SAMPLE, SAMPLE), dtype=dtype)
    strips = STRIP_BYTES if capability is None else GPU_STRIP_BYTES
    found = launches(lambda: decode(decoder, latent, strip_bytes=strips), capability)
    return Count(found.flops, found.bytes, found.count)
