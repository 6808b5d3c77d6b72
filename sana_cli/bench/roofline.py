"""How fast a machine could at best be: its rates, measured, and the work there is, counted.

    floor = max(floating-point operations / matrix rate, bytes / copy bandwidth)

A stage cannot take less while its sums are those of the published networks (Williams, Waterman and
Patterson, "Roofline", CACM 2009). Counted is the least that has to be done:

Operations are those of matrix products and convolutions, two for each multiplication. Not counted
is what there are ways to save: the first block's self-attention of the second half of guidance, the
products of a convolution after a doubling that are equal (`strips.subpixel`), and cross-attention,
which for short texts takes little (`cross_attention`), up to 8 % of the rest for long ones. Nor is
anything elementwise.

Bytes are those of a plan in which every branch of a block runs as one kernel: the weights are read
once a step, of the decoder once an image, and each branch reads its input and writes its result,
in the precision that runs. Linear attention reads its input twice, as its sums must be complete
before they are applied.

`launches` counts what the fused networks give a GPU to do, which is more than this least.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sana_cli.kernels.cases import Case
from sana_cli.kernels.launch import meta_launches
from sana_cli.kernels.linear import linear
from sana_cli.kernels.rows8 import LARGEST, integer_products
from sana_cli.models.dc_ae import DCAE, Decoder, EfficientViTBlock
from sana_cli.models.dit import Block, DiT
from sana_cli.models.streaming.subpixel import fold_upsamples
from sana_cli.pipeline.plan import is_guided
from sana_cli.recipe import SUMS, Recipe
from sana_cli.weights.model_files import ModelFiles

SIDES = (512, 1024, 2048, 4096, 8192, 16_384)  # of the matrices that are multiplied
COPIED = {"cpu": 1 << 27, "cuda": 1 << 30}  # bytes: more than caches hold
SECONDS = 0.2  # for each measurement


@dataclass(frozen=True)
class Work:
    flops: float
    bytes: float

    def floor(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Seconds."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


# --- rates -------------------------------------------------------------------------------------


def bandwidth(device: str) -> float:
    """Measure the bytes per second of a copy, read and written; the best of several."""
    size = COPIED.get(device.split(":")[0], COPIED["cpu"])
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device, SECONDS)


def matrix_rate(device: str, precision: str) -> float:
    """Measure the FLOP per second of square matrix products, at the fastest size.

    `precision` is one of `Recipe.products`, or "int8" with sums in int32. Sizes are doubled for as
    long as one product can be expected to take little time.
    """
    best, matmul = 0.0, torch.backends.cuda.matmul
    before = matmul.allow_fp16_accumulation
    matmul.allow_fp16_accumulation = precision.endswith(f"{SUMS}float16")
    try:
        for side in SIDES:
            if side > SIDES[1] and 2 * side**3 > best * SECONDS:
                break
            product = _product(device, precision, side)
            best = max(best, 2 * side**3 / _best(product, device, SECONDS))
    finally:
        matmul.allow_fp16_accumulation = before
    return best


def _product(device: str, precision: str, side: int) -> Callable[[], object]:
    """Return a product of square matrices."""
    if precision == "int8":
        a = torch.randint(-LARGEST, LARGEST, (side, side), dtype=torch.int8, device=device)
        # On a GPU cuBLAS stands for the kernels.
        if device.startswith("cuda"):
            return partial(torch._int_mm, a, a.t())
        return partial(integer_products, a, a)
    dtype = getattr(torch, precision.partition(SUMS)[0])
    a = torch.randn(side, side, device=device).to(dtype)
    return partial(linear, a, a)


@torch.inference_mode()
def _best(work: Callable[[], object], device: str, limit: float) -> float:
    """Repeat a piece of work for `limit` seconds after a warm-up; return the fewest seconds."""
    wait = partial(torch.cuda.synchronize, device) if device.startswith("cuda") else lambda: None
    if device == "mps":
        wait = torch.mps.synchronize
    work()
    wait()
    began, best = time.perf_counter(), float("inf")
    while True:
        start = time.perf_counter()
        work()
        wait()
        now = time.perf_counter()
        best = min(best, now - start)
        if now - began > limit:
            return best


# --- work --------------------------------------------------------------------------------------


def denoising(recipe: Recipe, files: ModelFiles) -> Work:
    """Count the work of all the steps of one image."""
    dtype = getattr(torch, recipe.dit_dtype)
    height, width = _grid(recipe, files)
    tokens, layers, wide = height * width, files.dit.num_layers, files.dit.width
    with torch.device("meta"):
        dit = DiT(replace(files.dit, num_layers=1))
        x = torch.empty(1, tokens, wide)
        latent = torch.empty(1, files.dit.in_channels, height, width)
    block = dit.transformer_blocks[0]
    assert isinstance(block, Block)
    attention = operations(lambda: block.attn1(x))
    rest = operations(lambda: block.ff(x, (height, width)))
    ends = operations(lambda: (dit.patch_embed(latent), dit.proj_out(x)))
    half = ends + layers * (attention + rest)
    guided = is_guided(recipe, files)
    flops = 2 * half - attention if guided else half
    branches = [*block.attn1.parameters(), *block.ff.parameters()]
    weights = layers * sum(weight.numel() for weight in branches)
    # Three branches, each reading and writing all tokens, the first of them reading twice.
    moved = (2 if guided else 1) * layers * 7 * tokens * wide
    return Work(recipe.steps * flops, recipe.steps * (weights + moved) * dtype.itemsize)


def decoding(recipe: Recipe, files: ModelFiles) -> Work:
    """Count the work of decoding one image."""
    dtype = getattr(torch, recipe.vae_dtype)
    with torch.device("meta"):
        decoder = DCAE(files.vae).decoder.requires_grad_(False).to(dtype)
        fold_upsamples(decoder)
        latent = torch.empty(1, files.vae.latent_channels, *_grid(recipe, files), dtype=dtype)
    moved = [latent.nbytes + 3 * recipe.native_height * recipe.native_width]

    def passed(_: nn.Module, given: tuple[Tensor], made: Tensor) -> None:
        moved.append(given[0].nbytes + made.nbytes)

    for branch in _branches(decoder):
        branch.register_forward_hook(passed)
    for module in decoder.modules():
        if isinstance(module, EfficientViTBlock):
            module.register_forward_hook(lambda _, given, made: moved.append(made.nbytes))
    flops = operations(lambda: decoder(latent))
    weights = sum(p.nbytes for p in decoder.parameters())
    return Work(flops, weights + sum(moved))


def _branches(decoder: Decoder) -> list[nn.Module]:
    """List what could each be one kernel, up to the last norm, which joins the last convolution."""
    found: list[nn.Module] = []
    for stage in decoder.up_blocks:
        for block in stage.children():
            whole = not isinstance(block, EfficientViTBlock)
            found += [block] if whole else block.children()
    return found


def operations(run: Callable[[], object]) -> int:
    """Count the FLOP of matrix products and convolutions, on any device including `meta`."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# --- launches ----------------------------------------------------------------------------------

