"""Eight bits: the arithmetic against numpy's integers, and the Triton kernels against the same
operations on the dequantised numbers in float64.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from examples import exhaustive
from kernel_checks import DEVICE, MIN_TRITON
from sana_cli.kernels import rows8
from sana_cli.kernels.depthwise_glu import depthwise_glu
from sana_cli.kernels.linear_attention import attend_tokens, project_qkv
from sana_cli.kernels.modulation import modulate
from sana_cli.kernels.projection import gated_residual_linear_, linear_silu
from sana_cli.kernels.rows8 import Rows8, Weight8, dequantise, quantise, quantise_weight
from sana_cli.kernels.selfcheck import LEAST, decibels

# On the same integers a kernel differs only by the order of float32 sums.
LEAST8 = LEAST | {torch.float32: 110.0}


# --- the definition ------------------------------------------------------------------------------


@pytest.fixture(params=[None, "VNNI"], ids=["float32", "int8"])
def products(request, monkeypatch):
    """Products of integers by either way; the one in int8 is exact on every CPU."""
    monkeypatch.setattr(rows8, "fast_instructions", lambda: request.param)


def test_half_rounds_to_even_and_the_largest_is_127():
    rows = quantise(torch.tensor([[[0.5, -1.5, 2.5, 127.0, -127.0]]]), grouped=False)
    assert rows.values[0, 0, :5].tolist() == [0, -2, 2, 127, -127]
    assert not rows.values[..., 5:].any()
    assert rows.values.shape[-1] == 64
    assert rows.scales.tolist() == [[[1.0]]]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("width", [64, 150])
def test_numbers_are_kept_to_half_a_scale(draw, grouped, width):
    x = draw(2, 300, width) * torch.logspace(-3, 3, width, device=DEVICE)
    rows = quantise(x, grouped)
    groups = -(-width // 64) if grouped else 1
    assert rows.scales.shape == (2, 300, groups)
    error = (dequantise(rows)[..., :width] - x.float()).abs()
    each = rows.scales.repeat_interleave(rows.values.shape[-1] // groups, -1)[..., :width]
    assert (error <= 0.5001 * each).all()


def test_zeros_stay_zero_and_what_is_not_finite_spreads_over_its_scale():
    x = torch.ones(1, 4, 128)
    x[0, 0], x[0, 1, 3], x[0, 2, 70] = 0, math.nan, math.inf
    found = dequantise(quantise(x, grouped=True))
    assert torch.equal(found[0, 0], torch.zeros(128))
    assert found[0, 1, :64].isnan().all()
    assert not found[0, 2, 64:].isfinite().any()
    assert torch.equal(found[0, 3], torch.ones(128))


@pytest.mark.parametrize("width", [64, 1152, 5632])
def test_products_of_integers_are_exact(products, width):
    generator = np.random.default_rng(0)
    x, weight = (generator.integers(-127, 128, (n, width), np.int8) for n in (33, 24))
    x[0], weight[0] = 127, -127  # the largest sum that there is
    found = rows8.integer_products(torch.from_numpy(x), torch.from_numpy(weight))
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), x.astype(np.int64) @ weight.T.astype(np.int64))


def test_every_cpu_gives_the_same_numbers(monkeypatch):
    x, weight = torch.randn(1, 300, 1152), torch.randn(64, 1152)
    bias = torch.randn(64)
    found = []
    for instructions in (None, "VNNI"):
        monkeypatch.setattr(rows8, "fast_instructions", lambda found=instructions: found)
        rows = quantise(x, grouped=False)
        found.append(rows8.linear8(rows, quantise_weight(weight), bias))
    assert torch.equal(*found)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_linear_map_is_that_of_the_dequantised_numbers(products, dtype, grouped):
    x, weight = torch.randn(2, 150, 200, dtype=dtype), torch.randn(40, 200)
    rows, weight8 = quantise(x, grouped), quantise_weight(weight)
    bias = torch.randn(40, dtype=dtype)
    found = rows8.linear8(rows, weight8, bias)
    assert found.dtype == dtype
    true = wide(rows)[..., :200] @ wide(weight8)[:, :200].T + bias.double()
    assert decibels(found, true) > LEAST8[dtype]


# --- the kernels ---------------------------------------------------------------------------------


@pytest.fixture
def triton() -> Any:
    return pytest.importorskip("triton", minversion=MIN_TRITON)


def wide(x: Any) -> Any:
    """The same in float64."""
    if isinstance(x, Rows8):
        return dequantise(Rows8(x.values, x.scales.double(), torch.float64))
    if isinstance(x, Weight8):
        return x.values * x.scales.double()[:, None]
    return x.double() if isinstance(x, Tensor) else x


def check_producer(
    fused: Callable[..., Rows8], definition: Callable[..., Tensor], grouped: bool, *inputs: Any
) -> None:
    """Check the integers and scales of a kernel against those of its result in float64."""
    found, again = fused(*inputs), fused(*inputs)
    assert all(map(torch.equal, found[:2], again[:2]))
    true = quantise(definition(*map(wide, inputs)).flatten(1, -2), grouped)
    assert found.values.shape == true.values.shape
    torch.testing.assert_close(found.scales, true.scales, rtol=1e-5, atol=0)
    # Numbers half-way between two integers may go either way.
    apart = (found.values.int() - true.values.int()).abs()
    assert apart.max() <= 1
    assert apart.sum() <= 1 + 1e-3 * apart.numel()


def check_consumer(
    fused: Callable[..., Any], definition: Callable[..., Any], dtype: torch.dtype, *inputs: Any
) -> None:
    def copies() -> list[Any]:
        return [x.clone() if isinstance(x, Tensor) else x for x in inputs]

    results = [fused(*copies()), fused(*copies()), definition(*map(wide, inputs))]
    tuples = [one if isinstance(one, tuple) else (one,) for one in results]
    for one, same, true in zip(*tuples, strict=True):
        assert torch.equal(one, same)
        assert decibels(one, true) > LEAST8[dtype]


@pytest.mark.parametrize(
    ("batch", "tokens", "width"), [(1, 1, 32), (2, 7, 96), (1, 3, 1152), (2, 2, 2240)]
)
def test_modulate8(triton, draw, batch, tokens, width):
    from sana_cli.kernels import modulation_triton

    inputs = draw(batch, tokens, width) + 3, draw(width), draw(width), 1e-6
    check_producer(modulation_triton.modulate8, modulate, False, *inputs)


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head"), [(1, 1, 1, 32), (2, 135, 3, 32), (1, 3, 70, 32)]
)
def test_attend_tokens8(triton, draw, batch, tokens, heads, head):
    from sana_cli.kernels import linear_attention_triton

    state = draw(batch, heads, head + 1, head).float()
    state[:, :, -1] = state[:, :, -1].abs() * 10
    inputs = draw(batch, tokens, heads * head), state
    check_producer(linear_attention_triton.attend_tokens8, attend_tokens, True, *inputs)


@pytest.mark.parametrize(
    ("batch", "height", "width", "channels"),
    [(1, 1, 1, 8), (2, 3, 5, 100)] + exhaustive((1, 9, 3, 24), (1, 1, 3, 1120)),
)
def test_depthwise_glu8(triton, draw, batch, height, width, channels):
    from sana_cli.kernels import depthwise_glu_triton

    inputs = (
        draw(batch, height, width, 2 * channels),
        draw(2 * channels, 1, 3, 3, size=1 / 3),
        draw(2 * channels),
    )
    check_producer(depthwise_glu_triton.depthwise_glu8, depthwise_glu, True, *inputs)


def test_what_is_not_a_number_is_not_one_after_rounding(triton, draw):
    from sana_cli.kernels import modulation_triton

    x = draw(1, 3, 96)
    x[0, 1, 5] = math.nan
    with np.errstate(invalid="ignore"):  # of the integers, which are any
        rows = modulation_triton.modulate8(x, draw(96), draw(96), 1e-6)
    assert rows.scales.isnan().flatten().tolist() == [False, True, False]


TILES = ["AMPERE large", "LATER large", "AMPERE small", *exhaustive("LATER small")]
BOTH_TILES = [(1, 1, 100, 72), (2, 70, 64, 130)] + exhaustive((1, 3, 1152, 64), (1, 2, 5600, 16))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("batch", "tokens", "width", "wide_"), BOTH_TILES)
def test_linear_silu8(triton, draw, dtype, monkeypatch, batch, tokens, width, wide_, tile):
    from sana_cli.kernels import projection_triton

    use(tile, monkeypatch)
    x = quantise(draw(batch, tokens, width), grouped=False)
    weight = quantise_weight(draw(wide_, width, size=width**-0.5))
    check_consumer(projection_triton.linear_silu, linear_silu, dtype, x, weight, draw(wide_))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("batch", "tokens", "width", "wide_"), BOTH_TILES)
@pytest.mark.parametrize(("with_bias", "with_gate"), [(1, 1), (0, 0)])
def test_gated_residual_linear8(
    triton, draw, dtype, monkeypatch, batch, tokens, width, wide_, with_bias, with_gate, tile
):
    from sana_cli.kernels import projection_triton

    use(tile, monkeypatch)
    inputs = (
        draw(batch, tokens, wide_),
        quantise(draw(batch, tokens, width), grouped=True),
        quantise_weight(draw(wide_, width, size=width**-0.5)),
        draw(wide_) if with_bias else None,
        draw(wide_) if with_gate else None,
    )
    check_consumer(projection_triton.gated_residual_linear_, gated_residual_linear_, dtype, *inputs)


def use(tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the launcher take tiles of one generation of GPUs, large or small."""
    from sana_cli.kernels import projection_triton, rows8_triton

    generation, size = tile.split()
    target = (8, 0) if generation == "AMPERE" else (9, 0)

    def shapes(x: Rows8, _: tuple[int, int]) -> list:
        return [rows8_triton.block_shapes8(x, target)[size == "small"]]

    monkeypatch.setattr(projection_triton, "block_shapes8", shapes)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "heads"),
    [(1, 1, 32, 1), (2, 135, 96, 3)] + exhaustive((1, 2, 2240, 2), (1, 3, 1152, 1)),
)
def test_project_qkv8(triton, draw, dtype, batch, tokens, width, heads, normed):
    from sana_cli.kernels import linear_attention_triton

    x = quantise(draw(batch, tokens, width), grouped=False)
    weight = quantise_weight(draw(3 * heads * 32, width, size=width**-0.5))
    norm = draw(heads * 32) if normed else None
    inputs = x, weight, heads, norm, 1e-5
    check_consumer(linear_attention_triton.project_qkv, project_qkv, dtype, *inputs)
