"""LoRAs merged into the weights of a transformer."""

import math

import pytest
import torch
from safetensors.torch import load_file

from loras import lora_for, merged, written
from sana_cli.errors import BrokenModel
from sana_cli.models.dit import DiT
from sana_cli.weights.checkpoint import load_weights, on_meta
from sana_cli.weights.lora import MergedTensors, read_lora


def test_the_sum_is_cast_once(base, config, tmp_path):
    """Updates that each vanish in bfloat16 add up."""
    torch.manual_seed(0)
    file = lora_for(config, tmp_path / "small.safetensors", size=0.01)
    name = "transformer_blocks.0.attn1.to_q.weight"
    loras = [(file, 1.0)] * 3
    exact = merged(base, config, *loras)[name]
    got = merged(base, config, *loras, dtype=torch.bfloat16)
    assert torch.equal(got[name], exact.bfloat16())
    assert not torch.equal(got[name], load_file(base)[name].bfloat16())


def test_only_what_a_lora_changes_is_copied(base, config, tmp_path):
    file = lora_for(config, tmp_path / "lora.safetensors", [1])
    source = MergedTensors([base], [(read_lora(file), 1.0)], config, torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in source.tensors("")}
    changed = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert changed == {f"transformer_blocks.1.attn1.to_{m}.weight" for m in "qkv"}
    assert dict(source.tensors("transformer_blocks.1.attn1.")).keys() == {
        name.removeprefix("transformer_blocks.1.attn1.")
        for name in dtypes
        if name.startswith("transformer_blocks.1.attn1.")
    }


def test_a_scale_of_zero_changes_nothing(base, config, tmp_path):
    file = lora_for(config, tmp_path / "lora.safetensors")
    plain = load_file(base)
    assert all(torch.equal(t, plain[n]) for n, t in merged(base, config, (file, 0.0)).items())


def test_what_is_not_finite_is_refused(base, config, tmp_path):
    file = lora_for(config, tmp_path / "large.safetensors", size=100)
    merged(base, config, (file, 1.0))
    with pytest.raises(BrokenModel, match=r"not finite with large\.safetensors:1") as refusal:
        merged(base, config, (file, 1.0), dtype=torch.float16)  # beyond 65504
    assert "smaller scale" in refusal.value.hint
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = math.nan
    with pytest.raises(BrokenModel, match="not finite"):
        merged(base, config, (written(file, tensors), 1.0))


def test_what_does_not_fit_its_config_is_reported_by_the_loader(base, config, tmp_path):
    tensors = load_file(base)
    tensors["transformer_blocks.0.attn1.to_q.weight"] = torch.zeros(3, 5)
    broken = written(tmp_path / "broken.safetensors", tensors)
    lora = read_lora(lora_for(config, tmp_path / "lora.safetensors"))
    source = MergedTensors([broken], [(lora, 1.0)], config, torch.float32)
    with pytest.raises(
        BrokenModel, match=r"broken.safetensors with lora.safetensors:1 does not fit"
    ):
        load_weights(on_meta(DiT, config, base), [source], torch.float32)
