"""What someone at a shell sees when the call, the model, the disk or their patience is at fault."""

import contextlib
import errno
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

FAST = ("--steps", "1", "--no-instruction", "-s", "7")
LONGEST_TEST = 30  # seconds; a refusal takes well under one

DIT = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
CONFIGS = (
    "model_index.json",
    "transformer/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer.json",
)


@pytest.fixture(autouse=True)
def _no_hang():
    """pytest's failure is a BaseException: nothing in the command can take it for its own."""

    def stop(signum, frame):
        pytest.fail(f"still running after {LONGEST_TEST} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST_TEST)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model; its weights are links, so replace them, never write into them."""
    return linked(tiny_model, tmp_path / "model")


@pytest.fixture
def sprint(tiny_sprint, tmp_path) -> Path:
    return linked(tiny_sprint, tmp_path / "sprint")


def linked(folder: Path, target: Path) -> Path:
    def copy(source, target):
        (os.link if source.endswith(".safetensors") else shutil.copyfile)(source, target)

    return Path(shutil.copytree(folder, target, copy_function=copy))


@pytest.fixture
def refused(sana, here):
    """Run `sana generate` and check that it refuses politely; gives stderr for a closer look."""

    def run(code: int, *words: str, says: tuple[str, ...] = (), hint: str = "") -> str:
        run = sana("generate", *words)
        assert (run.code, run.out) == (code, ""), run.err
        assert_polite(run.err, says, hint)
        assert not list(here.rglob("*"))
        return run.err

    return run


@pytest.fixture
def broken(refused, model):
    """Draw with the copied model and check that its fault is reported with exit code 1."""

    def run(*says: str) -> str:
        return refused(1, "a fox", "-m", str(model), *FAST, says=says)

    return run


def assert_polite(err: str, says: tuple[str, ...] = (), hint: str = "") -> None:
    """One `error:` line that is no bare exception, at most one `hint:` line, no traceback."""
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    hints = [line for line in lines if line.startswith("hint:")]
    assert len(errors) == 1 and len(hints) <= 1, err
    assert "Traceback" not in err and "Exception ignored" not in err and "panicked" not in err, err
    assert not re.match(r"error: \w*(Error|Exception|Abort|Warning|Panic)\b", errors[0]), err
    for word in says:
        assert word in errors[0]
    assert hint in "".join(hints), err


def replace(path: Path, content: bytes | str) -> None:
    path.unlink()
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def edit(path: Path, **changes) -> None:
    replace(path, json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def named(*cases: tuple[tuple[str, ...], str]) -> list:
    """Cases of (words, what the error says) under readable ids."""
    return [pytest.param(*case, id=brief(" ".join(case[0]))) for case in cases]


def brief(value: object) -> str:
    text = ascii(value).strip("'")
    return f"{text[:36]}..." if len(text) > 40 else text or "empty"


# --- the call: exit code 2 ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    named(
        ((), "PROMPT"),
        (("",), "prompt is empty"),
        ((" \t\n",), "prompt is empty"),
        (("a fox", ""), "prompt is empty"),
        (("x" * 20_001,), "20000"),
        (("\udcff",), "UTF-8"),
        (("-", "-"), "stdin"),
        (("a fox", "--colour"), "--colour"),
        (("a fox", "--negative", "\udcff"), "UTF-8"),
        (("a fox", "-o", "\udcff.png"), "UTF-8"),
        (("a fox", "--negative", "dog", "-g", "1"), "--negative"),
        (("a fox", "-g", "nan"), "--guidance"),
        (("a fox", "-g", "inf"), "--guidance"),
        (("a fox", "-g", "0"), "--guidance"),
        (("a fox", "-g", "-3"), "--guidance"),
        (("a fox", "-g", "much"), "--guidance"),
        (("a fox", "--steps", "0"), "--steps"),
        (("a fox", "--steps", "-1"), "--steps"),
        (("a fox", "--steps", "100000"), "--steps"),
        (("a fox", "--steps", "2.5"), "--steps"),
        (("a fox", "--solver", "ddim"), "--solver"),
        (("a fox", "--dtype", "int8"), "--dtype"),
        (("a fox", "--device", "gpu"), "--device"),
        (("a fox", "--device", ""), "--device"),
        (("a fox", "--device", "meta"), "--device"),
        (("a fox", "--device", "cuda:99"), "--device"),
        (("a fox", "-n", "0"), "--count"),
        (("a fox", "-n", "-2"), "--count"),
        (("a fox", "-n", "100001"), "--count"),
        (("a fox", "-n", "few"), "--count"),
        (("a fox", "-s", "-1"), "--seed"),
        (("a fox", "-s", "4294967296"), "4294967296"),
        (("a fox", "-s", "4294967295", "-n", "2"), "4294967296"),
        (("a fox", "-s", "9" * 5000), "--seed"),
        (("a fox", "-s", "8..1"), "--seed"),
        (("a fox", "-s", "0..4294967295"), "--seed"),
        (("a fox", "-s", "1,,2"), "--seed"),
        (("a fox", "-s", "1,1"), "--seed"),
        (("a fox", "-s", "1.5"), "--seed"),
        (("a fox", "-s", ""), "--seed"),
        (("a fox", "-s", "1..3", "-n", "2"), "--count"),
        (("a fox", "-s", "1,5", "-n", "2"), "--count"),
    ),
)
def test_a_wrong_call_is_refused(refused, model, words, says):
    refused(2, "-m", str(model), *words, says=(says,))


