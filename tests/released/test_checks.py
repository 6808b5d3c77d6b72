"""The checks of released weights, on stand-ins: right files pass, and wrong ones fail."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SanaControlNetModel, SanaPipeline
from huggingface_hub import constants
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import checks
from checks import (
    PROMPT,
    check_bytes,
    check_configs,
    check_eight_bits,
    check_files,
    check_lora,
    check_same_image,
    check_slice,
    check_tensors,
    check_tokens,
    drawn,
    ends,
)
from hub import Hub
from reference import LIKE_0_6B, LITE, TEXT_WIDTH, random_pipeline
from reference import SPRINT as SPRINT_CONFIG
from sana_cli.models.architectures import Architecture
from sana_cli.weights.catalogue import Model, known_components, known_models
from sana_cli.weights.config_files import read_config
from sana_cli.weights.hub_cache import find_parts
from sana_cli.weights.layout import LORA, find_part
from sana_cli.weights.lora import read_lora
from sana_cli.weights.model_files import ModelFiles, open_model
from standins import OWN, PLAIN, SPRINT, TEXT, lay, save_own, save_shared
from test_released import CONFIGS, LORAS, reference

WEIGHTS = "transformer/diffusion_pytorch_model.fp16.safetensors"
OUTCOMES = ("PASSED", "FAILED", "ERROR")  # as pytest writes them
FAILS = pytest.raises(AssertionError, match="What to do: ")
SMALL = ("--res", "256x160", "--fit", "exact", "--steps", "2", "-s", "7", "--device", "cpu")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    """Repositories by the names of released ones."""
    folder = tmp_path_factory.mktemp("published")
    plain = random_pipeline(sample_size=16)
    sprint = random_pipeline(sample_size=32, **SPRINT_CONFIG)
    sprint_source = known_models()[SPRINT].sources[0]
    save_own(plain, folder / "plain", OWN)
    save_own(sprint, folder / "sprint", sprint_source)
    save_shared(plain, folder / "shared")
    save_own(plain, folder / "shared", TEXT)  # which is also the repository of a model
    names = {OWN.repo: "plain", sprint_source.repo: "sprint", TEXT.repo: "shared"}
    return {repo: folder / name for repo, name in names.items()}


@pytest.fixture
def cache(published, tmp_path, monkeypatch) -> dict[str, Path]:
    """The snapshots of the stand-ins in a cache that is taken for the hub's, by repository."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("SANA_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("SANA_CACHE_DIR", str(tmp_path / "kept"))
    sources = (OWN, TEXT, known_models()[SPRINT].sources[0])
    return {s.repo: lay(tmp_path / "hub", s, published[s.repo]) for s in sources}


def opened(name: str = PLAIN) -> tuple[Model, ModelFiles]:
    model = known_models()[name]
    parts = find_parts(model)
    assert parts is not None
    return model, open_model(parts)


def edit(path: Path, **changes) -> None:
    """Change a JSON file of a snapshot, which is no link any more."""
    values = json.loads(path.read_text()) | changes
    path.unlink()
    path.write_text(json.dumps(values))


def change_tensor(path: Path) -> None:
    """Change one tensor of a file, in the blob behind it."""
    tensors = load_file(path)
    tensors["patch_embed.proj.weight"] *= 1.5
    save_file(tensors, path.resolve())


def expected(files: ModelFiles) -> Architecture:
    return Architecture(files.dit, files.text, files.vae, files.flow_shift)


def recorded(files: ModelFiles) -> list[dict]:
    tokenizer = AutoTokenizer.from_pretrained(files.parts["tokenizer"].folder)
    return [{"text": text, "ids": tokenizer(text).input_ids} for text in ("a fox", "狐 🦊")]


# --- right ones --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [PLAIN, SPRINT])
def test_right_files_pass(cache, name):
    model, files = opened(name)
    check_files(model.sources)
    check_configs(files, expected(files))
    check_tokens(files.parts, recorded(files))
    for part, source in zip(("transformer", "text_encoder", "vae"), model.sources, strict=True):
        config = {"transformer": files.dit, "text_encoder": files.text, "vae": files.vae}[part]
        found = check_tensors(files.parts[part], part, config)
        assert found == sum(
            tensor.nbytes for path in files.parts[part].files for tensor in load_file(path).values()
        )
        check_bytes(found, replace(source, bytes=found))


