"""`--quant w8a8`: the image, its recipe, and the weights that are kept."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sana_cli import Pipeline
from sana_cli.bench.competitor import psnr
from sana_cli.kernels import rows8
from sana_cli.models import w8a8
from sana_cli.weights.layout import folder_parts
from sana_cli.weights.lora import transformer_shapes
from sana_cli.weights.model_files import open_model

DEMO = Path(w8a8.__file__).parents[1] / "demo"
PROMPT = "a red circle on white"
WORDS = ("-m", "demo", "-r", "256", "--steps", "2", "-s", "7", "--dtype", "float32")

pytestmark = pytest.mark.filterwarnings("ignore:--quant w8a8 is no faster")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SANA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "int8"


@pytest.fixture
def quantised(monkeypatch) -> list[int]:
    """One entry for each time that weights are quantised."""
    calls: list[int] = []
    quantise = w8a8.quantise

    def counted(network):
        calls.append(1)
        return quantise(network)

    monkeypatch.setattr(w8a8, "quantise", counted)
    return calls


def draw(model: str | Path = "demo", quant: str = "w8a8", **options) -> np.ndarray:
    with Pipeline(model, quant=quant, dtype="float32", device="cpu") as pipeline:
        (image,) = pipeline.generate(PROMPT, **{"seed": 7, "steps": 2, "res": "256"} | options)
    return np.asarray(image)


def test_the_command_says_and_writes_it_and_draws_it_again(sana, tmp_path, cache):
    path, again = tmp_path / "one.png", tmp_path / "two.png"
    run = sana("generate", PROMPT, *WORDS, "--quant", "w8a8", "-o", str(path))
    assert run.code == 0, run.err
    assert "in float32 with w8a8" in run.err
    assert json.loads(Image.open(path).text["sana"])["recipe"]["quant"] == "w8a8"
    assert sana("generate", "--from", str(path), "-o", str(again)).code == 0
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(path)))
    info = sana("info", str(path)).out
    assert "--quant w8a8" in info
    assert "the transformer's products, w8a8" in info


def test_a_recipe_without_it_outranks_what_is_kept(sana, tmp_path, monkeypatch):
    path = tmp_path / "one.png"
    assert sana("generate", PROMPT, *WORDS, "-o", str(path)).code == 0
    assert "quant" not in json.loads(Image.open(path).text["sana"])["recipe"]
    monkeypatch.setenv("SANA_QUANT", "w8a8")
    assert "w8a8" not in sana("generate", "--from", str(path), "--dry-run").err
    assert "w8a8" in sana("generate", PROMPT, *WORDS, "--dry-run").err


def test_the_image_is_near_the_one_in_float32(cache):
    assert 30 < psnr(draw(), draw(quant="none")) < 90


def test_weights_are_quantised_once(cache, quantised):
    first = draw()
    assert len(list(cache.iterdir())) == len(quantised) == 1
    assert np.array_equal(draw(), first)
    assert len(quantised) == 1


def test_a_damaged_file_is_made_anew(cache, quantised):
    first = draw()
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert np.array_equal(draw(), first)
    assert len(quantised) == 2


def test_what_cannot_be_kept_is_said(cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("not a folder")
    with pytest.warns(UserWarning, match="the 8-bit weights cannot be kept"):
        draw()


def test_other_weights_are_not_taken_for_these(cache, tmp_path, quantised):
    draw()
    model, options = tmp_path / "model", {"res": "512", "steps": 1, "instruction": False}
    shutil.copytree(DEMO, model)
    first = draw(model, **options)
    assert len(quantised) == 1  # by content, wherever they are
    from safetensors.torch import load_file, save_file

    (path,) = (model / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    tensors["transformer_blocks.0.attn1.to_q.weight"] *= 3
    save_file(tensors, path)
    assert not np.array_equal(draw(model, **options), first)
    assert len(quantised) == 2


def test_a_lora_is_merged_before(cache, tmp_path, quantised):
    """Its weights are kept apart from those of the model alone."""
    from safetensors.torch import save_file

    first = draw()
    shapes = transformer_shapes(open_model(folder_parts(DEMO)).dit)
    name = "transformer_blocks.0.attn1.to_v"
    wide, tall = shapes[f"{name}.weight"]
    down, up = torch.randn(2, tall), torch.randn(wide, 2)
    tensors = {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    save_file(tensors, tmp_path / "lora.safetensors")
    changed = draw(lora=(str(tmp_path / "lora.safetensors"),))
    assert not np.array_equal(changed, first)
    assert len(list(cache.iterdir())) == len(quantised) == 2
    assert psnr(changed, draw(quant="none", lora=(str(tmp_path / "lora.safetensors"),))) > 25


def test_where_it_is_no_faster_that_is_said(monkeypatch, cache):
    monkeypatch.setattr(rows8, "fast_instructions", lambda: None)
    assert rows8.chosen_products("cpu")[0] is False
    with pytest.warns(UserWarning, match="no faster on this machine: this CPU has neither"):
        draw()


def test_doctor_tells_whether_it_is_fast(sana, machine):
    line = next(line for line in sana("doctor").out.splitlines() if line.startswith("w8a8"))
    assert rows8.chosen_products("cpu")[1] in line
