"""Files that cannot be applied as a LoRA are refused, with the reason."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loras import lora_for, written
from reference import LIKE_1_6B
from sana_cli.errors import BrokenModel, SanaError
from sana_cli.models.architectures import TRANSFORMERS
from sana_cli.models.configs import DiTConfig
from sana_cli.weights.lora import fit, read_lora, unchanged_lora


def refusal(path: Path, config: DiTConfig | None = None) -> str:
    with pytest.raises(SanaError) as caught:
        lora = read_lora(path)
        fit(lora, config or DiTConfig())
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return f"{caught.value.message}\n{caught.value.hint}"


KEY = "transformer.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("lora_te_layers_0_self_attn_q_proj.lora_down.weight", "text encoder"),
        ("text_encoder.layers.0.self_attn.q_proj.lora_A.weight", "text encoder"),
        ("bundle_emb.<fox>.gemma", "embeddings of new words"),
        ("lora_transformer_transformer_blocks_0_attn1_to_q.dora_scale", "DoRA"),
        (f"{KEY}.lora_magnitude_vector", "DoRA"),
        (f"{KEY}.lora_magnitude_vector.weight", "DoRA"),
        ("lycoris_transformer_blocks_0_attn1_to_q.hada_w1_a", "kind of adapter"),
        ("lycoris_transformer_blocks_0_ff_conv_depth.lokr_t2", "kind of adapter"),
        ("diffusion_model.blocks.0.attn.qkv.diff", "kind of adapter"),
        ("transformer.single_blocks.3.attn.to_q.lora_A.weight", "no part of Sana's transformer"),
        (f"{KEY}.lora_C.weight", "no part of Sana's transformer"),
    ],
)
def test_what_cannot_be_applied_is_refused_by_name(config, tmp_path, key, says):
    file = lora_for(config, tmp_path / "lora.safetensors")
    written(file, load_file(file) | {key: torch.ones(2, 2)})
    said = refusal(file, config)
    assert says in said
    assert key in said


def test_the_model_that_it_was_made_for_is_named(tmp_path):
    narrow, wide = TRANSFORMERS["sana-0.6b"], TRANSFORMERS["sana-1.6b"]
    file = lora_for(wide, tmp_path / "wide.safetensors", range(20))
    said = refusal(file, narrow)
    assert "was made for the 1.6B (width 2240); this model is 1152 wide" in said
    assert "--model sana-1.6b-" in said
    file = lora_for(narrow, tmp_path / "narrow.safetensors", range(28))
    said = refusal(file, wide)
    assert "the 0.6B (width 1152); this model is 2240 wide" in said
    file = lora_for(wide, tmp_path / "deep.safetensors", [59])
    assert "the 4.8B: it changes block 60, and this model has 20" in refusal(file, wide)
    file = lora_for(DiTConfig(**LIKE_1_6B), tmp_path / "demo.safetensors", [8])
    assert "the demo (width 224)" in refusal(file, wide)


def _depthwise(tensors):
    key = "transformer.transformer_blocks.0.ff.conv_depth"
    tensors[f"{key}.lora_A.weight"] = torch.ones(2, 1440, 3, 3)
    tensors[f"{key}.lora_B.weight"] = torch.ones(1440, 2, 1, 1)


def _fused_as_well(tensors):
    tensors["blocks.0.attn.qkv.lora_A.weight"] = torch.ones(2, 288)
    tensors["blocks.0.attn.qkv.lora_B.weight"] = torch.ones(864, 2)


def _put(name, tensor):
    return lambda tensors: tensors.update({f"{KEY}.{name}": tensor})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.clear(), "it is empty"),
        (lambda t: t.pop(f"{KEY}.lora_B.weight"), "lacks B"),
        (lambda t: t.pop(f"{KEY}.lora_A.weight"), "lacks A"),
        (_put("lora_A.weight", torch.ones(3, 288)), "do not multiply"),
        (_put("lora_A.weight", torch.ones(288)), "do not multiply"),
        (_put("lora_B.weight", torch.ones(5, 2)), "is (5, 288), not (288, 288)"),
        (_put("lora_down.weight", torch.ones(2, 288)), "twice"),
        (_put("lora_B.bias", torch.ones(288)), "no bias"),
        (_put("lora_B.bias", torch.ones(9)), "bias of transformer_blocks.0.attn1.to_q"),
        (_put("alpha", torch.tensor(math.nan)), "alpha"),
        (_put("alpha", torch.ones(2)), "alpha"),
        (_put("lora_A.weight", torch.ones(2, 288).to(torch.float8_e4m3fn)), "F8_E4M3"),
        (_put("lokr_w1", torch.ones(2, 2)), "also has w1"),
        (_fused_as_well, "changed twice"),
        (_depthwise, "depthwise"),
    ],
)
def test_a_file_whose_tensors_do_not_belong_together(config, tmp_path, change, says):
    file = lora_for(config, tmp_path / "lora.safetensors")
    tensors = load_file(file)
    change(tensors)
    assert says in refusal(written(file, tensors), config)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ({"transformer.r": 4, "transformer.lora_alpha": 8}, "has rank 2, its metadata says 4"),
        ({"transformer.r": 2, "transformer.lora_alpha": "x"}, "rank or alpha 'x'"),
        ({"transformer.r": 2, "transformer.lora_alpha": -1}, "rank or alpha -1"),
        ({"transformer.r": 2, "transformer.alpha_pattern": {"(a+)+$": 2}}, "not a module's name"),
        ({"transformer.r": 2, "transformer.alpha_pattern": [2]}, "not a JSON object"),
        ({"transformer.r": 2, "transformer.use_dora": True}, "DoRA"),
    ],
)
def test_metadata_that_cannot_be_followed(config, tmp_path, metadata, says):
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    with pytest.raises(BrokenModel) as caught:
        read_lora(lora_for(config, tmp_path / "l.safetensors", lora_adapter_metadata=text))
    assert says in caught.value.message


@pytest.mark.parametrize("name", ["lora.bin", "lora.pt", "lora.safetensors"])
def test_a_pickle_is_never_loaded(tmp_path, name):
    torch.save({f"{KEY}.lora_A.weight": torch.ones(2, 288)}, tmp_path / name)
    assert "pickle" in refusal(tmp_path / name)


def test_what_is_no_safetensors_file(config, tmp_path):
    (tmp_path / "text.safetensors").write_text("a fox")
    assert "not a whole safetensors file" in refusal(tmp_path / "text.safetensors")
    whole = lora_for(config, tmp_path / "lora.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "not a whole safetensors file" in refusal(tmp_path / "half.safetensors")
    assert "does not exist" in refusal(tmp_path / "absent.safetensors")


def test_a_file_that_changes_between_the_recipe_and_the_drawing_is_refused(config, tmp_path):
    file = lora_for(config, tmp_path / "lora.safetensors")
    before = read_lora(file)
    assert unchanged_lora(file, before.sha256) == before
    lora_for(config, file, [0])
    with pytest.raises(BrokenModel, match="has changed"):
        unchanged_lora(file, before.sha256)


def test_a_whole_model_is_no_lora(base):
    said = refusal(base)
    assert "holds no LoRA" in said
    assert "--model" in said
