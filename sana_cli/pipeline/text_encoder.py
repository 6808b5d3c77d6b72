"""Prompts to text states: Gemma-2 behind the complex human instruction (paper, section 3).

Gemma is causal and its padding comes last, so the padding in the reference has no effect: only
real tokens are run here, and the states are equal. For the same reason the instruction, which
comes first, can be run once for all prompts.
"""

import os

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sana_cli.errors import BrokenModel
from sana_cli.instruction import normalise_prompt
from sana_cli.models.configs import GemmaConfig
from sana_cli.models.gemma import Gemma, MappedEmbedding
from sana_cli.pipeline.text_cache import Prefix, TextCache, tokenizer_file
from sana_cli.system.devices import wide_dtype
from sana_cli.weights.checkpoint import load_weights, move, on_meta
from sana_cli.weights.config_files import read_config
from sana_cli.weights.layout import Parts

MAX_TOKENS = 300  # of text states that the transformer was trained to see


class TextEncoder:
    """A tokenizer and Gemma-2."""

    def __init__(
        self, parts: Parts, precision: str, device: str, cache: TextCache | None = None
    ) -> None:
        """`precision`: "float32", "bfloat16", or "int8" for the layers' linear maps.

        With a cache, prefixes of instructions and quantised layers are read from and kept in it;
        without, every text is run whole. In int8 the instruction is always run first, alone:
        outliers depend on the tokens that are run together, and an image must not depend on
        whether there is a cache. BrokenModel if the files are unusable.
        """
        path = tokenizer_file(parts)
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BrokenModel(f"{path} is not a tokenizer: {error}") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        eight_bit = precision == "int8"
        self.device, self.cache = device, cache
        self.eight_bit = eight_bit
        self.prefixes: dict[str, Prefix] = {}  # by instruction

        part = parts["text_encoder"]
        config, _ = read_config(GemmaConfig, part.config)
        self.model = on_meta(Gemma, config, part.config)
        load_weights(self.model, part.weights, None, prefix="model.")
        dtype = getattr(torch, wide_dtype(device) if eight_bit else precision)
        self.model.embed_tokens = MappedEmbedding(self.model.embed_tokens.weight, dtype)
        if eight_bit:
            self._quantise()
            self.model.to(device)  # the norms always compute in float32
        else:
            move(self.model, part.weights, device, dtype)

    def _quantise(self) -> None:
        """Replace the model's layers by 8-bit ones, from the cache or newly quantised."""
        from sana_cli.models.int8 import install, is_quantised_from, quantise

        layers = self.cache.layers if self.cache else None
        tensors = layers.read("linear") if layers else None
        if tensors is None or not is_quantised_from(self.model, tensors):
            tensors = quantise(self.model)
            if layers:
                layers.write(tensors, "linear")
                # Mapped from the file, they take as little memory as in later runs.
                tensors = layers.read("linear") or tensors
        install(self.model, tensors)

    def encode(self, prompt: str, instruction: str = "") -> Tensor:
        """Return states (1, L, width) of <bos> and the prompt's tokens, 1 <= L <= 300.

        With an instruction both are run, and the states of <bos> and of all tokens from the
        instruction's last on are returned. Longer prompts are cut on the right.
        """
        ids = self.tokens(instruction + normalise_prompt(prompt))
        start = max(len(self.tokens(instruction)) - 1, 1)
        ids = ids[: start - 1 + MAX_TOKENS]
        if (self.eight_bit or self.cache) and start > 1:
            return self._encode_after_prefix(self._prefix(instruction), ids)
        states, _ = self.model(self._batch(ids))
        return torch.cat([states[:, :1], states[:, start:]], dim=1) if start > 1 else states

    def _encode_after_prefix(self, prefix: Prefix, ids: list[int]) -> Tensor:
        """Return the states that `encode` keeps, running only the tokens after the prefix.

        A tokenizer may merge a prompt's first word with the text before it.
        """
        shared = len(os.path.commonprefix([prefix.tokens, ids[:-1]]))
        past = [(keys[:, :, :shared], values[:, :, :shared]) for keys, values in prefix.past]
        states, _ = self.model(self._batch(ids[shared:]), past)
        return torch.cat([prefix.first, states[:, len(prefix.tokens) - shared :]], dim=1)

    def _prefix(self, instruction: str) -> Prefix:
        """Return the prefix of the instruction without its last token, a space, which the
        tokenizer merges with most prompts."""
        found = self.prefixes.get(instruction)
        if found is None:
            tokens = self.tokens(instruction)[:-1]
            found = self.cache.prefix(tokens) if self.cache else None
            if found is None:
                states, past = self.model(self._batch(tokens))
                found = Prefix(tokens, states[:, :1], past)
                if self.cache:
                    self.cache.keep_prefix(found)
            self.prefixes[instruction] = found
        return found

    def tokens(self, text: str) -> list[int]:
        """Return token ids after one <bos>, the only token that Gemma's own template adds."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        ids = [self.model.config.bos_token_id, *ids]
        if max(ids) >= self.model.config.vocab_size:
            raise BrokenModel("the tokenizer has more tokens than the text encoder embeds")
        return ids

    def _batch(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.device)
