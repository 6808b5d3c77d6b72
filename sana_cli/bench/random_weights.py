"""Models with random weights of the right sizes: what they draw is noise, what they cost is not.

For measurements on machines that lack the weights. Nothing is written but the configs: a tensor is
made when it is loaded, and the same one each time.
"""

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from sana_cli.instruction import INSTRUCTION
from sana_cli.models.dc_ae import DCAE
from sana_cli.models.dit import DiT
from sana_cli.models.gemma import Gemma
from sana_cli.weights.catalogue import Model
from sana_cli.weights.layout import CONFIGS, INDEX, Part, Parts
from sana_cli.weights.model_files import (
    PIPELINES,
    SPRINT_PIPELINES,
    ModelFiles,
    open_model,
    released_model,
)

BLOCK = 1_048_573  # normal numbers that every tensor is cut from; a prime, so rows do not repeat
SPECIAL = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}


@dataclass(frozen=True)
class RandomTensors:
    """Matrices and kernels are normal / √fan-in, so that what goes through keeps its size; weights
    of norms are one and biases zero. It serves as the weights of a `Part`."""

    shapes: dict[str, torch.Size]  # by published name
    dtype: torch.dtype
    device: str

    def tensors(self, only: str) -> Iterator[tuple[str, Tensor]]:
        block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
        moved = block.to(self.device)
        for name, shape in self.shapes.items():
            if not name.startswith(only):
                continue
            scale = 1 / math.sqrt(math.prod(shape[1:]))
            if name.endswith("embed_tokens.weight"):
                # A real table stays in its file and takes no memory. Nor do rows that overlap.
                tensor = (block * scale).to(self.dtype)
                tensor = tensor.as_strided(shape, ((BLOCK - shape[1]) // shape[0], 1))
            elif len(shape) == 1:
                value = 0.0 if name.endswith("bias") else 1.0
                tensor = torch.full(shape, value, dtype=self.dtype, device=self.device)
            else:
                numbers = moved.roll(zlib.crc32(name.encode()) % BLOCK) * scale
                tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
                for piece in tensor.view(-1).split(BLOCK):
                    piece.copy_(numbers[: len(piece)])
            yield name.removeprefix(only), tensor


def random_model(model: Model, found: Parts | None, folder: Path, device: str) -> ModelFiles:
    """Build a model with random weights from its configs: those in `found`, or the released ones.

    Configs of a released model that is not here, and a tokenizer that knows the words of the
    instruction and takes about as many tokens for it as Gemma's, are written into `folder`.
    """
    parts = found
    if parts is None:
        write_configs(released_model(model), folder)
        parts = {name: Part(folder / name) for name in CONFIGS}
    files = open_model(parts)
    with torch.device("meta"):
        networks: dict[str, tuple[nn.Module, torch.dtype]] = {
            "transformer": (DiT(files.dit), torch.bfloat16),
            "vae": (DCAE(files.vae), torch.float32),
            "text_encoder": (Gemma(files.text), torch.bfloat16),
        }
    drawn = dict(parts)
    for name, (network, dtype) in networks.items():
        shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
        # The autoencoder is folded in float32 before it moves, so it is made where files are read.
        where = "cpu" if name == "vae" else device
        drawn[name] = replace(parts[name], weights=(RandomTensors(shapes, dtype, where),))
    return replace(files, parts=drawn)


def write_configs(files: ModelFiles, folder: Path) -> None:
    """Write all files of the published layout but the weights."""
    kind = (SPRINT_PIPELINES if files.is_sprint else PIPELINES)[0]
    documents: dict[str, Any] = {
        INDEX: {"_class_name": kind},
        "transformer/config.json": {"_class_name": "SanaTransformer2DModel"} | asdict(files.dit),
        "vae/config.json": {"_class_name": "AutoencoderDC"} | asdict(files.vae),
        "text_encoder/config.json": {"model_type": "gemma2"}
        | {key: value for key, value in asdict(files.text).items() if value is not None},
        "scheduler/scheduler_config.json": {"flow_shift": files.flow_shift},
        "tokenizer/tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{name.strip('<>')}_token": name for name in SPECIAL},
        },
    }
    for name, document in documents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document), encoding="utf-8")
    words = pre_tokenizers.Whitespace().pre_tokenize_str(INSTRUCTION)
    known = dict.fromkeys([*SPECIAL, *(word for word, _ in words)])
    vocabulary = {word: i for i, word in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL))
    # Gemma's own template puts <bos> first.
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL["<bos>"])]
    )
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
