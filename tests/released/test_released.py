"""Released weights against their catalogue, published values, and diffusers on this machine.

pytest -m weights                         with what is in the hub's cache; the rest skips
SANA_TEST_WEIGHTS=pull pytest -m weights  fetches what is missing: 50 GB for all models
"""

import json
from pathlib import Path

import pytest
import torch

from checks import (
    PROMPT,
    Reference,
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
)
from gemma_tokenizer import RECORDED
from sana_cli.models.architectures import architecture
from sana_cli.models.configs import ControlNetConfig, DCAEConfig
from sana_cli.system.devices import choose_device
from sana_cli.system.inventory import memory
from sana_cli.weights.catalogue import Model, known_components, known_models
from sana_cli.weights.config_files import read_config
from sana_cli.weights.hub_cache import find_parts
from sana_cli.weights.lora_choice import lora_source
from sana_cli.weights.model_files import ModelFiles

# A library may warn of a real machine or a real file as it likes.
pytestmark = [pytest.mark.weights, pytest.mark.filterwarnings("default")]

HERE = Path(__file__).parent
RELEASED = [name for name, model in known_models().items() if model.sources]
SLICES = json.loads((HERE / "slices.json").read_text(encoding="utf-8"))
LORAS = json.loads((HERE / "loras.json").read_text(encoding="utf-8"))["loras"]
COMPONENTS = [c for kind in ("vae", "controlnet") for c in known_components(kind).values()]
COMPONENTS = [c for c in COMPONENTS if c.source and not c.name.startswith("dc-ae")]
CONFIGS = {"vae": DCAEConfig, "controlnet": ControlNetConfig}
EVERY = pytest.mark.parametrize("name", RELEASED)
SPARE = 4 << 30  # bytes beside the largest network: torch, activations, what our program holds


@pytest.fixture(scope="session")
def device() -> str:
    return choose_device("auto")


def need_memory(files: ModelFiles, *parts: str, dtype: str, device: str = "cpu") -> None:
    """Skip a test that a device has no memory for: for the largest of some parts in a dtype."""
    stored = max(sum(path.stat().st_size for path in files.parts[part].files) for part in parts)
    needed = stored * getattr(torch, dtype).itemsize // 2 + SPARE  # the files hold 16 bits
    on_gpu = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else memory()["available_bytes"]
    if free is not None and free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB free on {device}, {free / 1e9:.0f} are")


def reference(model: Model, files: ModelFiles, device: str) -> Reference:
    """diffusers on the files of a model."""
    places = {folder: source for source in model.sources for folder in source.folders}
    variants = {part: places[part].variants[0] for part in ("transformer", "text_encoder", "vae")}
    return Reference(files.parts, variants, device, files.is_sprint)


@EVERY
def test_files_are_what_the_hub_promised(released, name):
    model, _ = released(name)
    check_files(model.sources)


@EVERY
def test_configs_and_tensors_are_those_of_the_catalogue(released, name):
    model, files = released(name)
    check_configs(files, architecture(model.architecture, model.side))
    own, text, vae = model.sources
    for part, config, source in (
        ("transformer", files.dit, own),
        ("text_encoder", files.text, text),
        ("vae", files.vae, vae),
    ):
        check_bytes(check_tensors(files.parts[part], part, config), source)


@EVERY
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_image_is_that_of_diffusers(
    released, sana, device, tmp_path, record_property, name, dtype
):
    """On a GPU at up to 1024² in the model's own steps, on a CPU at 256² in two."""
    model, files = released(name)
    need_memory(files, "text_encoder", "transformer", dtype=dtype, device=device)
    on_gpu = device != "cpu"
    side = min(model.side, 1024) if on_gpu else 256
    precision = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    image, recipe = drawn(
        *(sana, tmp_path / "image.png", PROMPT, "-m", name, "-s", "7", "--device", device),
        *("--dtype", dtype, "--text-precision", precision, "--res", f"{side}x{side}"),
        *("--fit", "exact", "--steps", str(model.steps if on_gpu else 2)),
    )
    likeness = check_same_image(image, recipe, reference(model, files, device), dtype)
    record_property("likeness_db", likeness)


@pytest.mark.parametrize("name", SLICES["images"])
def test_the_image_has_the_published_corners(released, sana, device, tmp_path, name):
    released(name)
    precision = "fp32" if device == "cpu" else "bf16"
    words = ("-s", str(SLICES["seed"]), "--steps", str(SLICES["steps"]), "-m", name)
    words += ("--device", device, "--text-precision", precision)
    image, _ = drawn(sana, tmp_path / "image.png", SLICES["prompt"], *words)
    check_slice(image, SLICES["images"][name])


# --- what the models share ---------------------------------------------------------------------


def any_model(released):
    """A released model that is here, else the first: all have one text encoder."""
    here = (name for name in RELEASED if find_parts(known_models()[name]))
    return released(next(here, RELEASED[0]))


def test_the_tokens_are_the_recorded_ones(released):
    _, files = any_model(released)
    check_tokens(files.parts, json.loads(RECORDED.read_text(encoding="utf-8"))["prompts"])


def test_eight_bits_cost_the_text_encoder_little(released, device, record_property):
    model, files = any_model(released)
    need_memory(files, "text_encoder", dtype="float32")
    prompts = [PROMPT, "一只狐狸在雪地里", "🦊 in ❄️", "a fox, " * 100]
    # In float32 the encoder is larger than many a GPU: the reference runs on the CPU.
    error = check_eight_bits(files.parts, reference(model, files, "cpu"), prompts, device)
    record_property("relative_error", error)


@pytest.mark.parametrize("chosen", COMPONENTS, ids=lambda c: c.name)
def test_a_component_has_the_tensors_of_its_config(component, chosen):
    part = component(chosen)
    check_files([chosen.source])
    config, unknown = read_config(CONFIGS[chosen.kind], part.config)
    assert not unknown, f"its config sets {unknown}: see check_configs"
    found = check_tensors(part, chosen.kind, config)
    if chosen.architecture is not None:
        config.check_matches(architecture(chosen.architecture, 1024).dit)
    if chosen.source.bytes == 0:
        pytest.skip(f"its tensors are right; write `bytes = {found:_}` in `weights.toml`")
    check_bytes(found, chosen.source)


@pytest.mark.parametrize("row", LORAS, ids=lambda row: row["repo"])
def test_a_published_lora_changes_what_diffusers_changes(released, lora, row):
    path = lora(lora_source(row["repo"]))
    model, files = released(row["base"])
    need_memory(files, "transformer", dtype="float32")
    check_lora(path, files, row["container"], model.sources[0].variants[0])
