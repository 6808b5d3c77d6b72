"""LoRA files as tests write them, and weights with LoRAs merged into them."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from sana_cli.models.configs import DiTConfig
from sana_cli.weights.lora import MergedTensors, read_lora

BLOCKS = 2


def merged(base, config, *loras, dtype=torch.float32) -> dict[str, torch.Tensor]:
    chosen = [(read_lora(path), scale) for path, scale in loras]
    return dict(MergedTensors([base], chosen, config, dtype).tensors(""))


def written(path: Path, tensors, metadata=None) -> Path:
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata
    )
    return path


def lora_for(config: DiTConfig, path: Path, blocks=range(BLOCKS), size=0.1, **metadata) -> Path:
    """Rank 2 on the self-attention of some blocks."""
    tensors = {}
    for i in blocks:
        for module in ("to_q", "to_k", "to_v"):
            key = f"transformer.transformer_blocks.{i}.attn1.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(2, config.width) * size
            tensors[f"{key}.lora_B.weight"] = torch.randn(config.width, 2) * size
    return written(path, tensors, metadata or None)
