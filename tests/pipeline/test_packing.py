"""Whether weights are packed: measured once a machine, and never seen in an image."""

import json

import pytest
import torch

from networks import random_dit
from sana_cli.models.fused_dit import FusedDiT
from sana_cli.pipeline import packing

LONG = packing.ENOUGH_STEPS


@pytest.fixture
def kept(tmp_path):
    """Measure, then change what was kept."""
    if packing.rates(tmp_path) is None:
        pytest.skip("this torch has no oneDNN beside MKL")

    def keep(value):
        file = tmp_path / packing.FILE
        (key,) = json.loads(file.read_text())
        file.write_text(json.dumps({key: value}))
        return tmp_path

    return keep


@pytest.mark.parametrize(
    ("rates", "packs"),
    [
        ([1e11, 1.2e11, 5e10, True], True),
        ([1e11, 0.9e11, 5e10, True], False),
        ([1e11, 1.2e11, 5e10, False], False),  # bits would differ
        ([1e11, 1.2e11, 3e11, True], True),  # MKL is never chosen, as bits would differ
    ],
)
def test_what_was_measured_once_decides_from_then_on(kept, rates, packs):
    assert packing.pays(LONG, kept(rates)) is packs


def test_few_steps_do_not_repay_packing(kept):
    assert not packing.pays(LONG - 1, kept([1e11, 1.2e11, 5e10, True]))


@pytest.mark.parametrize("broken", [None, "fast", [1e11], ["a", "b", "c", True]])
def test_what_cannot_be_read_is_measured_again(kept, broken):
    found = packing.rates(kept(broken))
    assert min(found.onednn, found.packed, found.mkl) > 0


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("pag_layers", [(), (1,)])
def test_the_bits_of_a_step_are_those_of_plain_weights(rows, pag_layers):
    rates = packing.rates(None)
    if rates is None or not rates.exact:
        pytest.skip("packing changes bits on this CPU, so it is not used")
    wide = {"num_attention_heads": 7, "num_cross_attention_heads": 7}
    wide |= {"cross_attention_head_dim": 32, "cross_attention_dim": 224}
    fused = FusedDiT(random_dit(**wide))
    latents, time = torch.randn(1, 32, 9, 8), fused.time_modulations([500.0])[0]
    texts = [fused.encode_text(torch.randn(1, length, 16)) for length in (1, 5)]
    fused.row_chunk = rows
    with torch.inference_mode():
        plain = fused(latents, time, texts, None, pag_layers)
        fused.pack(mapped=False)
        assert fused(latents, time, texts, None, pag_layers).equal(plain)
