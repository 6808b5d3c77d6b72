"""Products with packed weights."""

import pytest
import torch

from sana_cli.kernels.linear import is_packed, linear, pack, unpack, uses_onednn

pytestmark = pytest.mark.skipif(
    not uses_onednn(torch.empty(0)), reason="this torch has no oneDNN beside MKL"
)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("rows", [1, 77, 600])
def test_a_packed_weight_gives_the_same_product(rows, silu):
    x, weight, bias = torch.randn(2, rows, 70), torch.randn(130, 70), torch.randn(130)
    packed = pack(weight)
    expected = linear(x.double(), weight.double(), bias.double(), silu).float()
    torch.testing.assert_close(linear(x, packed, bias, silu), expected, rtol=1e-5, atol=1e-5)


def test_unpacking_returns_the_weight():
    weight = torch.randn(130, 70)
    packed = pack(weight)
    assert is_packed(packed)
    assert not is_packed(weight)
    assert unpack(packed).equal(weight)
