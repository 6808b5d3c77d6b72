"""Prompts to text states: Gemma-2 behind the complex human instruction (paper, section 3).

Gemma is causal and its padding comes last, so the padding that the reference computes changes
nothing: only real tokens are run here, and the states are equal.
"""

from pathlib import Path

import torch
from torch import Tensor

from sana_cli.checkpoint import load_weights, on_meta, read_json, weight_files
from sana_cli.errors import BrokenModel
from sana_cli.weights import find_file

MAX_TOKENS = 300  # of text states that the transformer was trained to see

# From the released models' configuration; the prompt follows the last, trailing space.
INSTRUCTION = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual"
        " descriptions suitable for image generation. Evaluate the level of detail in the user"
        " prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes,"
        " textures, and spatial relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly"
        " without overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round"
        " shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming"
        " red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk,"
        " featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a"
        " double-decker bus passing by towering glass skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including"
        " any additional commentary or evaluations:",
        "User Prompt: ",
    )
)


class TextEncoder:
    """A tokenizer and the Gemma-2 decoder stack, without its language-model head."""

    def __init__(self, folder: Path, variant: str, dtype: torch.dtype, device: str) -> None:
        """`folder` holds `tokenizer/` and `text_encoder/`. BrokenModel if either is unusable."""
        from tokenizers import Tokenizer
        from transformers.models.gemma2 import modeling_gemma2
        from transformers.models.gemma2.configuration_gemma2 import Gemma2Config

        path = find_file(folder / "tokenizer", "tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BrokenModel(f"{path} is not a tokenizer: {error}") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

        part = folder / "text_encoder"
        values = read_json(part / "config.json")
        try:
            config = Gemma2Config(**values)
        except Exception as error:  # validation errors of several libraries
            raise BrokenModel(f"{part / 'config.json'}: {error}") from None
        # Gemma-2 caps its attention scores, which the fused attention kernels cannot do.
        config._attn_implementation = "eager"
        self.bos = config.bos_token_id
        self.model = on_meta(modeling_gemma2.Gemma2Model, config)
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
        """Token ids with exactly one leading <bos>."""
        ids = self.tokenizer.encode(text).ids
        return ids if ids[:1] == [self.bos] else [self.bos, *ids]
