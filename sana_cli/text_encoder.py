"""Prompts to text states: Gemma-2 behind the complex human instruction (paper, section 3).

Gemma is causal and its padding comes last, so the padding that the reference computes changes
nothing: only real tokens are run here, and the states are equal.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config

from sana_cli.checkpoint import load_weights, on_meta, read_json, weight_files
from sana_cli.errors import BrokenModel
from sana_cli.weights import find_file

MAX_TOKENS = 300  # of text states that the transformer was trained to see
MOST_LAYERS = 1000


class TextEncoder:
    """A tokenizer and the Gemma-2 decoder stack, without its language-model head."""

    def __init__(self, folder: Path, variant: str, dtype: torch.dtype, device: str) -> None:
        """`folder` holds `tokenizer/` and `text_encoder/`. BrokenModel if either is unusable."""
        path = find_file(folder / "tokenizer", "tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BrokenModel(f"{path} is not a tokenizer: {error}") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

        part = folder / "text_encoder"
        values = read_json(part / "config.json")
        # The sizes that decide how much is built, checked before anything is.
        for name, most in (("num_hidden_layers", MOST_LAYERS), ("vocab_size", 2**22)):
            value = values.get(name, 1)
            if not isinstance(value, int) or not 0 < value <= most:
                raise BrokenModel(f"{part / 'config.json'}: {name} is {value!r}")
        self.model = on_meta(_gemma, values, part / "config.json")
        config = self.model.config
        self.bos, self.vocabulary = config.bos_token_id, config.vocab_size
        if not isinstance(self.bos, int) or not 0 <= self.bos < self.vocabulary:
            raise BrokenModel(f"{part / 'config.json'}: bos_token_id is {self.bos!r}")
        load_weights(self.model, weight_files(part, "model", variant), dtype, prefix="model.")
        # What is computed rather than stored is still on meta.
        self.model.rotary_emb = modeling_gemma2.Gemma2RotaryEmbedding(config)
        self.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
        left = [name for name, buffer in self.model.named_buffers() if buffer.is_meta]
        if left:
            raise BrokenModel(f"this version of transformers computes {left} in another way")
        self.model.to(device)
        self.device = device

    def encode(self, prompt: str, instruction: str = "") -> Tensor:
        """States (1, L, width) of the prompt's tokens behind a leading <bos>, 1 <= L <= 300.

        With an instruction the whole is read, and of it <bos> and the part from the
        instruction's last token on are kept. Longer prompts are cut on the right.
        """
        prompt = prompt.lower().strip()  # as the reference does; the instruction keeps its case
        ids = self.tokens(instruction + prompt)
        start = 1
        if instruction:
            start = len(self.tokens(instruction)) - 1
        ids = ids[: start - 1 + MAX_TOKENS]
        batch = torch.tensor([ids], device=self.device)
        states = self.model(input_ids=batch, use_cache=False).last_hidden_state
        return torch.cat([states[:, :1], states[:, start:]], dim=1) if start > 1 else states

    def tokens(self, text: str) -> list[int]:
        """Token ids behind one <bos>, which is all that Gemma's own template adds."""
        ids = [self.bos, *self.tokenizer.encode(text, add_special_tokens=False).ids]
        if max(ids) >= self.vocabulary:
            raise BrokenModel("the tokenizer knows more tokens than the text encoder embeds")
        return ids


def _gemma(values: dict[str, Any]) -> Any:
    config = Gemma2Config(**values)
    # Gemma-2 caps its attention scores, which the fused attention kernels cannot do.
    config._attn_implementation = "eager"
    return modeling_gemma2.Gemma2Model(config)
