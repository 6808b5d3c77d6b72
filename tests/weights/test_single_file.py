"""Transformers in one file, under NVlabs' names and under the published ones."""

import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.loaders.single_file_utils import convert_sana_transformer_to_diffusers
from safetensors.torch import save_file

from reference import LIKE_0_6B, LIKE_1_6B, SPRINT
from sana_cli.bench.random_weights import write_configs
from sana_cli.errors import BrokenModel, SanaError
from sana_cli.models.architectures import TRANSFORMERS, architecture
from sana_cli.models.configs import DiTConfig
from sana_cli.models.dit import DiT
from sana_cli.weights.catalogue import known_models, model_of
from sana_cli.weights.checkpoint import load_weights, on_meta
from sana_cli.weights.layout import CONFIGS, Part
from sana_cli.weights.lora import MergedTensors, read_lora, transformer_shapes
from sana_cli.weights.model_files import open_single_file, released_model
from sana_cli.weights.original_names import (
    BLOCK_MODULES,
    GUIDED_MODULES,
    OTHER_MODULES,
    published_tensors,
)
from sana_cli.weights.single_file import (
    LEFT_OUT,
    PREFIX,
    architecture_of,
    native_side,
    read_single_file,
)

QK_NORM = {"qk_norm": "rms_norm_across_heads"}
KINDS = {"1.0": {}, "1.5": QK_NORM, "Sprint": SPRINT}


def random_transformer(**config) -> SanaTransformer2DModel:
    torch.manual_seed(0)
    model = SanaTransformer2DModel(**({"num_layers": 2, "caption_channels": 64} | config))
    for parameter in model.parameters():  # tables and norms too are told apart
        torch.nn.init.normal_(parameter)
    return model


def original_names(names, guided: bool) -> dict[str, tuple[str, ...]]:
    """Of every original tensor the published ones that it holds, in the order of its rows."""
    modules = GUIDED_MODULES if guided else OTHER_MODULES
    blocks = {name.split(".")[1] for name in names if name.startswith("transformer_blocks.")}
    wanted = {"final_layer.scale_shift_table": ("scale_shift_table",)}
    for i in blocks:
        table = f"blocks.{i}.scale_shift_table"
        wanted[table] = (f"transformer_{table}",)
        modules = modules | {
            f"blocks.{i}.{original}": tuple(f"transformer_blocks.{i}.{m}" for m in published)
            for original, published in BLOCK_MODULES.items()
        }
    for original, published in modules.items():
        for kind in ("weight", "bias"):
            wanted[f"{original}.{kind}"] = tuple(f"{module}.{kind}" for module in published)
    return {name: parts for name, parts in wanted.items() if set(parts) <= set(names)}


