"""Published folders in every shape they come in, loaded strictly."""

import gc
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sana_cli.errors import BrokenModel
from sana_cli.models.configs import DiTConfig
from sana_cli.models.dit import DiT
from sana_cli.system.devices import resident_bytes
from sana_cli.weights.checkpoint import load_weights, move, on_meta
from sana_cli.weights.config_files import read_config
from sana_cli.weights.layout import find_part, folder_parts
from sana_cli.weights.model_files import open_model

STEM = "diffusion_pytorch_model"


@pytest.fixture
def part(tiny_model, tmp_path):
    """A copy of a transformer folder, to break or rearrange."""
    return shutil.copytree(tiny_model / "transformer", tmp_path / "transformer")


def load(folder, variant="", dtype=torch.float32):
    part = find_part(folder, (variant,))
    config, _ = read_config(DiTConfig, part.config)
    return load_weights(on_meta(DiT, config, part.config), part.weights, dtype)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_shards_with_an_index_are_the_single_file(part):
    whole = load(part)
    tensors = load_file(part / f"{STEM}.safetensors")
    names = sorted(tensors)
    shards = {"00001": names[::2], "00002": names[1::2]}
    places = {}
    for number, mine in shards.items():
        file = f"{STEM}-{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in mine}, part / file)
        places |= dict.fromkeys(mine, file)
    (part / f"{STEM}.safetensors").unlink()
    (part / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert same_weights(load(part), whole)


def test_the_variant_asked_for_is_read_and_cast(part):
    tensors = {k: v.half() for k, v in load_file(part / f"{STEM}.safetensors").items()}
    tensors["proj_out.bias"] += 1
    save_file(tensors, part / f"{STEM}.fp16.safetensors")
    model = load(part, "fp16")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not same_weights(model, load(part))
    assert model.proj_out.bias.isclose(load(part).proj_out.bias + 1, atol=1e-2).all()


def test_a_folder_that_holds_only_a_variant_is_read_by_it(part):
    plain = load(part)
    (part / f"{STEM}.safetensors").rename(part / f"{STEM}.fp16.safetensors")
    (weights,) = find_part(part).weights
    assert weights.name == f"{STEM}.fp16.safetensors"
    assert same_weights(load(part, "fp16"), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_is_real_and_has_the_dtype_asked_for(part, dtype):
    model = load(part, dtype=dtype)
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.dtype for t in tensors} == {dtype}
    assert not any(t.is_meta or t.requires_grad for t in tensors)


def test_old_configs_lack_the_later_keys(part):
    config = json.loads((part / "config.json").read_text())
    for key in ("interpolation_scale", "guidance_embeds", "guidance_embeds_scale", "qk_norm"):
        config.pop(key, None)
    config.pop("timestep_scale", None)
    (part / "config.json").write_text(json.dumps(config))
    assert read_config(DiTConfig, part / "config.json")[0].qk_norm is None
    load(part)


def test_a_key_from_the_future_is_said_aloud(sana, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "moe_experts": 4}))
    run = sana("generate", "a fox", "-m", str(folder), "--dry-run")
    assert run.code == 0
    assert "warning: the model's config sets moe_experts" in run.err


def test_everything_that_does_not_fit_is_named_at_once(part):
    tensors = load_file(part / f"{STEM}.safetensors")
    del tensors["proj_out.bias"]
    tensors["extra"] = torch.zeros(1)
    tensors["proj_out.weight"] = torch.zeros(3, 3)
    save_file(tensors, part / f"{STEM}.safetensors")
    with pytest.raises(BrokenModel) as broken:
        load(part)
    for piece in ("missing proj_out.bias", "unexpected extra", "proj_out.weight has shape (3, 3)"):
        assert piece in broken.value.message


def test_a_scheduler_of_either_kind_gives_the_shift(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    assert open_model(folder_parts(folder)).flow_shift == 3.0
    (folder / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 6.0, "x": -Infinity}'
    )
    assert open_model(folder_parts(folder)).flow_shift == 6.0


@pytest.mark.skipif(sys.platform != "linux", reason="others do not say what a process holds")
@pytest.mark.parametrize("at", ["loading", "moving"])
def test_weights_that_are_converted_are_not_held_twice(tmp_path, at):
    path, megabytes = tmp_path / "model.safetensors", 1 << 20
    stored = torch.randn(64, megabytes // 2).bfloat16()  # 64 MB
    save_file({"weight": stored}, path)
    with torch.device("meta"):
        model = nn.Linear(megabytes // 2, 64, bias=False)
    gc.collect()  # what earlier tests left would otherwise be freed while this measures
    before = resident_bytes()
    load_weights(model, [path], torch.float32 if at == "loading" else None)
    if at == "moving":
        move(model, [path], "cpu", torch.float32)
    grown = resident_bytes() - before
    assert torch.equal(model.weight, stored.float())
    assert 128 * megabytes <= grown + 8 * megabytes and grown < 160 * megabytes


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("SanaPAGPipeline", "tiny_model"),
        ("SanaControlNetPipeline", "tiny_model"),
        ("SanaSprintImg2ImgPipeline", "tiny_sprint"),
    ],
)
def test_pipelines_over_the_same_networks_open(request, tmp_path, kind, model):
    """A ControlNet beside the networks is left alone."""
    folder = shutil.copytree(request.getfixturevalue(model), tmp_path / "model")
    plain = open_model(folder_parts(folder))
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": kind}))
    (folder / "controlnet").mkdir()
    (folder / "controlnet" / "config.json").write_text("{}")
    assert open_model(folder_parts(folder)) == plain


@pytest.mark.parametrize("kind", ["SanaVideoPipeline", "SanaSprintImg2ImgPipeline"])
def test_pipelines_over_other_networks_do_not(tiny_model, tmp_path, kind):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": kind}))
    with pytest.raises(BrokenModel, match=kind):
        open_model(folder_parts(folder))