@pytest.mark.parametrize(
    "size",
    ["0", "-512", "31", "0x512", "512x0", "1024x", "x512", "1x1x1", "big", "", "5.5", "1e3", "²"],
)
def test_what_is_no_resolution_is_refused(refused, model, size):
    refused(2, "a fox", "-m", str(model), "--res", size, says=("--res",), hint="1280x720")


@pytest.mark.parametrize(
    "size", ["4096", "4k", "511", "4096x4096", "999999", "9999999999", "999999x999999"]
)
def test_a_model_is_not_asked_for_more_than_it_draws(refused, model, size):
    refused(2, "a fox", "-m", str(model), "--res", size, hint="hint:")


@pytest.mark.parametrize("size", ["4096", "4k"])
def test_a_model_that_can_is_named_though_no_weights_are_here(refused, no_weights, size):
    said = refused(2, "a fox", "-m", "sana-0.6b-1024", "--res", size, says=("1024",))
    assert "--model sana-1.6b-4k" in said


@pytest.mark.parametrize("size", ["700", "8192", "99999"])
def test_a_size_that_no_model_draws_is_refused(refused, size):
    refused(2, "a fox", "--res", size, says=(size,), hint="4096")


@pytest.mark.parametrize(
    "aspect", ["0:1", "1:0", "0.0:1", "a:b", "16", "16:9:4", "-16:9", "16/9", "", "inf:1", "1:nan"]
)
def test_what_is_no_aspect_ratio_is_refused(refused, model, aspect):
    refused(2, "a fox", "-m", str(model), "--ar", aspect, says=("--ar",), hint="16:9")


@pytest.mark.parametrize("fit", ["trained", "exact"])
@pytest.mark.parametrize(
    "aspect", ["9999:0.0001", "0.0001:9999", f"9999:0.{'0' * 307}1"], ids=brief
)
def test_an_absurd_aspect_ratio_is_refused(refused, model, aspect, fit):
    refused(2, "a fox", "-m", str(model), "--ar", aspect, "--fit", fit, *FAST)


def test_an_aspect_ratio_does_not_go_with_an_exact_size(refused, model):
    refused(2, "a fox", "-m", str(model), "--res", "512x512", "--ar", "1:1", says=("--ar",))


# --- what a model cannot use: exit code 2 ------------------------------------------------------


