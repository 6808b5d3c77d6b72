"""Files of weights that do not hold what the config promises: exit code 1."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from faults import (
    DIT,
    FAST,
    PARTS,
    TEXT,
    edit,
    edit_tensors,
    replace,
)
from sana_cli.errors import BrokenModel
from sana_cli.weights.layout import Part, folder_parts
from sana_cli.weights.model_files import open_model, open_single_file, with_controlnet, with_vae
from sana_cli.weights.single_file import SingleFile
from sana_cli.weights.vocabulary import vocabulary


def _first(tensors) -> str:
    return next(name for name in sorted(tensors) if not name.startswith("encoder."))


def _wrong_shape(tensors):
    tensors[_first(tensors)] = torch.zeros(3, 5, 7)


def _wrong_dtype(tensors):
    tensors[_first(tensors)] = tensors[_first(tensors)].to(torch.int64)


def _missing_tensor(tensors):
    del tensors[_first(tensors)]


def _extra_tensor(tensors):
    tensors["decoder.extra"] = torch.zeros(2)


def _all_at_once(tensors):
    names = [name for name in sorted(tensors) if not name.startswith("encoder.")]
    tensors[names[0]] = torch.zeros(3, 5, 7)
    tensors[names[1]] = tensors[names[1]].to(torch.int64)
    del tensors[names[2]]
    tensors["decoder.extra"] = torch.zeros(2)


@PARTS
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_wrong_shape, ("(1 tensors)", "has shape (3, 5, 7), not (")),
        (_wrong_dtype, ("int64",)),
        (_missing_tensor, ("(1 tensors)", "missing ")),
        (_extra_tensor, ("(1 tensors)", "unexpected decoder.extra")),
        (_all_at_once, ("(3, 5, 7)", "int64", "missing ", "unexpected decoder.extra")),
    ],
    ids=["shape", "dtype", "missing", "extra", "all"],
)
def test_every_tensor_that_does_not_fit_is_named(broken, model, part, change, says):
    edit_tensors(model / part, change)
    broken(part, *says)


@PARTS
@pytest.mark.parametrize(
    "content",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:100],
        lambda data: data + b"\0",
        lambda data: b"",
        lambda data: b"\xde\xad\xbe\xef" * 1000,
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
    ids=["half", "cut header", "longer", "empty", "garbage", "huge header", "web page", "lfs"],
)
def test_what_is_no_safetensors_file_is_refused(broken, model, part, content):
    replace(model / part, content((model / part).read_bytes()))
    broken(part)


@PARTS
def test_absent_weight_files_are_named(broken, model, part):
    (model / part).unlink()
    broken(part, "missing")


class _Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@PARTS
@pytest.mark.parametrize("beside", [False, True], ids=["as safetensors", "as bin"])
@pytest.mark.parametrize("archive", [False, True], ids=["plain", "zip"])
def test_a_pickle_is_never_opened(broken, model, tmp_path, part, beside, archive):
    sprung = tmp_path / "sprung"
    buffer = io.BytesIO()
    if archive:
        torch.save({"weight": _Trap(sprung)}, buffer)
    else:
        pickle.dump(_Trap(sprung), buffer)
    (model / part).unlink()
    name = Path(part).with_suffix(".bin") if beside else part
    (model / name).write_bytes(buffer.getvalue())
    broken(*(("pickle", Path(name).name) if beside else (part,)))
    assert not sprung.exists()


@PARTS
@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"weight_map": {"a": "../stolen.safetensors"}}, "../stolen.safetensors"),
        ({"weight_map": {"a": "/etc/stolen.safetensors"}}, "/etc/stolen.safetensors"),
        ({"weight_map": {"a": "sub/stolen.safetensors"}}, "sub/stolen.safetensors"),
        ({"weight_map": {"a": "model-00001-of-00002.bin"}}, "model-00001-of-00002.bin"),
        ({"weight_map": {"a": ".."}}, "'..'"),
        ({"weight_map": {"a": ""}}, "''"),
        ({"weight_map": {"a": 3}}, "'3'"),
        ({"weight_map": {"a": "absent.safetensors"}}, "absent.safetensors is missing"),
        ({"weight_map": {"a": "\0.safetensors"}}, "safetensors"),
        ({"weight_map": {"a": "x" * 5000 + ".safetensors"}}, "xxx"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": ["a"]}, "weight_map"),
        ({}, "weight_map"),
        ([], "not a JSON object"),
    ],
    ids=[
        "parent",
        "absolute",
        "subfolder",
        "pickle",
        "dots",
        "nameless",
        "number",
        "absent",
        "nul",
        "long",
        "empty",
        "list",
        "none",
        "no object",
    ],
)
def test_a_shard_index_leads_nowhere_else(broken, model, part, index, says):
    path = model / part
    path.rename(model.parent / "stolen.safetensors")
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    broken(says)


def test_shards_that_repeat_a_tensor_are_refused(broken, model):
    path = model / TEXT
    names = ["one.safetensors", "two.safetensors"]
    for name in names:
        shutil.copyfile(path, path.with_name(name))
    path.unlink()
    places = dict(zip("ab", names, strict=True))
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"weight_map": places}))
    broken("text_encoder", "comes twice")


def test_weights_of_nan_draw_no_picture(refused, model):
    edit_tensors(model / DIT, lambda tensors: tensors["proj_out.bias"].fill_(float("nan")))
    refused(7, "a fox", "-m", str(model), *FAST, says=("NaN",), hint="hint:")


def test_a_text_encoder_of_another_model_is_refused(broken, model):
    from transformers import Gemma2Config, Gemma2Model

    shutil.rmtree(model / "text_encoder")
    sizes = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16}
    config = Gemma2Config(vocab_size=577, hidden_size=32, **sizes, **heads)
    Gemma2Model(config).save_pretrained(model / "text_encoder")
    broken("text")


# --- weights that another program has quantised ------------------------------------------------


def _beside(*endings: str, dtype: torch.dtype = torch.int8):
    """Whole numbers in the place of a matrix, and what a program puts beside it."""

    def change(tensors):
        name = next(n for n in sorted(tensors) if n.endswith(".weight") and tensors[n].dim() == 2)
        tensors[name] = tensors[name].to(dtype)
        for ending in endings:
            tensors[name.removesuffix(".weight") + ending] = torch.ones(2)

    return change


QUANTISED = {
    "fp8": (_beside(dtype=torch.float8_e4m3fn), "FP8"),
    "fp8-e5m2": (_beside(dtype=torch.float8_e5m2), "FP8"),
    "fp8-scaled": (_beside(".scale_weight", dtype=torch.float8_e4m3fn), "FP8 with scales"),
    "bnb-int8": (_beside(".SCB", ".weight_format"), "bitsandbytes in 8 bits"),
    "bnb-nf4": (
        _beside(".weight.absmax", ".weight.quant_map", ".weight.quant_state.bitsandbytes__nf4"),
        "bitsandbytes in 4 bits",
    ),
    "gptq": (_beside(".qweight", ".qzeros", ".scales", ".g_idx"), "GPTQ"),
    "quanto": (_beside(".weight._data", ".weight._scale"), "Quanto"),
    "mlx": (_beside(".scales", ".biases"), "MLX"),
    "int8": (_beside(), "whole numbers of 8 bits"),
}


@pytest.mark.parametrize("words", [(), ("--dry-run",)], ids=["", "dry-run"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_named_as_such(refused, model, kind, words):
    change, named = QUANTISED[kind]
    edit_tensors(model / DIT, change)
    says = ("transformer holds quantised weights", named, "not supported")
    refused(1, "a fox", "-m", str(model), *FAST, *words, says=says, hint="bfloat16")


@PARTS
def test_quantised_weights_of_every_part_are_named(refused, model, part):
    edit_tensors(model / part, _beside(".SCB"))
    words = ("a fox", "-m", str(model), *FAST, "--dry-run")
    refused(1, *words, says=("quantised", "bitsandbytes in 8 bits"))


@pytest.mark.parametrize("component", ["vae", "controlnet"])
def test_quantised_components_are_named_as_such(model, tmp_path, component):
    folder = shutil.copytree(model / "vae", tmp_path / "component")
    edit_tensors(folder / "diffusion_pytorch_model.safetensors", _beside(".SCB", ".weight_format"))
    part = Part(folder, (folder / "diffusion_pytorch_model.safetensors",))
    add = {"vae": with_vae, "controlnet": with_controlnet}[component]
    with pytest.raises(BrokenModel, match="component holds quantised weights .bitsandbytes"):
        add(open_model(folder_parts(model)), part)


def test_quantised_parts_around_a_single_file_are_named_as_such(model):
    edit_tensors(model / "vae/diffusion_pytorch_model.safetensors", _beside(dtype=torch.int8))
    single = SingleFile(Path("a.safetensors"), {}, {}, None, False)
    with pytest.raises(BrokenModel, match="vae holds quantised weights"):
        open_single_file(single, folder_parts(model), 512)


def test_a_config_that_tells_of_a_quantisation_is_enough(refused, model):
    edit(model / "transformer/config.json", quantization_config={"quant_method": "torchao"})
    refused(1, "a fox", "-m", str(model), *FAST, "--dry-run", says=("quantised", "torchao"))


def test_gguf_is_named(broken, model):
    (model / DIT).rename((model / DIT).with_suffix(".gguf"))
    broken("holds only diffusion_pytorch_model.gguf, quantised weights")


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("vae", {"attention_head_dim": 0}),
        ("vae", {"in_channels": 0}),
        ("transformer", {"mlp_ratio": 0}),
    ],
    ids=["head-of-0", "no-channels", "no-feed-forward"],
)
def test_a_config_of_no_network_is_refused_by_a_dry_run(refused, model, part, changes):
    edit(model / part / "config.json", **changes)
    name = {"vae": "DCAE", "transformer": "DiT"}[part]
    refused(1, "a fox", "-m", str(model), "--dry-run", says=(f"{name} config describes no",))


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1]", "[" * 100_000])
def test_a_vocabulary_that_is_no_list_of_words_is_named(broken, model, content):
    (model / "vocabulary.json").write_text(content)
    broken("vocabulary.json")


def test_a_file_beside_the_folder_of_a_single_file_is_no_vocabulary(tmp_path):
    (tmp_path / "vocabulary.json").write_text("{")
    (tmp_path / "models").mkdir()
    file = tmp_path / "models" / "x.safetensors"
    assert vocabulary({"transformer": Part(file.parent, (file,))}) is None


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read anything")
def test_what_may_not_be_read_is_named(refused, model, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(bytes(100))
    file.chmod(0)
    refused(1, "a fox", "-m", str(file), says=("x.safetensors", "Permission denied"))
    refused(1, "a fox", "-m", str(model), "--lora", str(file), says=("Permission denied",))
