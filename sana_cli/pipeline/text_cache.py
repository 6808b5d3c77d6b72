"""The text cache on disk: states of prompts and prefixes of instructions."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from sana_cli import __version__
from sana_cli.errors import BrokenModel
from sana_cli.models.gemma import KeysValues
from sana_cli.system.devices import full_name
from sana_cli.weights.layout import Parts
from sana_cli.weights.tensor_cache import TensorCache, identity

LIMIT = 256 * 2**20  # bytes: about 2,000 prompts of Gemma-2-2B
INT8_LIMIT = 8 * 2**30  # bytes of quantised layers: four of Gemma-2-2B


def tokenizer_file(parts: Parts) -> Path:
    path = parts["tokenizer"].folder / "tokenizer.json"
    if not path.is_file():
        raise BrokenModel(f"{path} is missing", "is the download complete?")
    return path


@dataclass(frozen=True)
class Prefix:
    """The keys, values and first state of tokens that many texts begin with."""

    tokens: list[int]
    first: Tensor  # (1, 1, D), the state of the first token
    past: list[KeysValues]


class TextCache:
    """The exact results of one text encoder in one precision on one device."""

    def __init__(self, folder: Path, parts: Parts, precision: str, device: str) -> None:
        encoder = parts["text_encoder"]
        facts = [__version__, torch.__version__, full_name(device), precision]
        try:
            whole = identity([encoder.config, *encoder.files, tokenizer_file(parts)])
        except OSError as error:
            raise BrokenModel(f"{error.filename} cannot be read: {error.strerror}") from None
        self.texts = TensorCache(folder / "text", LIMIT, [*facts, whole])
        self.layers: TensorCache | None = None
        if precision == "int8":
            # Quantised layers depend on the weights alone, so all devices share them.
            library = version("bitsandbytes")
            self.texts.facts.append(library)
            facts = [library, identity(encoder.files)]
            self.layers = TensorCache(folder / "int8", INT8_LIMIT, facts, checked=False)
        self.device = device

    def faults(self) -> list[str]:
        """Return why entries could not be written, if any failed."""
        stores = (self.texts, self.layers)
        return sorted({store.fault for store in stores if store and store.fault})

    def states(self, prompt: str, instruction: str) -> Tensor | None:
        """Return the states (1, L, D) of a normalised prompt on the device, or None."""
        found = self.texts.read("states", prompt, instruction)
        return found["states"].to(self.device) if found else None

    def keep_states(self, states: Tensor, prompt: str, instruction: str) -> None:
        self.texts.write({"states": states.cpu().contiguous()}, "states", prompt, instruction)

    def prefix(self, tokens: list[int]) -> Prefix | None:
        found = self.texts.read("prefix", tokens)
        if not found:
            return None
        first, keys, values = (found[n].to(self.device) for n in ("first", "keys", "values"))
        return Prefix(tokens, first, list(zip(keys, values, strict=True)))

    def keep_prefix(self, prefix: Prefix) -> None:
        keys, values = (_stack(layers) for layers in zip(*prefix.past, strict=True))
        tensors = {"first": prefix.first.cpu().contiguous(), "keys": keys, "values": values}
        self.texts.write(tensors, "prefix", prefix.tokens)


def _stack(layers: Iterable[Tensor]) -> Tensor:
    return torch.stack([layer.cpu() for layer in layers]).contiguous()