@pytest.mark.parametrize(
    ("name", "dtype"), [(PLAIN, "float32"), (PLAIN, "bfloat16"), (SPRINT, "float32")]
)
def test_the_right_image_passes_and_another_fails(cache, sana, tmp_path, name, dtype):
    model, files = opened(name)
    precision = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    words = (PROMPT, "-m", name, *SMALL, "--dtype", dtype, "--text-precision", precision)
    image, recipe = drawn(sana, tmp_path / "image.png", *words)
    theirs = reference(model, files, "cpu")
    check_same_image(image, recipe, theirs, dtype)
    with FAILS:
        check_same_image(image, replace(recipe, seed=8), theirs, dtype)
    check_slice(image, dict(zip(("first", "last"), ends(image), strict=True)))


def test_eight_bits_pass_and_those_of_other_weights_fail(cache):
    model, files = opened()
    theirs = reference(model, files, "cpu")
    assert check_eight_bits(files.parts, theirs, ["a fox"], "cpu") > 1e-4
    part = files.parts["text_encoder"]
    for path in part.files:
        save_file({n: t + 0.05 for n, t in load_file(path).items()}, f"{path}.safetensors")
    other = replace(part, weights=tuple(Path(f"{path}.safetensors") for path in part.files))
    with FAILS:
        check_eight_bits(files.parts | {"text_encoder": other}, theirs, ["a fox"], "cpu")


# --- wrong ones --------------------------------------------------------------------------------


def test_a_changed_tensor_is_noticed_in_the_file_and_in_the_image(cache, sana, tmp_path):
    model, files = opened()
    words = (PROMPT, "-m", PLAIN, *SMALL)
    before = ends(drawn(sana, tmp_path / "before.png", *words)[0])
    change_tensor(cache[OWN.repo] / WEIGHTS)
    with FAILS:
        check_files(model.sources)
    image, _ = drawn(sana, tmp_path / "after.png", *words)
    with FAILS:
        check_slice(image, dict(zip(("first", "last"), before, strict=True)))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("transformer/config.json", {"num_layers": 3}),
        ("transformer/config.json", {"interpolation_scale": 2.0}),
        ("transformer/config.json", {"a_new_key": 1}),
        ("scheduler/scheduler_config.json", {"flow_shift": 4.0}),
        ("text_encoder/config.json", {"attn_logit_softcapping": None}),
        ("text_encoder/config.json", {"rope_theta": 5.0, "rope_parameters": None}),
        ("vae/config.json", {"scaling_factor": 0.5}),
    ],
)
def test_another_config_is_noticed(cache, file, changes):
    right = expected(opened()[1])
    shared = file.startswith(("text_encoder", "vae"))
    edit(cache[TEXT.repo if shared else OWN.repo] / file, **changes)
    with FAILS:
        check_configs(opened()[1], right)


@pytest.mark.parametrize("change", ["missing", "added", "shape"])
def test_other_tensors_than_the_config_s_are_noticed(cache, change):
    path = cache[OWN.repo] / WEIGHTS
    tensors = load_file(path)
    if change == "missing":
        del tensors["proj_out.bias"]
    elif change == "added":
        tensors["pos_embed"] = torch.zeros(4)
    else:
        tensors["proj_out.bias"] = torch.zeros(33)
    save_file(tensors, path.resolve())
    _, files = opened()
    with FAILS:
        check_tensors(files.parts["transformer"], "transformer", files.dit)


def test_components_are_checked_by_their_own_configs(tmp_path):
    random_pipeline(vae=LITE).vae.save_pretrained(tmp_path / "vae")
    controlnet = SanaControlNetModel(num_layers=2, caption_channels=TEXT_WIDTH, **LIKE_0_6B)
    controlnet.save_pretrained(tmp_path / "controlnet")
    for kind, config in CONFIGS.items():
        part = find_part(tmp_path / kind)
        assert check_tensors(part, kind, read_config(config, part.config)[0]) > 0
    edit(tmp_path / "vae" / "config.json", decoder_layers_per_block=[0, 1, 1, 1, 1, 1])
    part = find_part(tmp_path / "vae")
    with FAILS:
        check_tensors(part, "vae", read_config(CONFIGS["vae"], part.config)[0])


def test_another_size_than_the_catalogue_s_is_noticed(cache):
    _, files = opened()
    found = check_tensors(files.parts["transformer"], "transformer", files.dit)
    with FAILS:
        check_bytes(found, OWN)


def test_another_tokenizer_is_noticed(cache):
    _, files = opened()
    rows = recorded(files)
    with FAILS:
        check_tokens(files.parts, [row | {"ids": row["ids"][:-1]} for row in rows])
    path = cache[TEXT.repo] / "tokenizer" / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    name = {number: word for word, number in model["vocab"].items()}[rows[0]["ids"][-1]]
    model["vocab"][name], model["vocab"]["z"] = model["vocab"]["z"], model["vocab"][name]
    edit(path, model=model)
    with FAILS:
        check_tokens(files.parts, rows)