@pytest.fixture
def photo(tmp_path) -> str:
    from PIL import Image

    Image.linear_gradient("L").convert("RGB").save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.mark.parametrize(
    ("words", "says"),
    named(
        (("--negative", "dog"), "--negative"),
        (("--negative", "dog", "-g", "1"), "--negative"),
        (("--solver", "flow-dpm"), "--solver flow-dpm"),
        (("--solver", "flow-euler"), "--solver flow-euler"),
        (("--steps", "0"), "--steps"),
        (("--steps", "1001"), "--steps"),
        (("-g", "-1"), "--guidance"),
        (("-g", "nan"), "--guidance"),
        (("-g", "101"), "--guidance"),
        (("--strength", "0.5"), "--image"),
        (("--image", "PHOTO", "--strength", "0"), "--strength"),
        (("--image", "PHOTO", "--strength", "-0.1"), "--strength"),
        (("--image", "PHOTO", "--strength", "1.01"), "--strength"),
        (("--image", "PHOTO", "--strength", "nan"), "--strength"),
        (("--image", "PHOTO", "--strength", "much"), "--strength"),
    ),
)
def test_what_sprint_cannot_use_is_refused(refused, sprint, photo, words, says):
    words = [photo if word == "PHOTO" else word for word in words]
    refused(2, "a fox", "-m", str(sprint), *words, says=(says,))


@pytest.mark.parametrize(
    ("words", "says", "hint"),
    [
        (("--solver", "scm"), "--solver scm", "--solver flow-dpm"),
        (("--image", "PHOTO"), "--image", "--model sana-sprint-0.6b"),
        (("--image", "PHOTO", "--strength", "0.5"), "--image", "--model sana-sprint-0.6b"),
        (("--strength", "0.5"), "--strength", "--image"),
    ],
    ids=brief,
)
@pytest.mark.parametrize("name", ["folder", "sana-0.6b-1024", "sana1.5-4.8b-1024", None])
def test_what_only_sprint_can_use_is_refused(
    refused, model, no_weights, photo, words, says, hint, name
):
    words = [photo if word == "PHOTO" else word for word in words]
    if name is not None:
        words += ["-m", str(model) if name == "folder" else name]
    refused(2, "a fox", *words, says=(says,), hint=hint)


@pytest.mark.parametrize(
    "words", [("--steps", "0"), ("-g", "nan"), ("--strength", "0.5")], ids=brief
)
def test_what_no_model_takes_is_refused_before_a_stranger_s_is_fetched(refused, no_weights, words):
    refused(2, "a fox", "-m", "someone/something", *words, says=(words[0],))


def test_what_sprint_cannot_use_is_refused_though_no_weights_are_here(refused, no_weights):
    refused(2, "a fox", "-m", "sana-sprint-0.6b", "--negative", "dog", says=("--negative",))


@pytest.mark.parametrize(
    "name",
    ["no/such.png", "", "-", "folder", "\udcff.png", "x" * 5000, "a\0b", "empty", "words", "half"],
    ids=brief,
)
def test_what_is_no_picture_is_refused_before_weights_are_read(
    refused, sprint, photo, tmp_path, name
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "words").write_text("a thousand words")
    whole = Path(photo).read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    (sprint / TEXT).unlink()
    if name in ("folder", "empty", "words", "half"):
        name = str(tmp_path / name)
    refused(2, "a fox", "-m", str(sprint), *FAST, "--image", name, says=("--image",))


def test_a_picture_that_would_fill_the_memory_is_refused(refused, sprint, tmp_path):
    """A bomb: few bytes that unpack to a few hundred megapixels."""
    from PIL import Image

    path = tmp_path / "bomb.png"
    Image.new("1", (12_000, 12_000)).save(path)
    refused(2, "a fox", "-m", str(sprint), *FAST, "--image", str(path), says=("--image", "pixels"))


def test_a_picture_far_from_every_trained_shape_is_refused(refused, sprint, tmp_path):
    from PIL import Image

    Image.new("RGB", (900, 90)).save(tmp_path / "wide.png")
    words = ("--image", str(tmp_path / "wide.png"))
    refused(2, "a fox", "-m", str(sprint), *FAST, *words, says=("10.00:1",), hint="--res")


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("model_index.json", {"_class_name": "SanaPipeline"}),
        ("model_index.json", {"_class_name": None}),
        ("transformer/config.json", {"guidance_embeds": False}),
    ],
    ids=["sana", "nameless", "no guidance"],
)
def test_a_folder_that_is_half_sprint_is_refused(refused, sprint, config, changes):
    edit(sprint / config, **changes)
    refused(1, "a fox", "-m", str(sprint), "--no-instruction", says=("guidance_embeds",))


