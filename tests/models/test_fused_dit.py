"""The fused DiT equals the plain transformer, and computes less."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from networks import DIT_KINDS, random_dit, velocity_error
from sana_cli.models.cross_attention import KeyValueText
from sana_cli.models.fused_dit import FusedDiT

PADDED = 300  # tokens that the reference pads a text to


@given(st.integers(1, 20), st.integers(1, 9), st.none() | st.integers(1, 24))
def test_any_grid_whole_or_in_chunks_of_any_height(height, width, rows):
    assert velocity_error(random_dit(), height, width, rows) < 1e-6


@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("kind", DIT_KINDS.values(), ids=DIT_KINDS)
def test_every_kind_of_transformer(kind, rows):
    assert velocity_error(random_dit(**kind), 12, 7, rows) < 1e-6


@pytest.mark.parametrize("lengths", [(1, 5), (1,), (4,), (1, 1), (3, 90)], ids=str)
@pytest.mark.parametrize("padded", [1, 8])
@pytest.mark.parametrize("kind", ["0.6B", "qk-norm"])
def test_texts_of_one_token_of_few_and_of_many_padded_or_not(kind, lengths, padded):
    assert velocity_error(random_dit(**DIT_KINDS[kind]), 6, 4, None, lengths, padded) < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("rows", [None, 5])
def test_half_precision_differs_by_its_own_rounding(dtype, bound, rows):
    assert velocity_error(random_dit().to(dtype), 12, 7, rows) < bound


def test_chunks_can_be_made_smaller_later():
    fused = FusedDiT(random_dit())
    latents, time = torch.randn(1, 32, 9, 4), fused.time_modulations([500.0])[0]
    texts = [fused.encode_text(torch.randn(1, 5, 16))]
    whole = fused(latents, time, texts)
    for fused.row_chunk in (8, 2):
        torch.testing.assert_close(fused(latents, time, texts), whole)


# --- savings -----------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts operations other than views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def of_linear(x, weight, *_, out_shape) -> int:
    return 2 * math.prod(x) * weight[0]


def flops(work) -> int:
    """Count the FLOPs of matrix products, with softmax attention run as such products."""
    linear = {torch.ops.mkldnn._linear_pointwise: of_linear}
    counter = FlopCounterMode(display=False, custom_mapping=linear)
    with counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def operations(work) -> int:
    with Operations() as counter:
        work()
    return counter.count


@pytest.fixture(scope="module")
def fused() -> FusedDiT:
    """Wide enough for text and image tokens to cost in proportion to the released models."""
    wide = {"num_attention_heads": 8, "num_cross_attention_heads": 4}
    wide |= {"cross_attention_head_dim": 64, "cross_attention_dim": 256}
    return FusedDiT(random_dit(**wide, num_layers=4))


@pytest.fixture(scope="module")
def call(fused):
    """Latents, a time modulation, and the states of an empty text and of one of 25 tokens."""
    latents, time = torch.randn(1, 32, 16, 16), fused.time_modulations([500.0])[0]
    return latents, time, torch.randn(1, 1, 16), torch.randn(1, 25, 16)


def test_a_step_skips_what_text_and_time_alone_determine(call):
    latents, _, _, text = call
    dit = random_dit()
    caption, at = dit.project_text(text), torch.tensor([500.0])
    plain = flops(lambda: dit(latents, at, caption))
    times = flops(lambda: dit.time_embed(at))
    keys_and_values = 2 * 2 * 2 * 25 * dit.config.width**2  # of two layers
    fused = FusedDiT(dit)
    time, context = fused.time_modulations([500.0])[0], fused.encode_text(text)
    saved = plain - flops(lambda: fused(latents, time, [context]))
    assert saved >= keys_and_values + times


def test_padding_is_not_attended_to(fused, call):
    latents, time, _, text = call
    own, padded = (fused.encode_text(text, length, fold=False) for length in (1, PADDED))
    short, long = (fused(latents, time, [context]) for context in (own, padded))
    torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-5)
    saved = flops(lambda: fused(latents, time, [padded]))
    saved -= flops(lambda: fused(latents, time, [own]))
    assert saved == 4 * 2 * 2 * 256 * (PADDED - 25) * fused.config.width  # q·k and weights·v


def test_an_empty_text_costs_no_attention(fused, call):
    latents, time, empty, text = call
    constant, general = fused.encode_text(empty), fused.encode_text(empty, 2, fold=False)
    a, b = (fused(latents, time, [context]) for context in (constant, general))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    saved = flops(lambda: fused(latents, time, [general]))
    saved -= flops(lambda: fused(latents, time, [constant]))
    assert saved >= 4 * 2 * 2 * 256 * fused.config.width**2  # query and output projections


def test_a_short_text_is_folded_into_the_projections_around_it(fused, call):
    latents, time, _, text = call
    for words in (text[:, :8], text):  # of 4 heads: 32 and 100 scores
        contexts = [fused.encode_text(words, fold=fold) for fold in (True, False)]
        a, b = (fused(latents, time, [context]) for context in contexts)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        spent, plain = (flops(lambda h=context: fused(latents, time, [h])) for context in contexts)
        scores, width = 4 * words.shape[1], fused.config.width
        # Two products with `scores` columns for two projections, the scores and their use.
        assert plain - spent == 4 * 2 * 2 * 256 * (width - scores + words.shape[1]) * width


def test_a_long_text_is_not_folded(fused):
    # 4 heads of 33 tokens: more than half of 256 channels.
    assert isinstance(fused.encode_text(torch.randn(1, 33, 16))[0], KeyValueText)


def test_the_first_self_attention_is_computed_once_for_all_texts(fused, call):
    latents, time, empty, text = call
    texts = [fused.encode_text(empty), fused.encode_text(text)]
    batched = fused(latents, time, texts)
    one_by_one = torch.cat([fused(latents, time, [one]) for one in texts])
    torch.testing.assert_close(batched, one_by_one, rtol=1e-5, atol=1e-5)
    saved = sum(flops(lambda one=one: fused(latents, time, [one])) for one in texts)
    saved -= flops(lambda: fused(latents, time, texts))
    assert saved >= 4 * 2 * 256 * fused.config.width**2  # q, k, v and output of one layer


def test_all_timesteps_are_embedded_in_one_pass(fused):
    steps = [900.0, 500.0, 100.0]
    at_once = fused.time_modulations(steps)
    for step, time in zip(steps, at_once, strict=True):
        (alone,) = fused.time_modulations([step])
        torch.testing.assert_close(time, alone)
    assert operations(lambda: fused.time_modulations(steps)) == operations(
        lambda: fused.time_modulations([1.0])
    )
