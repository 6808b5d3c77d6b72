"""What settings amount to on a device: here, in which precision a GPU adds products up."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sana_cli.batch.jobs import JobBuilder, JobSpec
from sana_cli.batch.rows import Row
from sana_cli.commands.generate import _announce
from sana_cli.images.claims import checked
from sana_cli.images.names import Output
from sana_cli.kernels import dispatch
from sana_cli.recipe import Recipe
from sana_cli.resolve import Inputs, Resolution, resolve
from sana_cli.session import DrawRequest
from sana_cli.settings import Settings
from sana_cli.weights.model_files import ModelFiles, released_model

GEFORCE, PROFESSIONAL = "NVIDIA GeForce RTX 4090", "NVIDIA L40S"
MODEL = "sana-0.6b-1024"  # trained in float16


@pytest.fixture
def gpu(monkeypatch):
    """Put a GPU of capability 8.9 into this machine, by its name."""

    def put(name: str) -> str:
        facts = SimpleNamespace(total_memory=24 * 10**9)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(dispatch, "fallback_reason", lambda device: None)
        return "cuda"

    return put


def resolved(**settings) -> tuple[Resolution, ModelFiles]:
    resolution = resolve(Settings("a fox", model=MODEL, **settings), Inputs())
    return resolution, released_model(resolution.model)


def recipe_on(device: str, **settings) -> Recipe:
    resolution, files = resolved(**settings)
    return resolution.recipe(files, device, 7)


def test_a_recipe_tells_that_products_are_summed_in_float16(gpu):
    assert recipe_on(gpu(GEFORCE)).sums == "float16"
    assert recipe_on(gpu(GEFORCE), quant="w8a8").sums == "float16", "of cross-attention"


def test_a_recipe_is_as_before_where_they_are_summed_in_float32(gpu, monkeypatch):
    others = [
        recipe_on(gpu(PROFESSIONAL)),
        recipe_on(gpu(GEFORCE), dtype="bfloat16"),
        recipe_on("cpu", dtype="float16"),
    ]
    gpu(GEFORCE)
    monkeypatch.setattr(dispatch, "fallback_reason", lambda device: "Triton is not installed")
    others.append(recipe_on("cuda"))
    for recipe in others:
        assert recipe.sums is None and "sums" not in recipe.as_dict()


def test_the_sums_are_printed_and_read_back(gpu):
    recipe, said = recipe_on(gpu(GEFORCE)), []
    resolution, files = resolved()
    request = DrawRequest(resolution.model, files, [recipe])
    _announce(request, "cuda", 1, SimpleNamespace(info=said.append))
    assert "dit float16 with sums in float16, vae bfloat16" in said[-1]
    kept = json.loads(json.dumps(recipe.as_dict()))
    assert {name: checked(name, value) for name, value in kept.items()} == recipe.as_dict()
    with pytest.raises(ValueError):
        checked("sums", "float12")


def test_a_job_has_the_same_id_on_every_gpu(gpu):
    resolution, files = resolved()
    spec = JobSpec(Row(1, {}, {}), resolution, [7], 1, Output("out", "{id}.png", "png"), {})
    found = [
        JobBuilder(None).build([spec], lambda one: (one, files), gpu(name))[0][0]
        for name in (GEFORCE, PROFESSIONAL)
    ]
    assert found[0].id == found[1].id
    assert [job.recipe.sums for job in found] == ["float16", None]
    assert found[0].name == Path("out") / f"{found[1].id}.png"