def test_the_encoder_is_read_only_to_start_from_a_picture(refused, sana, here, sprint, photo):
    def cut(tensors):
        for name in [name for name in tensors if name.startswith("encoder.")]:
            del tensors[name]

    edit_tensors(sprint / VAE, cut)
    words = ("a fox", "-m", str(sprint), *FAST)
    refused(1, *words, "--image", photo, says=("vae", "missing encoder."))
    assert sana("generate", *words).code == 0


# --- the model's name --------------------------------------------------------------------------


@pytest.fixture
def no_weights(tmp_path, monkeypatch) -> Path:
    """A Hugging Face cache without a single model."""
    import huggingface_hub.constants

    folder = tmp_path / "hf"
    folder.mkdir()
    monkeypatch.setenv("HF_HOME", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    return folder


def test_an_unknown_model_brings_a_suggestion(refused):
    refused(2, "a fox", "-m", "sana-0.6b-1025", hint="did you mean sana-0.6b-1024")


@pytest.mark.parametrize(
    "name", ["zzz", "", "no/such/folder", "x" * 5000, "~no-such-user/x", "\udcff"], ids=brief
)
def test_what_is_no_model_is_refused(refused, name):
    refused(2, "a fox", "-m", name, *FAST, hint="hint:")


def test_a_file_is_no_model(refused, model):
    refused(2, "a fox", "-m", str(model / DIT), says=("is a file",), hint="folder")


def test_an_empty_folder_is_no_model(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(1, "a fox", "-m", str(tmp_path / "empty"), says=("model_index.json",), hint="layout")


@pytest.mark.parametrize("words", [(), ("-q",), ("--json",)], ids=brief)
def test_absent_weights_bring_the_command_that_fetches_them(refused, no_weights, words):
    said = refused(5, "a fox", "-m", "sana-0.6b-1024", "--offline", *words)
    assert "sana models pull sana-0.6b-1024" in said


def test_absent_weights_are_found_out_in_a_real_process(process, here, no_weights):
    run = process("generate", "a fox")
    assert (run.returncode, run.stdout) == (5, b"")
    assert_polite(run.stderr.decode(), hint="sana models pull sana-0.6b-1024")
    assert not list(here.iterdir())


def test_a_download_that_stopped_half_way_is_no_model(refused, no_weights):
    from sana_cli.weights.catalogue import known_models

    own = known_models()["sana-0.6b-1024"].sources[0]
    cache = no_weights / "hub" / f"models--{own.repo.replace('/', '--')}"
    (cache / "snapshots" / own.revision / "transformer").mkdir(parents=True)
    refused(5, "a fox", "-m", "sana-0.6b-1024", says=("not on this machine",), hint="pull")


# --- weights: exit code 1 ----------------------------------------------------------------------


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


PARTS = pytest.mark.parametrize("part", [DIT, VAE, TEXT], ids=["transformer", "vae", "text"])


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


# --- configs: exit code 1 ----------------------------------------------------------------------


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


# --- stdin -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no prompt"),
        (b" \n\n\t\n", "no prompt"),
        (b"\x89PNG\r\n\x1a\n\0\0", "UTF-8"),
        ("a fox".encode("utf-16"), "UTF-8"),
        (b"a fox\nan\0owl\n", "NUL"),
        (b"x" * 20_001, "20000"),
    ],
    ids=["empty", "blank", "binary", "utf-16", "nul", "long"],
)
def test_stdin_without_prompts_is_refused(refused, model, monkeypatch, content, says):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    refused(2, "-", "-m", str(model), *FAST, says=(says,))


