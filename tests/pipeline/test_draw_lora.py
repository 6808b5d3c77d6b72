"""LoRAs through the command line draw what diffusers draws with them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from reference import assert_same_picture, draw, random_pipeline
from sana_cli import Pipeline
from sana_cli.pipeline.draw import Progress

CALL = ("-s", "7", "--steps", "3", "-r", "320x256", "--fit", "exact", "--no-instruction")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "model"
    random_pipeline(sample_size=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loras(model, tmp_path_factory) -> list[Path]:
    """Two LoRAs of different ranks, in the form that diffusers' trainer writes."""
    folder = tmp_path_factory.mktemp("loras")
    transformer = SanaPipeline.from_pretrained(model).transformer
    paths = []
    for rank in (2, 4):
        torch.manual_seed(rank)
        tensors = {}
        for name, module in transformer.named_modules():
            if name.endswith((".to_q", ".to_k", ".to_v")) and isinstance(module, torch.nn.Linear):
                wide, tall = module.weight.shape
                base = f"transformer.{name}"
                tensors[f"{base}.lora_A.weight"] = 0.2 * torch.randn(rank, tall)
                tensors[f"{base}.lora_B.weight"] = 0.2 * torch.randn(wide, rank)
        paths.append(folder / f"rank{rank}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def theirs(model: Path, loras: list[Path], scales: list[float]) -> np.ndarray:
    pipe = SanaPipeline.from_pretrained(model)
    names = [f"lora{i}" for i in range(len(loras))]
    for name, path in zip(names, loras, strict=True):
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    pipe.set_adapters(names, scales)
    call = {"num_inference_steps": 3, "width": 320, "height": 256}
    call |= {"use_resolution_binning": False, "complex_human_instruction": None}
    return draw(pipe, seeds=[7], prompt="a fox", **call)[0]


@pytest.mark.parametrize("scales", [[1.0], [0.5], [0.8, -0.6]])
def test_it_is_that_of_diffusers(model, loras, sana, tmp_path, scales):
    out = tmp_path / "out.png"
    chosen = loras[: len(scales)]
    words = [
        word
        for path, scale in zip(chosen, scales, strict=True)
        for word in ("--lora", f"{path}:{scale}")
    ]
    run = sana("generate", "a fox", "-m", str(model), *CALL, *words, "-o", str(out))
    assert run.code == 0, run.err
    ours = np.asarray(Image.open(out))
    assert_same_picture(ours, theirs(model, chosen, scales))
    assert f"LoRA {chosen[0]} at scale {scales[0]:g}" in run.err
    recipe = json.loads(Image.open(out).text["sana"])["recipe"]
    assert len(recipe["lora"].split(",")) == len(scales)
    missing = sana("generate", "--from", str(out), "-m", str(model))
    assert missing.code == 2 and "add --lora FILE" in missing.err
    again = tmp_path / "again.png"
    words += ["--from", str(out), "-m", str(model), "--no-instruction", "--steps", "3"]
    words += ["-r", "320x256", "-o", str(again)]
    assert sana("generate", *words).code == 0
    assert np.array_equal(np.asarray(Image.open(again)), ours)


def test_changing_the_lora_loads_the_transformer_and_nothing_else(model, loras):
    told: list[str] = []

    def note(event) -> None:
        if isinstance(event, Progress) and event.stage == "load":
            told.append(event.network)

    call = {"seed": 1, "steps": 1, "instruction": False, "res": "320x256", "fit": "exact"}
    with Pipeline(model, cache=False) as pipeline:
        plain = pipeline.generate("a fox", progress=note, **call)[0]
        assert told == ["text_encoder", "transformer", "decoder"]
        told.clear()
        changed = pipeline.generate("a fox", lora=loras[0], progress=note, **call)[0]
        assert told == ["transformer"]
        assert changed.tobytes() != plain.tobytes()
        told.clear()
        again = pipeline.generate("a fox", lora=[str(loras[0])], progress=note, **call)[0]
        assert told == [] and again.tobytes() == changed.tobytes()
        back = pipeline.generate("a fox", progress=note, **call)[0]
        assert back.tobytes() == plain.tobytes(), "the one before is still loaded or loaded again"


def test_rows_of_a_batch_have_loras_of_their_own(model, loras, sana, tmp_path):
    rows = [{"prompt": "a fox"}, {"prompt": "a fox", "lora": f"{loras[0]}:0.5"}]
    rows.append({"prompt": "a fox", "lora": [str(loras[0]), str(loras[1])]})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("-m", str(model), *CALL, "-o", str(tmp_path / "out") + "/{id}.png", "--json")
    run = sana("batch", str(file), *words)
    assert run.code == 0, run.err
    events = [json.loads(line) for line in run.out.splitlines()]
    images = [event for event in events if event["event"] == "image"]
    assert len({image["id"] for image in images}) == len({i["sha256"] for i in images}) == 3
    assert "lora" not in images[0]["recipe"], "recipes without one are those of version 0.1"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("none.safetensors", "the file does not exist"),
        ("none.safetensors:much", "'much' is not a scale"),
    ],
)
def test_what_is_no_lora_is_refused_before_weights_load(model, sana, word, says):
    run = sana("generate", "a fox", "-m", str(model), "--lora", word)
    assert run.code == 2
    assert says in run.err


def test_a_lora_for_another_width_says_which_model_it_was_made_for(loras, sana):
    run = sana("generate", "a fox", "-m", "demo", "--lora", str(loras[0]))
    assert run.code == 2
    assert "288" in run.err and "224" in run.err


def test_a_lora_that_names_another_base_is_warned_of(model, loras, sana, tmp_path):
    """Files name the model that they were trained on; the same one by its name is no warning."""
    for base, warned in ((model.name, False), ("someone/other", True)):
        path = tmp_path / "named.safetensors"
        save_file(load_file(loras[0]), path, {"ss_sd_model_name": base})
        run = sana("generate", "a fox", "-m", str(model), "--lora", str(path), *CALL, "--dry-run")
        assert run.code == 0, run.err
        assert ("named.safetensors says that it was trained on" in run.err) == warned
