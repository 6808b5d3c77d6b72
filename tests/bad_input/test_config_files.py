"""Configs and tokenizers that cannot be right: exit code 1."""

import json

import pytest

from faults import CONFIGS, FAST, brief, edit, replace


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "content",
    ['{"a": ', "", "[]", "null", '"x"', "3", b"\xff\xfe\x00", "[" * 100_000, "<html></html>"],
    ids=["cut", "empty", "list", "null", "string", "number", "binary", "deep", "web page"],
)
def test_a_config_that_is_no_json_object_is_named(broken, model, config, content):
    replace(model / config, content)
    broken(config)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("fault", ["absent", "folder"])
def test_a_config_that_is_not_there_is_named(broken, model, config, fault):
    (model / config).unlink()
    if fault == "folder":
        (model / config).mkdir()
    broken(config)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        *(
            ("model_index.json", "_class_name", value)
            for value in ("StableDiffusionPipeline", 3, ["SanaPipeline"], {})
        ),
        *(("transformer", "num_layers", value) for value in ("2", 2.5, True, None, [2], -1)),
        *(("transformer", "num_layers", value) for value in (0, 10**6, 10**30)),
        *(("transformer", "sample_size", value) for value in (0, 10**6)),
        ("transformer", "num_attention_heads", 0),
        ("transformer", "attention_head_dim", 31),
        ("transformer", "in_channels", 16),
        ("transformer", "caption_channels", 0),
        ("transformer", "patch_size", 2),
        ("transformer", "qk_norm", "layer_norm"),
        ("transformer", "guidance_embeds", True),
        ("transformer", "interpolation_scale", 0),
        *(("transformer", "mlp_ratio", value) for value in (0, -1, 1e308, INF, NAN, "2.5")),
        *(("transformer", "norm_eps", value) for value in (-1, NAN)),
        ("transformer", "timestep_scale", NAN),
        *(("vae", "decoder_block_out_channels", value) for value in ([], [0] * 6, 4, ["4"] * 6)),
        ("vae", "decoder_block_out_channels", [4, 4, 8, 32, 32]),
        ("vae", "decoder_layers_per_block", [10**6] * 6),
        ("vae", "decoder_layers_per_block", [0] * 6),
        ("vae", "decoder_block_types", "ConvNeXt"),
        ("vae", "decoder_block_types", {"0": "ResBlock"}),
        ("vae", "decoder_qkv_multiscales", [[0]] * 6),
        ("vae", "decoder_qkv_multiscales", [5] * 6),
        ("vae", "upsample_block_type", "nearest"),
        *(("vae", "attention_head_dim", value) for value in (0, 7)),
        *(("vae", "scaling_factor", value) for value in (0, NAN, INF, -1, "0.4")),
        *(("scheduler", "flow_shift", value) for value in (0, -1, NAN, INF, 1e9, "3", None, True)),
        *(("text_encoder", "num_hidden_layers", value) for value in (0, -1, "3", 10**6)),
        *(("text_encoder", "vocab_size", value) for value in (0, -1, 10**30)),
        *(("text_encoder", "hidden_size", value) for value in (0, -64, "64", 32)),
        *(("text_encoder", "num_attention_heads", value) for value in (0, 3)),
        *(("text_encoder", "num_key_value_heads", value) for value in (0, 3)),
        *(("text_encoder", "head_dim", value) for value in (0, -2, 15)),
        *(("text_encoder", "bos_token_id", value) for value in (None, 10**6, -5, "x")),
        ("text_encoder", "hidden_activation", "swoosh"),
        ("text_encoder", "rope_parameters", {"rope_type": "swirl", "rope_theta": 1e4}),
        ("text_encoder", "rope_parameters", {"rope_type": "default", "rope_theta": "x"}),
        ("text_encoder", "rms_norm_eps", "x"),
        ("tokenizer", "model", None),
        ("tokenizer", "added_tokens", [{"id": -1, "content": "<bos>"}]),
    ],
    ids=brief,
)
def test_an_absurd_setting_is_reported_with_its_file(broken, model, part, key, value):
    names = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer.json"}
    config = model / part / names.get(part, "config.json") if "." not in part else model / part
    edit(config, **{key: value})
    broken(part if "." not in part else str(model))


def test_layers_are_not_built_by_the_million(broken, model):
    config = json.loads((model / "text_encoder/config.json").read_text())
    del config["layer_types"]
    replace(model / "text_encoder/config.json", json.dumps(config | {"num_hidden_layers": 10**6}))
    broken("text_encoder")


def test_an_unknown_setting_is_a_warning(process, here, model):
    edit(model / "transformer/config.json", flavour="mint")
    run = process("generate", "a fox", "-m", str(model), *FAST)
    said = run.stderr.decode()
    assert (run.returncode, run.stdout) == (0, b"a-fox-7.png\n"), said
    assert [line for line in said.splitlines() if line.startswith("warning:") and "flavour" in line]
    assert "UserWarning" not in said


def _foreign_ids(tokenizer):
    vocab = tokenizer["model"]["vocab"]
    for name in vocab:
        vocab[name] += 1000


def test_a_tokenizer_of_more_tokens_than_the_text_encoder_is_refused(broken, model):
    path = model / "tokenizer/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    _foreign_ids(tokenizer)
    replace(path, json.dumps(tokenizer))
    broken("tokenizer")