def test_a_closed_stdin_is_refused(refused, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    refused(2, "-", "-m", str(model), *FAST, says=("stdin",))


def test_binary_stdin_is_refused_in_a_real_process(process, here, model):
    run = process("generate", "-", "-m", str(model), *FAST, input=bytes(range(256)))
    assert (run.returncode, run.stdout) == (2, b"")
    assert_polite(run.stderr.decode(), ("UTF-8",))


# --- output ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    named(
        (("-o", ""), "--output"),
        (("-o", "fox.gif"), ".gif"),
        (("-o", "{slug}.gif"), ".gif"),
        (("--format", "gif"), "--format"),
        (("-o", "fox.png", "--format", "webp"), "--format"),
        (("-o", "{subject}.png"), "{subject}"),
        (("-o", "{}.png"), "{}"),
        (("-o", "{0}.png"), "{0}"),
        (("-o", "{slug.__class__}.png"), "{slug.__class__}"),
        (("-o", "{slug!r}.png"), "{slug}"),
        (("-o", "{seed:x}.png"), "{seed:x}"),
        (("-o", "{seed:999999999}.png"), "{seed:999999999}"),
        (("-o", "{seed:{width}}.png"), "{seed"),
        (("-o", "{guidance:.1f}.png"), "{guidance:.1f}"),
        (("-o", "{slug.png"), "template"),
        (("-o", "slug}.png"), "template"),
        (("-o", "{slug}/{subject}/x.png"), "{subject}"),
        (("-o", "x" * 300 + "/fox.png"), "--output"),
        (("-o", "x/" * 3000 + "fox.png"), "--output"),
        (("-o", "x" * 5000), "--output"),
        (("-o", "/proc/nope/x.png"), "/proc"),
        (("-o", "-", "-n", "2"), "-o -"),
        (("-o", "-", "--json"), "--json"),
        (("-o", "-", "--force"), "--force"),
        (("--quality", "90"), "PNG"),
        (("--quality", "90", "-o", "fox.png"), "PNG"),
        (("--quality", "0", "--format", "webp"), "--quality"),
        (("--quality", "101", "-o", "fox.jpg"), "--quality"),
        (("--quality", "best", "-o", "fox.jpg"), "--quality"),
    ),
)
def test_a_wrong_output_is_refused(refused, model, words, says):
    refused(2, "a fox", "-m", str(model), *FAST, *words, says=(says,))


@pytest.mark.parametrize("output", ["file/fox.png", "file/a/b/fox.png", "file/", "file/{seed}"])
def test_a_file_is_no_folder_to_write_in(refused, model, tmp_path, output):
    (tmp_path / "file").write_text("mine")
    refused(2, "a fox", "-m", str(model), *FAST, "-o", f"{tmp_path}/{output}", says=("file",))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(refused, model, tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o500)
    output = str(tmp_path / "theirs" / "fox.png")
    refused(2, "a fox", "-m", str(model), *FAST, "-o", output, says=("permission",))


@pytest.mark.parametrize(("suffix", "side"), [("webp", 16416), ("jpg", 65536)])
def test_a_picture_too_wide_for_its_format_is_refused_before_drawing(refused, model, suffix, side):
    edit(model / "transformer/config.json", sample_size=64)
    size = ("--res", f"{side}x32", "--fit", "exact", "-o", f"fox.{suffix}")
    refused(2, "a fox", "-m", str(model), *FAST, *size, says=(str(side),))


@pytest.mark.parametrize("name", ["birds", "birds.png"])
def test_the_name_of_a_folder_means_in_that_folder(sana, model, here, name):
    (here / name).mkdir()
    run = sana("generate", "a fox", "-m", str(model), *FAST, "-o", name)
    assert (run.code, run.out) == (0, f"{name}/a-fox-7.png\n")
    assert [path.name for path in here.rglob("*.png") if path.is_file()] == ["a-fox-7.png"]


