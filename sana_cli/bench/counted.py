"""What a text, an input image, a step and a decode give a device to do, as they run there.

All but texts are run on the meta device, where tensors have shapes but take no memory; every
operand counts as read once and every result as written once.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

from sana_cli.models.streaming import STRIP_BYTES
from sana_cli.pipeline.plan import GPU_STRIP_BYTES, is_guided
from sana_cli.recipe import Recipe
from sana_cli.weights.model_files import ModelFiles

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sana_cli.models.fused_dit import FusedDiT

PROMPT_TOKENS = 30
CHARACTERS = 4  # of English in a token
SAMPLE = 8  # cells of the side of a latent; autoencoders do as much a cell for larger ones

Capability = tuple[int, int] | None  # of a GPU that runs the kernels; None: all runs as torch


@dataclass(frozen=True)
class Count:
    flops: float  # of matrix products and convolutions, without those of 8 bits
    bytes: float
    operations: float
    fixed_bytes: float  # of `bytes`: those of the weights, which larger tensors do not add to
    flops8: float  # of products of 8-bit rows

    def enlarged(self, ratio: float) -> "Count":
        """Return the same operations on so many times larger tensors."""
        moved = self.fixed_bytes + (self.bytes - self.fixed_bytes) * ratio
        work = self.flops * ratio, moved, self.operations
        return Count(*work, self.fixed_bytes, self.flops8 * ratio)

    def __add__(self, other: "Count") -> "Count":
        return Count(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> "Count":
        return Count(*(times * value for value in astuple(self)))


def cells_of(recipe: Recipe, files: ModelFiles) -> float:
    """Return the number of cells of the latent, each of which is a token of the transformer."""
    return recipe.native_width * recipe.native_height / files.vae.compression**2


def count_text(recipe: Recipe, files: ModelFiles) -> Count:
    """Count the prompt with its instruction, of which nothing is in the cache."""
    tokens = PROMPT_TOKENS + len(recipe.instruction) / CHARACTERS
    weights = files.text.linear_weights
    size = {"float32": 4, "int8": 1}.get(recipe.text_dtype, 2)
    return Count(2 * weights * tokens, weights * size, 0, weights * size, 0)


def count_step(recipe: Recipe, files: ModelFiles, capability: Capability) -> Count:
    """Count a step of one image, with its ControlNet and perturbed stream.

    Without these all blocks but the first are alike, so one block and two stand for them.
    """
    if recipe.control is not None or recipe.pag is not None:
        return _count_blocks(files.dit.num_layers, recipe, files, capability)
    one, two = (_count_blocks(layers, recipe, files, capability) for layers in (1, 2))
    return one + (two + one * -1) * (files.dit.num_layers - 1)


def _count_blocks(layers: int, recipe: Recipe, files: ModelFiles, capability: Capability) -> Count:
    """Count a step of a transformer with so many layers."""
    import torch

    from sana_cli.bench.roofline import launches
    from sana_cli.models import w8a8
    from sana_cli.models.controlnet import ControlNet
    from sana_cli.models.dit import DiT
    from sana_cli.models.fused_dit import FusedDiT, TimeModulation, nbytes

    dtype, config = getattr(torch, recipe.dit_dtype), replace(files.dit, num_layers=layers)
    height, width = (
        side // files.vae.compression for side in (recipe.native_height, recipe.native_width)
    )
    lengths = [PROMPT_TOKENS]
    if is_guided(recipe, files):
        lengths.insert(0, PROMPT_TOKENS if recipe.negative else 1)
    control = None
    with torch.device("meta"):
        branch = None
        if recipe.control is not None:
            assert files.controlnet is not None
            branch = ControlNet(files.controlnet).requires_grad_(False).to(dtype)
        fused = FusedDiT(DiT(config).requires_grad_(False).to(dtype), branch)
        if recipe.quant is not None:
            w8a8.install(fused, w8a8.quantise(fused))
        sample = torch.empty((1, config.in_channels, height, width), dtype=dtype)
        states = torch.empty((1, PROMPT_TOKENS, config.caption_channels), dtype=dtype)
        modulation = torch.empty((6, config.width), dtype=dtype)
        if branch is not None:
            control = fused.encode_control(sample)
    texts = [fused.encode_text(states[:, :length]) for length in lengths]
    time = TimeModulation(modulation, modulation[0], modulation if control else modulation[:0])
    pag_layers = () if recipe.pag is None else (recipe.pag_layer or 0,)

    def step() -> None:
        fused(sample, time, texts, control, pag_layers)

    found = launches(step, capability)
    eight = _flops8(fused, step) if recipe.quant is not None else 0
    return Count(found.flops - eight, found.bytes, found.count, nbytes(fused), eight)


def _flops8(fused: "FusedDiT", step: Callable[[], None]) -> int:
    """Count the FLOP of the projections that run in 8 bits."""
    from sana_cli.models.fused_layers import FusedBlock

    flops = 0

    def passed(block: "nn.Module", given: tuple[Any, ...], made: "Tensor") -> None:
        nonlocal flops
        for x, names in ((given[0], ("qkv", "out")), (made, ("up", "down"))):
            weights = sum(getattr(block, name).numel() for name in names)
            flops += 2 * x.shape[0] * x.shape[1] * weights

    hooks = [
        block.register_forward_hook(passed)
        for block in fused.modules()
        if isinstance(block, FusedBlock)
    ]
    step()
    for hook in hooks:
        hook.remove()
    return flops


def count_image(recipe: Recipe, files: ModelFiles, capability: Capability) -> Count:
    """Count the encoding of an image of SAMPLE x SAMPLE cells into latents."""
    return _count_autoencoder("encoder", recipe, files, capability)


def count_decode(recipe: Recipe, files: ModelFiles, capability: Capability) -> Count:
    """Count a decode of SAMPLE x SAMPLE cells."""
    return _count_autoencoder("decoder", recipe, files, capability)


def _count_autoencoder(
    half: str, recipe: Recipe, files: ModelFiles, capability: Capability
) -> Count:
    import torch

    from sana_cli.bench.roofline import launches
    from sana_cli.models.dc_ae import DCAE, Decoder
    from sana_cli.models.fused_dit import nbytes
    from sana_cli.models.streaming.autoencoder import decode, encode, prepare

    dtype, strips = getattr(torch, recipe.vae_dtype), GPU_STRIP_BYTES
    if capability is None:
        strips = STRIP_BYTES
    with torch.device("meta"):
        network = getattr(DCAE(files.vae).requires_grad_(False), half)
        prepare(network, dtype)
        latent = torch.empty((1, files.vae.latent_channels, SAMPLE, SAMPLE), dtype=dtype)
        side = SAMPLE * files.vae.compression
        pixels = torch.empty((side, side, 3), dtype=torch.uint8)
    if isinstance(network, Decoder):
        found = launches(lambda: decode(network, latent, strip_bytes=strips), capability)
    else:
        found = launches(lambda: encode(network, pixels, strip_bytes=strips), capability)
    return Count(found.flops, found.bytes, found.count, nbytes(network), 0)