def original_tensors(model: SanaTransformer2DModel) -> dict[str, torch.Tensor]:
    """A checkpoint as NVlabs writes it, with what only training uses."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    names = original_names(tensors, model.config.guidance_embeds)
    written = {name: torch.cat([tensors[p] for p in parts]) for name, parts in names.items()}
    width = len(tensors["patch_embed.proj.bias"])
    written["pos_embed"] = torch.randn(1, 16 * 16, width)
    written["y_embedder.y_embedding"] = torch.randn(300, 64)
    if model.config.guidance_embeds:
        written |= {
            "logvar_linear.weight": torch.randn(1, width),
            "logvar_linear.bias": torch.ones(1),
        }
    return written


def file_of(path: Path, tensors, prefix: str = "") -> Path:
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def config_of(model: SanaTransformer2DModel) -> DiTConfig:
    return DiTConfig(**{k: v for k, v in model.config.items() if k in DiTConfig.__annotations__})


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["plain", "prefixed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [LIKE_0_6B, LIKE_1_6B], ids=["0.6B", "1.6B"])
def test_an_original_checkpoint_is_the_published_one(tmp_path, width, kind, prefix):
    model = random_transformer(**width, **KINDS[kind])
    file = read_single_file(file_of(tmp_path / "a.safetensors", original_tensors(model), prefix))
    dit = load_weights(on_meta(DiT, config_of(model), file.path), [file], torch.float32)
    loaded = dit.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.pop(name), tensor), name
    assert not loaded
    assert file.original


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["plain", "prefixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_published_names_in_one_file(tmp_path, kind, prefix):
    model = random_transformer(**LIKE_0_6B, **KINDS[kind])
    file = read_single_file(file_of(tmp_path / "a.safetensors", model.state_dict(), prefix))
    dit = load_weights(on_meta(DiT, config_of(model), file.path), [file], torch.float32)
    assert all(torch.equal(t, dit.state_dict()[n]) for n, t in model.state_dict().items())
    assert not file.original


def test_the_names_are_those_that_diffusers_converts(tmp_path):
    """Its own reading of single files, which knows Sana 1.0."""
    tensors = original_tensors(random_transformer(**LIKE_0_6B))
    ours = dict(read_single_file(file_of(tmp_path / "a.safetensors", tensors)).tensors(""))
    theirs = convert_sana_transformer_to_diffusers(dict(tensors))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("original", "published"),
    [  # as scripts/convert_sana_to_diffusers.py of diffusers pairs them for 1.5 and Sprint
        ("blocks.3.attn.q_norm.weight", "transformer_blocks.3.attn1.norm_q.weight"),
        ("blocks.3.cross_attn.k_norm.weight", "transformer_blocks.3.attn2.norm_k.weight"),
        ("t_embedder.mlp.2.bias", "time_embed.timestep_embedder.linear_2.bias"),
        ("cfg_embedder.mlp.0.weight", "time_embed.guidance_embedder.linear_1.weight"),
    ],
)
def test_the_names_of_later_models(original, published):
    assert published_tensors(original, guided=True) == (published,)


def test_only_the_tensors_asked_for_are_read(tmp_path):
    model = random_transformer(**LIKE_0_6B)
    file = read_single_file(file_of(tmp_path / "a.safetensors", original_tensors(model)))
    read = dict(file.tensors("transformer_blocks.1.attn1.to_k."))
    expected = model.state_dict()["transformer_blocks.1.attn1.to_k.weight"]
    assert read.keys() == {"weight"}
    assert torch.equal(read["weight"], expected)


def test_a_lora_on_an_original_checkpoint(tmp_path):
    model = random_transformer(**LIKE_0_6B)
    file = read_single_file(file_of(tmp_path / "a.safetensors", original_tensors(model)))
    down, up = torch.randn(2, 288), torch.randn(864, 2)
    key = "diffusion_model.blocks.1.attn.qkv.lora"
    lora = file_of(tmp_path / "lora.safetensors", {f"{key}_A.weight": down, f"{key}_B.weight": up})
    source = MergedTensors([file], [(read_lora(lora), 0.5)], config_of(model), torch.float32)
    got = dict(source.tensors("transformer_blocks.1.attn1."))
    qkv = torch.cat([got[f"to_{m}.weight"] for m in "qkv"])
    assert torch.allclose(qkv, original_tensors(model)["blocks.1.attn.qkv.weight"] + up @ down / 2)


# --- what a file is of -------------------------------------------------------------------------


def hollow_file(path: Path, shapes, dtype: str = "BF16", original: bool = True) -> Path:
    """A safetensors file of these shapes whose data is a hole on the disk."""
    if original:
        guided = any("guidance_embedder" in name for name in shapes)
        names = original_names(shapes, guided)
        shapes = {
            name: (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])
            for name, parts in names.items()
        } | {name: shape for name, shape in shapes.items() if name in LEFT_OUT}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * (1 if dtype.startswith(("F8", "I8")) else 2)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path


@pytest.mark.parametrize("original", [True, False], ids=["original", "published"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_released_architecture_is_told_by_its_shapes(tmp_path, name, original):
    shapes = transformer_shapes(TRANSFORMERS[name])
    path = hollow_file(tmp_path / "a.safetensors", shapes, original=original)
    file = read_single_file(path)
    assert architecture_of(file) == name
    assert native_side(file) == 1024
    assert {n: tuple(s) for n, s in shapes.items()} == file.shapes
    like = model_of(name, 1024)
    assert like.architecture == name
    assert like.side == 1024


@pytest.mark.parametrize("model", ["sana-0.6b-512", "sana-1.6b-2k", "sana-1.6b-4k"])
def test_the_position_table_tells_the_native_side(tmp_path, model):
    known = known_models()[model]
    assert known.side is not None
    assert known.architecture is not None
    grid = known.side // 32
    config = architecture(known.architecture, known.side).dit
    shapes = transformer_shapes(config) | {"pos_embed": (1, grid * grid, config.width)}
    folder = tmp_path / "shared"
    write_configs(released_model(known), folder)
    shared = {name: Part(folder / name) for name in CONFIGS if name != "transformer"}
    file = read_single_file(hollow_file(tmp_path / "a.safetensors", shapes))
    files = open_single_file(file, shared)
    assert files.dit == config
    assert files.side == known.side
    assert files.flow_shift == released_model(known).flow_shift
    assert files.parts["transformer"].weights == (file,)
    assert model_of(architecture_of(file), native_side(file)) == known
    assert open_single_file(file, shared, side=1024).dit == replace(
        config, sample_size=32, interpolation_scale=None
    )


def test_shapes_of_no_released_model(tmp_path):
    shapes = transformer_shapes(DiTConfig(num_layers=3))
    with pytest.raises(BrokenModel) as caught:
        architecture_of(read_single_file(hollow_file(tmp_path / "a.safetensors", shapes)))
    assert "width 2240, blocks 3" in caught.value.message
    assert "config.json" in caught.value.hint


# --- refusals ----------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(SanaError) as caught:
        architecture_of(read_single_file(path))
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return f"{caught.value.message}\n{caught.value.hint}"


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8"])
def test_quantised_weights_are_refused(tmp_path, dtype):
    shapes = transformer_shapes(TRANSFORMERS["sana-1.6b"])
    said = refusal(hollow_file(tmp_path / "a.safetensors", shapes, dtype))
    assert f"quantised weights (attention_y_norm.weight, {dtype}), which are not supported" in said
    assert "bfloat16 or float16 file" in said


@pytest.mark.parametrize(
    "name",
    [
        "scaled_fp8",
        "blocks.0.attn.qkv.scale_weight",
        "blocks.0.attn.qkv.weight_scale",
        "transformer_blocks.0.attn1.to_q.qweight",
        "transformer_blocks.0.attn1.to_q.wscales",
        "blocks.0.mlp.point_conv.conv.weight.absmax",
    ],
)
def test_the_marks_of_quantised_files_are_refused(tmp_path, name):
    tensors = original_tensors(random_transformer(**LIKE_0_6B)) | {name: torch.ones(1)}
    assert "quantised" in refusal(file_of(tmp_path / "a.safetensors", tensors))


@pytest.mark.parametrize(
    "name", ["blocks.0.attn.to_q.weight", "vae.decoder.conv_in.weight", "blocks.0.attn.qkv.bias.x"]
)
def test_what_is_not_in_the_table_is_refused_by_name(tmp_path, name):
    tensors = original_tensors(random_transformer(**LIKE_0_6B)) | {name: torch.ones(3, 3)}
    said = refusal(file_of(tmp_path / "a.safetensors", tensors))
    assert f"not of Sana's transformer: {name}" in said


def test_a_tensor_that_cannot_be_divided_is_refused(tmp_path):
    tensors = original_tensors(random_transformer(**LIKE_0_6B))
    tensors["blocks.0.attn.qkv.weight"] = torch.ones(10, 288)
    assert "blocks.0.attn.qkv.weight" in refusal(file_of(tmp_path / "a.safetensors", tensors))


def test_other_files_are_told_apart(tmp_path):
    other = file_of(tmp_path / "other.safetensors", {"double_blocks.0.weight": torch.ones(2)})
    assert "holds no Sana transformer" in refusal(other)
    key = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"
    lora = file_of(tmp_path / "lora.safetensors", {key: torch.ones(2, 288)})
    assert "--lora" in refusal(lora)
    torch.save({"x_embedder.proj.weight": torch.ones(1)}, tmp_path / "a.pth")
    assert "pickle" in refusal(tmp_path / "a.pth")
    (tmp_path / "text.safetensors").write_text("a fox")
    assert "not a whole safetensors file" in refusal(tmp_path / "text.safetensors")
    assert "does not exist" in refusal(tmp_path / "absent.safetensors")


def test_a_missing_tensor_is_reported_by_the_loader(tmp_path):
    model = random_transformer(**LIKE_0_6B)
    tensors = original_tensors(model)
    del tensors["blocks.1.attn.qkv.weight"]
    file = read_single_file(file_of(tmp_path / "a.safetensors", tensors))
    with pytest.raises(BrokenModel, match=r"a\.safetensors does not fit.*attn1\.to_k") as caught:
        load_weights(on_meta(DiT, config_of(model), file.path), [file], torch.float32)
    assert "(3 tensors)" in caught.value.message


# --- as --model --------------------------------------------------------------------------------


def sparse_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A whole bfloat16 safetensors file of zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def test_a_file_is_a_model_of_the_family_that_its_shapes_tell(sana, tmp_path):
    config = architecture("sana-0.6b", 1024).dit
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in DiT(config).state_dict().items()}
    path = sparse_file(tmp_path / "my-sana.safetensors", shapes)
    run = sana("generate", "a fox", "-m", str(path), "--dry-run")
    assert run.code == 0, run.err
    assert "has the transformer of sana-0.6b-1024" in run.err
    (recipe,) = json.loads(run.out)["recipes"]
    assert (recipe["model"], recipe["solver"], recipe["width"]) == ("my-sana", "flow-dpm", 1024)
    offline = sana("generate", "a fox", "-m", str(path), "--offline")
    assert offline.code == 5 and "sana models pull sana-0.6b-1024" in offline.err


@pytest.mark.parametrize(
    ("name", "says"), [("a.ckpt", "pickle"), ("a.txt", "a file of another kind")]
)
def test_other_files_are_no_models(sana, tmp_path, name, says):
    (tmp_path / name).write_bytes(b"x")
    run = sana("generate", "a fox", "-m", str(tmp_path / name))
    assert run.code in (1, 2)
    assert says in run.err