# --- LoRA --------------------------------------------------------------------------------------


def trained(folder: Path, seed: int, std: float = 0.05) -> Path:
    """A LoRA for the stand-in, as diffusers' trainer writes it."""
    transformer = random_pipeline(sample_size=16).transformer
    torch.manual_seed(seed)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"]))
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    layers = get_peft_model_state_dict(transformer)
    name = f"{seed}.safetensors"
    SanaPipeline.save_lora_weights(folder, transformer_lora_layers=layers, weight_name=name)
    return folder / name


def test_a_right_lora_passes_and_wrong_ones_fail(cache, tmp_path, monkeypatch):
    _, files = opened()
    one, other = trained(tmp_path, 1), trained(tmp_path, 2)
    check_lora(one, files, "diffusers", "fp16")
    with FAILS:
        check_lora(one, files, "LyCORIS", "fp16")
    with FAILS:
        check_lora(trained(tmp_path, 3, std=0), files, "diffusers", "fp16")
    with FAILS:
        check_lora(files.parts["transformer"].files[0], files, "diffusers", "fp16")
    monkeypatch.setattr(checks, "read_lora", lambda _: read_lora(other))
    with FAILS:
        check_lora(one, files, "diffusers", "fp16")


# --- the whole way -----------------------------------------------------------------------------


@pytest.fixture
def hub(published, tmp_path):
    """A hub with miniatures under the names of a few repositories."""
    server = Hub()
    with_slices = known_models()["sana-1.6b-512"].sources[0]
    for source, folder in ((OWN, OWN), (TEXT, TEXT), (with_slices, OWN)):
        commit = None if source.revision == "main" else source.revision
        server.push(source.repo, published[folder.repo], commit)
    random_pipeline(vae=LITE).vae.save_pretrained(tmp_path / "lite")
    server.push(known_components("vae")["lite"].source.repo, tmp_path / "lite")
    (tmp_path / "lora").mkdir()
    trained(tmp_path / "lora", 1).rename(tmp_path / "lora" / LORA)
    server.push(LORAS[0]["repo"], tmp_path / "lora")
    yield server
    server.close()


@pytest.mark.exhaustive
def test_the_marked_tests_fetch_run_and_say_what_to_do(hub, tmp_path):
    """`pytest -m weights` on miniatures: they draw as in diffusers, and are not what they claim."""
    env = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "SANA_DATA_DIR": str(tmp_path / "data"),
        "NO_PROXY": "127.0.0.1",
    }
    env.pop("HF_HUB_OFFLINE")
    chosen = [f"{PLAIN}]", "tokens", "eight_bits", "corners and 512", LORAS[0]["repo"], "lite"]
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider"]
    command += ["-m", "weights", "-k", " or ".join(chosen)]
    command += [str(Path(__file__).with_name("test_released.py"))]

    def outcomes(**more: str) -> tuple[dict[str, str], str]:
        run = subprocess.run(command, env=env | more, capture_output=True, text=True, timeout=600)
        words = (line.split(" - ")[0].split() for line in run.stdout.splitlines())
        report = {w[1].partition("::")[2]: w[0] for w in words if w and w[0] in OUTCOMES}
        return report, run.stdout

    report, text = outcomes()
    assert report == {} and "SANA_TEST_WEIGHTS=pull" in text
    report, text = outcomes(SANA_TEST_WEIGHTS="pull")
    assert report == {
        f"test_files_are_what_the_hub_promised[{PLAIN}]": "PASSED",
        f"test_configs_and_tensors_are_those_of_the_catalogue[{PLAIN}]": "FAILED",
        f"test_the_image_is_that_of_diffusers[float32-{PLAIN}]": "PASSED",
        f"test_the_image_is_that_of_diffusers[bfloat16-{PLAIN}]": "PASSED",
        "test_the_image_has_the_published_corners[sana-1.6b-512]": "FAILED",
        "test_the_tokens_are_the_recorded_ones": "FAILED",
        "test_eight_bits_cost_the_text_encoder_little": "PASSED",
        f"test_a_published_lora_changes_what_diffusers_changes[{LORAS[0]['repo']}]": "PASSED",
    }
    assert text.count("What to do: ") >= 3
    assert "write `bytes = " in text, "of the autoencoder, whose tensors nobody has counted"
