"""The transformer's four large projections in 8 bits: weights and activations, W8A8.

These are qkv, out, up and down of every block, 95 % of the operations of a step. Norms, the
residual stream, modulation, linear attention, cross-attention, the depthwise convolution and both
ends of the network stay as they are. `kernels/rows8.py` defines the arithmetic.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sana_cli.kernels.rows8 import GROUP, Weight8, quantise_weight
from sana_cli.models.fused_layers import PROJECTIONS, FusedBlock


def quantise(network: nn.Module) -> dict[str, Tensor]:
    """Quantise the projections of all fused blocks; return int8 weights and scales by name."""
    tensors: dict[str, Tensor] = {}
    for name, block, projection in _projections(network):
        weight = quantise_weight(block.projection(projection))
        tensors |= {name: weight.values, f"{name}_scales": weight.scales}
    return tensors


def is_quantised_from(network: nn.Module, tensors: dict[str, Tensor]) -> bool:
    """Whether tensors have the names, dtypes and shapes that `quantise` gives them."""
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, block, projection in _projections(network):
        rows, width = block.projection(projection).shape
        expected[name] = torch.int8, (rows, -(-width // GROUP) * GROUP)
        expected[f"{name}_scales"] = torch.float32, (rows,)
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == expected


def install(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Run all fused blocks in 8 bits, with the tensors of `quantise`; frees the weights."""
    for name, block in _blocks(network):
        block.use_8_bits(
            {p: Weight8(tensors[f"{name}.{p}"], tensors[f"{name}.{p}_scales"]) for p in PROJECTIONS}
        )


def _blocks(network: nn.Module) -> Iterator[tuple[str, FusedBlock]]:
    for name, module in network.named_modules():
        if isinstance(module, FusedBlock):
            yield name, module


def _projections(network: nn.Module) -> Iterator[tuple[str, FusedBlock, str]]:
    for name, block in _blocks(network):
        for projection in PROJECTIONS:
            yield f"{name}.{projection}", block, projection
