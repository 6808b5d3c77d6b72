"""Prompts to text states: Gemma-2 behind the complex human instruction (paper, section 3).

Gemma is causal and its padding comes last, so the padding that the reference computes changes
nothing: only real tokens are run here, and the states are equal.
"""

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sana_cli.checkpoint import load_weights, on_meta, read_config
from sana_cli.errors import BrokenModel
from sana_cli.gemma import Gemma, GemmaConfig
from sana_cli.layout import Parts

MAX_TOKENS = 300  # of text states that the transformer was trained to see


class TextEncoder:
    """A tokenizer and Gemma-2."""

    def __init__(self, parts: Parts, dtype: torch.dtype, device: str) -> None:
        """BrokenModel if the tokenizer or the text encoder is unusable."""
        path = parts["tokenizer"].folder / "tokenizer.json"
        if not path.is_file():
            raise BrokenModel(f"{path} is missing", "is the download complete?")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BrokenModel(f"{path} is not a tokenizer: {error}") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

        part = parts["text_encoder"]
        config, _ = read_config(GemmaConfig, part.config)
        self.model = on_meta(Gemma, config, part.config)
        load_weights(self.model, part.weights, dtype, prefix="model.")
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
        states = self.model(batch)
        return torch.cat([states[:, :1], states[:, start:]], dim=1) if start > 1 else states

    def tokens(self, text: str) -> list[int]:
        """Token ids behind one <bos>, which is all that Gemma's own template adds."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        ids = [self.model.config.bos_token_id, *ids]
        if max(ids) >= self.model.config.vocab_size:
            raise BrokenModel("the tokenizer knows more tokens than the text encoder embeds")
        return ids
