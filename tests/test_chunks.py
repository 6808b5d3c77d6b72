"""The transformer in chunks of rows is the transformer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import LIKE_0_6B, LIKE_1_6B
from sana_cli.chunks import run_in_chunks
from sana_cli.dit import DiT, DiTConfig


def random_dit(**config) -> DiT:
    torch.manual_seed(0)
    dit = DiT(DiTConfig(**{"num_layers": 2, "caption_channels": 16, **LIKE_0_6B, **config}))
    for name, parameter in dit.named_parameters():
        if "table" in name:  # they are not drawn when the network is built
            parameter.data = 0.3 * torch.randn_like(parameter)
    return dit.eval().requires_grad_(False)


def compare(dit: DiT, height: int, width: int, rows: int, dtype=torch.float32) -> float:
    """Relative difference between the chunked and the plain velocity."""
    dit = dit.to(dtype)
    latents, text = (
        torch.randn(2, 32, height, width, dtype=dtype),
        torch.randn(2, 5, 16, dtype=dtype),
    )
    mask = torch.tensor([[True] * 2 + [False] * 3, [True] * 5])
    call = (latents, torch.tensor([700.0, 700.0]), dit.project_text(text), mask)
    plain = dit(*call).double()
    run_in_chunks(dit, rows)
    return ((dit(*call).double() - plain).norm() / plain.norm()).item()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 24))
def test_any_grid_in_chunks_of_any_height(height, width, rows):
    assert compare(random_dit(), height, width, rows) < 1e-6


@pytest.mark.parametrize(
    "kind",
    [LIKE_1_6B, {"qk_norm": "rms_norm_across_heads"}, {"interpolation_scale": 2.0}],
    ids=["1.6B", "qk-norm", "positions"],
)
def test_every_kind_of_transformer(kind):
    assert compare(random_dit(**kind), 12, 7, 5) < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_differs_by_its_own_rounding(dtype, bound):
    assert compare(random_dit(), 12, 7, 5, dtype) < bound


def test_chunks_can_be_made_smaller_later():
    dit = random_dit()
    run_in_chunks(dit, 8)
    assert compare(dit, 9, 4, 2) < 1e-6
