"""Symmetric 8-bit rows and the products of them: the W8A8 of Sana's paper (arXiv 2410.10629, 4).

A number is an integer in -127 … 127 times a scale. Activations have a float32 scale a token where
the kernel that makes them holds the whole row, and one for each GROUP channels of a token where it
holds a tile. Weights have one an output channel. Sums of products of integers are exact, so one
scale a token gives the same numbers on every machine.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_cli.kernels.dispatch import fallback_reason
from sana_cli.kernels.linear import linear

GROUP = 64  # channels; rows are padded with zeros to a multiple of it
LARGEST = 127
TINY = 1e-30  # rows below it become zero
EXACT = 1024  # products of two such integers whose sum float32 holds exactly: 1024·127² < 2²⁴
ENOUGH = 1024  # width from which a transformer gains on a CPU; 224 does not, 1152 does
BLOCK = 128  # tokens that a CPU quantises or multiplies at once
FAST_CPU = {  # instructions by which oneDNN multiplies int8, as torch calls them
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
}


class Rows8(NamedTuple):
    """Activations: values·scales, with each scale repeated over its channels."""

    values: Tensor  # int8 (B, N, K'): K rounded up to a multiple of GROUP, zeros from K on
    scales: Tensor  # float32 (B, N, 1) or (B, N, K'/GROUP)
    dtype: torch.dtype  # of the activations, and so of products with them

    def between(self, start: int, end: int) -> "Rows8":
        """Return the rows of some tokens, as views."""
        return Rows8(self.values[:, start:end], self.scales[:, start:end], self.dtype)


class Weight8(NamedTuple):
    """The matrix of a linear map."""

    values: Tensor  # int8 (E, K')
    scales: Tensor  # float32 (E,)


def quantise(x: Tensor, grouped: bool) -> Rows8:
    """Round x (B, N, K), to the nearest and half to even, by scales of the largest magnitudes.

    A row or group with a NaN or an infinity gets a scale that makes all of it NaN or infinite.
    """
    rows, missing = x.flatten(0, -2), -x.shape[-1] % GROUP
    width = x.shape[-1] + missing
    groups = width // GROUP if grouped else 1
    values = x.new_empty(*rows.shape[:-1], groups, width // groups, dtype=torch.int8)
    scales = x.new_empty(*rows.shape[:-1], groups, dtype=torch.float32)
    for some, to, scale in _blocks(rows, values, scales):
        wide = F.pad(some.float(), (0, missing)) if missing else some.float()
        tiles = wide.unflatten(-1, (groups, -1))
        largest = tiles.abs().amax(-1)
        factor = LARGEST / largest.clamp_min(TINY)
        to.copy_((tiles * factor[..., None]).round_())
        torch.div(largest, LARGEST, out=scale)
    shape = x.shape[:-1]
    return Rows8(values.flatten(-2).unflatten(0, shape), scales.unflatten(0, shape), x.dtype)


def dequantise(rows: Rows8) -> Tensor:
    """Return values·scales, float32 (B, N, K')."""
    groups = rows.values.unflatten(-1, (rows.scales.shape[-1], -1))
    return (groups * rows.scales[..., None]).flatten(-2)


def quantise_weight(weight: Tensor) -> Weight8:
    """Quantise weight (E, K) of any float dtype."""
    rows = quantise(weight, grouped=False)
    return Weight8(rows.values, rows.scales[:, 0])


def dequantise_weight(weight: Weight8, width: int, dtype: torch.dtype) -> Tensor:
    """Return a matrix (E, width) without the padding."""
    return (weight.values[:, :width] * weight.scales[:, None]).to(dtype)


def linear8(x: Rows8, weight: Weight8, bias: Tensor | None = None) -> Tensor:
    """x (B, N, K'), weight (E, K'), bias (E,) -> x·weightᵀ + bias, (B, N, E) in the dtype of x.

    Sums are of integers, exact, with one scale a token, and in float32 over groups.
    """
    if x.scales.shape[-1] > 1:
        wide = dequantise(x)
        matrix = (weight.values * weight.scales[:, None]).to(wide.dtype)
        return linear(wide, matrix, None if bias is None else bias.to(wide.dtype)).to(x.dtype)
    values, scales = x.values.flatten(0, -2), x.scales.flatten(0, -2)
    y = values.new_empty(len(values), len(weight.values), dtype=x.dtype)
    for some, scale, to in _blocks(values, scales, y):
        part = integer_products(some, weight.values) * scale
        to.copy_(part.mul_(weight.scales) if bias is None else part.mul_(weight.scales).add_(bias))
    return y.unflatten(0, x.values.shape[:-1])


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of all tensors: on a CPU few at a time, which fit its caches."""
    rows = BLOCK if tensors[0].is_cpu else max(1, len(tensors[0]))
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def chosen_products(device: str, width: int = 1152) -> tuple[bool, str]:
    """Return whether 8-bit products are faster than others on a device, and why, for display.

    `width` is that of a transformer; that of the smallest released one if not given.
    """
    if device.startswith("cuda"):
        reason = fallback_reason(torch.device(device))
        if reason is None:
            return True, "on the tensor cores, by Triton"
        return False, f"there are no kernels for them: {reason}"
    if device == "cpu":
        instructions = fast_instructions()
        if instructions is not None and width < ENOUGH:
            return False, "a model this small gains less by them than quantising costs"
        if instructions is not None:
            return True, f"by {instructions}"
        return False, "this CPU has neither VNNI nor AMX, so they are computed in float32"
    return False, f"there are none on {device}, so they are computed in float32"


def integer_products(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, K), weight (E, K), both int8 -> x·weightᵀ, int32 (T, E), exact."""
    if x.is_cpu and fast_instructions() is not None:
        return torch._int_mm(x, weight.t())
    total = None
    for a, b in zip(x.split(EXACT, -1), weight.split(EXACT, -1), strict=True):
        part = linear(a.float(), b.float()).to(torch.int32)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


@functools.cache
def fast_instructions() -> str | None:
    """Return the instructions that make int8 products on this CPU faster than float32; or None.

    Without them `torch._int_mm` has no kernel and is 30 times slower than float32, and the faster
    operators of oneDNN saturate sums of pairs, which is not exact.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    # Missing in the oldest supported torch.
    seen: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return next((title for name, title in FAST_CPU.items() if seen.get(name)), None)