# Kernels that read and write their argument `x`.
IN_PLACE = {"gated_residual_linear_kernel", "gated_residual_linear8_kernel", "rms_norm_kernel"}
WRITTEN_ONLY = {"copy_", "fill_", "zero_"}  # of what an operation in place may do with its tensor
NOT_LAUNCHED = {"empty", "empty_like", "new_empty", "_unsafe_view", "scalar_tensor"}


class Launch(NamedTuple):
    name: str  # of the Triton kernel or of torch's operation
    bytes: int  # with every operand read once and every result written once
    flops: int  # of an operation of torch; those of kernels are part of a sum alone


@dataclass(frozen=True)
class Launches:
    """What a GPU is given to do."""

    each: list[Launch]  # in order
    flops: int  # of matrix products and convolutions

    @property
    def calls(self) -> Counter[str]:
        """Return how many there are of each name."""
        return Counter(launch.name for launch in self.each)

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.each)

    @property
    def count(self) -> int:
        return len(self.each)


def launches(run: Callable[[], object], capability: tuple[int, int] | None = (8, 9)) -> Launches:
    """Count what `run` would launch on a GPU of a compute capability; its tensors are on `meta`.

    Without a capability they are those of any device on which all runs as torch. `run` is called
    twice: as the GPU would run it, and by the torch definitions of the kernels, whose products are
    counted. An operation of torch counts as one launch, although libraries may
    take several. Softmax attention, which does not run on `meta`, is missing.
    """
    with torch.no_grad(), ExitStack() as stack:
        cases = [] if capability is None else stack.enter_context(meta_launches(capability))
        operated = stack.enter_context(_Operations(cases))
        run()
    operated.take_kernels()
    return Launches(operated.each, operations(run))


class _Operations(TorchDispatchMode):
    """Lists torch's operations on `meta`, and between them the kernels that `cases` grows by."""

    def __init__(self, cases: list[Case]) -> None:
        from torch.utils.flop_counter import flop_registry

        super().__init__()
        self.registry = flop_registry
        self.cases, self.taken = cases, 0
        self.each: list[Launch] = []

    def take_kernels(self) -> None:
        for case in self.cases[self.taken :]:
            name = case.kernel.__name__
            moved = sum(case.nbytes.values()) + (case.nbytes["x"] if name in IN_PLACE else 0)
            self.each.append(Launch(name, moved, 0))
        self.taken = len(self.cases)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode composite operations come whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "convolution" and args[0].is_contiguous(memory_format=torch.channels_last):
            result = result.contiguous(memory_format=torch.channels_last)  # as cuDNN returns it
        made = [tensor for tensor in tree_iter(result) if _is_on_gpu(tensor)]
        if any(tensor.numel() for tensor in made) and not func.is_view and name not in NOT_LAUNCHED:
            given = (*args, *(v for k, v in kwargs.items() if k != "out"))
            read = [tensor for tensor in tree_iter(given) if _is_on_gpu(tensor)]
            if name in WRITTEN_ONLY:
                del read[0]
            moved = sum(_elements(tensor) * tensor.itemsize for tensor in read + made)
            flops = self.registry.get(func.overloadpacket, lambda *args, **kwargs: 0)
            self.take_kernels()
            self.each.append(Launch(name, moved, flops(*args, **kwargs, out_val=result)))
        return result


def _is_on_gpu(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _elements(tensor: Tensor) -> int:
    """Count the elements in memory: an expanded dimension repeats the same ones."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in pairs if stride)


def _grid(recipe: Recipe, files: ModelFiles) -> tuple[int, int]:
    """(h, w) of the latent."""
    cell = files.vae.compression
    return recipe.native_height // cell, recipe.native_width // cell
