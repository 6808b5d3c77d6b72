"""The Triton kernels against the torch lines that define them, for shapes that fit no tile.

With a GPU the compiled kernels run; without one Triton's interpreter does, on the CPU (conftest).
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sana_cli.kernels import (  # noqa: E402
    depthwise_glu_triton,
    linear_attention_triton,
    modulation_triton,
    projection_triton,
)
from sana_cli.kernels.depthwise_glu import depthwise_glu  # noqa: E402
from sana_cli.kernels.linear_attention import attend_tokens, project_qkv  # noqa: E402
from sana_cli.kernels.modulation import modulate  # noqa: E402
from sana_cli.kernels.projection import add_projected, expand  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter computes with the bits of bfloat16 as if they were integers.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
# Signal to noise in dB, against float64 of the same rounded inputs. A result rounded once, to p
# bits, has 6.02·p + 4 to 6 dB: 150 for float32 (p = 24), 72 for float16 (11), 53 for bfloat16 (8).
# What a kernel rounds on its way (k, v, the state in tf32) may cost a few dB more, and a float32
# sum of a thousand terms loses some bits; a wrong element in 10,000 would cost far more.
LEAST = {torch.float32: 115.0, torch.float16: 65.0, torch.bfloat16: 46.0}
SEEN: dict[str, float] = {}


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """What a kernel leaves out shows."""

    def full_of_nan(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *words, **options: empty(*words, **options).fill_(math.nan)

    monkeypatch.setattr(torch, "empty_like", full_of_nan(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", full_of_nan(Tensor.new_empty))


@pytest.fixture
def draw(dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * size).to(DEVICE, dtype)

    return normal


def decibels(found: Tensor, true: Tensor) -> float:
    assert found.shape == true.shape
    noise = (found.double() - true).square().sum()
    return (10 * torch.log10(true.square().sum() / noise)).item() if noise else math.inf


def check(fused: Callable[..., Tensor], definition: Callable[..., Tensor], *inputs) -> None:
    """Near the definition in float64, in the inputs' dtype, and the same bits again."""

    def copies(dtype: torch.dtype | None = None) -> list:
        return [x.to(dtype, copy=True) if isinstance(x, Tensor) else x for x in inputs]

    found, again = fused(*copies()), fused(*copies())
    true = definition(*copies(torch.float64))
    for a, b, c in zip(found, again, true, strict=True):
        assert torch.equal(a, b)
        level = decibels(a, c)
        print(f"{level:.1f} dB")
        assert level > LEAST[inputs[0].dtype]


def alone(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *inputs: (function(*inputs),)


@pytest.mark.parametrize(
    ("batch", "tokens", "width"), [(1, 1, 32), (2, 7, 96), (1, 3, 1152), (2, 2, 2240)]
)
def test_modulated_rows(draw, dtype, batch, tokens, width):
    x = draw(batch, tokens, width) + 3  # a mean, which is taken away
    inputs = x, draw(width), draw(width), 1e-6
    check(alone(modulation_triton.modulate), alone(modulate), *inputs)


@pytest.mark.parametrize(
    ("batch", "tokens", "width", "wide"),
    [(1, 1, 16, 32), (2, 35, 96, 480), (1, 130, 40, 136), (1, 5, 1152, 64), (2, 3, 2240, 48)],
)
def test_expanded_tokens(draw, dtype, batch, tokens, width, wide):
    inputs = draw(batch, tokens, width), draw(wide, width, size=width**-0.5), draw(wide)
    check(alone(projection_triton.expand), alone(expand), *inputs)


@pytest.mark.parametrize(("with_bias", "with_gate"), [(1, 1), (1, 0), (0, 1), (0, 0)])
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "wide"),
    [(1, 1, 32, 16), (2, 63, 96, 240), (1, 2, 1152, 2880), (1, 2, 2240, 5600)],
)
def test_projections_that_are_added(
    draw, dtype, batch, tokens, width, wide, with_bias, with_gate
):
    if width > 1000 and with_bias == with_gate:
        pytest.skip("these widths have one of the two")
    inputs = (
        draw(batch, tokens, width),
        draw(batch, tokens, wide),
        draw(width, wide, size=wide**-0.5),
        draw(width) if with_bias else None,
        draw(width) if with_gate else None,
    )
    check(alone(projection_triton.add_projected), alone(add_projected), *inputs)


def test_what_is_added_to_is_changed_in_place(draw):
    x, y, weight = draw(1, 5, 32), draw(1, 5, 16), draw(32, 16)
    assert projection_triton.add_projected(x, y, weight, None, None) is x


@pytest.mark.parametrize("rim", [False, True])
@pytest.mark.parametrize(
    ("batch", "height", "width", "channels"),
    [(1, 1, 1, 8), (2, 3, 5, 40), (1, 7, 9, 32), (2, 17, 8, 24), (1, 3, 2, 2880), (1, 2, 3, 5600)],
)
def test_convolved_and_gated_pixels(draw, dtype, batch, height, width, channels, rim):
    x = draw(batch, height + 2 * rim, width, 2 * channels)
    inputs = x, draw(2 * channels, 1, 3, 3, size=1 / 3), draw(2 * channels), rim
    check(alone(depthwise_glu_triton.depthwise_glu), alone(depthwise_glu), *inputs)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head"),
    [(1, 1, 1, 32), (2, 135, 3, 32), (2, 9, 5, 16), (1, 33, 2, 64), (1, 4, 36, 32), (2, 3, 70, 32)],
)
def test_projected_tokens_and_their_state(draw, dtype, batch, tokens, heads, head, normed):
    width = heads * head
    x, weight = draw(batch, tokens, width), draw(3 * width, width, size=width**-0.5)
    norm = draw(width) if normed else None

    def definition(x: Tensor, weight: Tensor, *rest) -> tuple[Tensor, Tensor]:
        """In float64, but for what is rounded to `dtype` on purpose."""
        rounded = torch.nn.functional.linear(x, weight).to(dtype).double()
        same = torch.eye(3 * width, dtype=torch.float64, device=DEVICE)
        return project_qkv(rounded, same, *rest)

    check(linear_attention_triton.project_qkv, definition, x, weight, heads, norm, 1e-5)


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head"),
    [(1, 1, 1, 32), (2, 135, 3, 32), (2, 9, 5, 16), (1, 33, 2, 64), (1, 4, 36, 32), (2, 3, 70, 32)],
)
def test_tokens_that_attend(draw, dtype, batch, tokens, heads, head):
    q = draw(batch, tokens, heads * head)
    state = draw(batch, heads, head + 1, head).float()
    state[:, :, -1] = state[:, :, -1].abs() * 10
    check(alone(linear_attention_triton.attend_tokens), alone(attend_tokens), q, state)