def test_force_does_not_replace_a_folder(sana, model, here):
    (here / "a-fox.png" / "kept").mkdir(parents=True)
    run = sana("generate", "a fox", "-m", str(model), *FAST, "-o", "{slug}.png", "-f")
    assert (run.code, run.out) == (1, "")
    assert_polite(run.err, ("a-fox.png",))
    assert sorted(here.rglob("*")) == [here / "a-fox.png", here / "a-fox.png" / "kept"]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("birds/of\\prey", "birds-of-prey"),
        ("../../etc/passwd", "etc-passwd"),
        ("/", "image"),
        ("..", "image"),
        ("🦊🌊", "image"),
        ("a 🦊 fox", "a-fox"),
        ("red fox " * 37, "red-fox-" * 7 + "red"),
        ("x" * 300, "x" * 60),
        ("狐" * 300, "狐" * 60),
        ("a\nfox\t\x1b[31m", "a-fox-31m"),
        ("con", "_con"),
        ("{slug}", "slug"),
        ("'$(rm -rf ~)'", "rm-rf"),
    ],
    ids=brief,
)
def test_any_prompt_gives_one_safe_file_name(sana, model, here, prompt, name):
    run = sana("generate", prompt, "-m", str(model), *FAST, "-o", "{slug}.png")
    assert (run.code, run.out) == (0, f"{name}.png\n")
    assert list(here.rglob("*")) == [here / f"{name}.png"]


def test_a_long_file_name_keeps_its_suffix(sana, model, here):
    run = sana("generate", "a fox", "-m", str(model), *FAST, "-o", "é" * 120 + "{slug}.webp")
    assert run.code == 0, run.err
    (path,) = here.rglob("*")
    assert path.name.startswith("éé") and path.suffix == ".webp"


def test_a_file_name_too_long_for_the_disk_is_shortened_or_refused(sana, model, here):
    run = sana("generate", "a fox", "-m", str(model), *FAST, "-o", "x" * 300 + ".png")
    if run.code:
        assert (run.code, run.out, list(here.iterdir())) == (2, "", [])
        assert_polite(run.err, ("--output",))
    else:
        (path,) = here.iterdir()
        assert path.name.startswith("xxx") and path.suffix == ".png"


# --- a full disk: exit code 6 ------------------------------------------------------------------


def fill_disk(monkeypatch, module, name: str, after: int = 0, code: int = errno.ENOSPC) -> None:
    real, calls = getattr(module, name), []

    def full(*args, **kwargs):
        calls.append(name)
        if len(calls) > after:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, full)


@pytest.mark.parametrize(
    ("module", "name", "code"),
    [
        (os, "fsync", errno.ENOSPC),
        (os, "fsync", errno.EDQUOT),
        (os, "link", errno.ENOSPC),
        (tempfile, "mkstemp", errno.ENOSPC),
    ],
    ids=["writing", "quota", "naming", "opening"],
)
@pytest.mark.parametrize("words", [(), ("--json",)], ids=["", "json"])
def test_a_full_disk_leaves_nothing_behind(refused, model, monkeypatch, module, name, code, words):
    fill_disk(monkeypatch, module, name, code=code)
    refused(6, "a fox", "-m", str(model), *FAST, *words, says=("space",), hint="-o")


def test_a_full_disk_leaves_what_stood_there(sana, model, here, monkeypatch):
    (here / "fox.png").write_text("mine")
    fill_disk(monkeypatch, os, "fsync")
    run = sana("generate", "a fox", "-m", str(model), *FAST, "-o", "fox.png", "--force")
    assert (run.code, run.out) == (6, "")
    assert [path.read_text() for path in here.iterdir()] == ["mine"]


def test_a_disk_that_fills_up_keeps_the_pictures_before(sana, model, here, monkeypatch):
    fill_disk(monkeypatch, os, "fsync", after=1)
    run = sana("generate", "a fox", "-m", str(model), *FAST, "-n", "3")
    assert (run.code, run.out) == (6, "a-fox-7.png\n")
    assert_polite(run.err, ("a-fox-8.png",))
    assert [path.name for path in here.iterdir()] == ["a-fox-7.png"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    "words", [("-o", "-"), (), ("--json",), ("--dry-run",)], ids=["picture", "path", "json", "plan"]
)
def test_a_full_disk_behind_stdout_is_reported(model, words):
    command = [SANA, "generate", "a fox", "-m", str(model), *FAST, *words]
    with open("/dev/full", "w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert run.returncode == 6, run.stderr
    assert_polite(run.stderr, ("space",))


# --- Ctrl-C and SIGTERM: exit codes 130 and 143 ------------------------------------------------

SANA = str(Path(sys.executable).with_name("sana"))
SIGNALS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)


@contextlib.contextmanager
def started(*words: str):
    """A real process; killed if the test fails while it runs."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([SANA, "generate", *words], stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def stopped(process: subprocess.Popen, number: int) -> tuple[int, bytes]:
    """Exit code and stdout after the signal; anything said on stderr was no traceback."""
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert b"Traceback" not in err and b"Exception ignored" not in err, err.decode()
    assert b"error:" not in err, err.decode()
    return process.returncode, out


@SIGNALS
@pytest.mark.parametrize("wait", [None, 0, 0.2, 0.8], ids=["stdin", "0 s", "0.2 s", "0.8 s"])
def test_stopped_while_it_starts_it_goes_quietly(here, model, number, code, wait):
    with started("-", "-m", str(model), "--steps", "1000", "-n", "50") as process:
        # More than a pipe holds: once it is all written, the command is reading.
        process.stdin.write(b"\n" * 200_000 + b"a fox\n")
        process.stdin.flush()
        if wait is not None:
            process.stdin.close()
            process.stdin = None
            time.sleep(wait)
        assert stopped(process, number) == (code, b"")
    assert not list(here.rglob("*"))


@SIGNALS
@pytest.mark.parametrize("marker", [b"model ", b"512x512", b"encode:"])
def test_stopped_while_it_draws_it_leaves_nothing(here, model, number, code, marker):
    with started("a fox", "-m", str(model), "--steps", "1000", "-n", "50") as process:
        assert any(line.startswith(marker) for line in process.stderr)
        time.sleep(0.1)
        assert stopped(process, number) == (code, b"")
    assert not list(here.rglob("*"))


@SIGNALS
def test_stopped_while_it_saves_it_leaves_whole_pictures(here, model, number, code):
    from PIL import Image

    with started("a fox", "-m", str(model), "--steps", "1", "-n", "20", "-s", "0") as process:
        first = process.stdout.readline()
        ended, more = stopped(process, number)
    assert ended == code
    printed = (first + more).decode().splitlines()
    found = sorted(path.name for path in here.rglob("*"))
    # The signal may fall between the file and its line.
    assert set(printed) <= set(found) and len(printed) + 1 >= len(found)
    assert 1 <= len(found) < 20
    for name in found:
        with Image.open(name) as picture:
            picture.load()


# --- damage at random --------------------------------------------------------------------------

FUZZ = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# Digits and brackets as well, or nearly every damaged file would be no JSON at all.
BYTES = st.sampled_from(b'0123456789-.eE"[]{},:tfnaIN') | st.integers(0, 255)
DAMAGE = st.lists(st.tuples(st.integers(0, 2**20), BYTES), min_size=1, max_size=4)


def damaged(data: bytes, damage: list[tuple[int, int]], length: int) -> bytes:
    content = bytearray(data)
    for place, value in damage:
        content[place % length] = value
    return bytes(content)


def assert_survives(sana, *words: str) -> None:
    run = sana("generate", "a fox", *words, "-o", "fox.png", "-f")
    assert run.code in (0, 1, 2, 7), run.err
    assert "Traceback" not in run.err and "panicked" not in run.err, run.err
    assert len([line for line in run.err.splitlines() if line.startswith("error:")]) == bool(
        run.code
    )
    assert bool(run.out) == (run.code == 0)


@pytest.mark.parametrize("config", CONFIGS)
def test_random_damage_to_a_config_is_survived(sana, model, config):
    original = (model / config).read_bytes()
    # What the plan reads is not drawn: a digit more in a size would take minutes and gigabytes.
    draws = config.startswith(("text_encoder", "tokenizer"))
    words = ("-m", str(model), *FAST, *(() if draws else ("--dry-run",)))

    @FUZZ
    @given(DAMAGE)
    def survives(damage):
        (model / config).write_bytes(damaged(original, damage, len(original)))
        assert_survives(sana, *words)

    survives()


@PARTS
def test_random_damage_to_a_weight_header_is_survived(sana, model, part):
    original = (model / part).read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    (model / part).unlink()

    @FUZZ
    @given(DAMAGE)
    def survives(damage):
        (model / part).write_bytes(damaged(original, damage, header))
        assert_survives(sana, "-m", str(model), *FAST)

    survives()
