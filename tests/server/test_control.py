"""A control image over HTTP, alone: what a server draws along it is what the command line draws."""

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reference import random_controlnet, random_pipeline
from sana_cli.weights.catalogue import known_components
from servers import Served

NAME = "sana-0.6b-hed"  # the ControlNet that a request may name
CALL = ("-s", "7", "--steps", "2", "-r", "256x256", "--fit", "exact", "--no-instruction")
FIELDS = {"seed": "7", "steps": "2", "res": "256x256", "fit": "exact", "instruction": "false"}


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> dict[str, Path]:
    """A model in a folder, and a hub's cache with a ControlNet of its widths."""
    place = tmp_path_factory.mktemp("machine")
    random_pipeline(sample_size=16, num_layers=2).save_pretrained(place / "model")
    controlnet = random_controlnet(num_layers=1)
    source = known_components("controlnet")[NAME].source
    commit = "c" * 40
    repo = place / "hub" / f"models--{source.repo.replace('/', '--')}"
    controlnet.save_pretrained(repo / "snapshots" / commit / "controlnet", variant="fp16")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    y, x = np.mgrid[0:256, 0:256]
    rings = (np.hypot(x - 128, y - 128) % 40 < 6) * 255
    Image.fromarray(np.stack([rings] * 3, -1).astype(np.uint8)).save(place / "rings.png")
    return {"model": place / "model", "hub": place / "hub", "rings": place / "rings.png"}


@pytest.fixture(scope="module")
def guided(serving, machine) -> Iterator[Served]:
    with serving("-m", str(machine["model"]), HF_HUB_CACHE=str(machine["hub"])) as one:
        yield one


def test_a_control_image_alone_draws_what_the_command_draws(
    guided, machine, sana, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(machine["hub"]))
    words = ("generate", "a fox", *CALL, "--control", str(machine["rings"]), "--controlnet", NAME)
    cold = sana(*words, "-m", str(machine["model"]), "-o", f"{tmp_path}/cold.png")
    assert cold.code == 0, cold.err
    warm = sana(*words, "--server", guided.url, "-o", f"{tmp_path}/warm.png")
    assert warm.code == 0, warm.err
    assert f"ControlNet {NAME} at scale 1" in warm.err
    bytes_of = {name: (tmp_path / f"{name}.png").read_bytes() for name in ("cold", "warm")}
    assert bytes_of["warm"] == bytes_of["cold"]
    form = {"prompt": "a fox", "controlnet": NAME} | FIELDS
    files = {"control": machine["rings"].read_bytes()}
    answer = guided.client.post("/v1/images/edits", data=form, files=files)
    assert answer.status_code == 200, answer.text
    (drawn,) = answer.json()["data"]
    assert base64.b64decode(drawn["b64_json"]) == bytes_of["cold"]
    text = {"control": base64.b64encode(files["control"]).decode()}
    weak = guided.client.post("/v1/images/edits", json=form | text | {"control_scale": 0.2})
    assert weak.json()["data"][0]["b64_json"] != drawn["b64_json"]


def test_an_edit_without_any_image_is_refused(served):
    answer = served.client.post("/v1/images/edits", json={"prompt": "a fox"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "image is missing: send image or control"
    schema = served.client.get("/openapi.json").json()["paths"]["/v1/images/edits"]["post"]
    for content in schema["requestBody"]["content"].values():
        assert content["schema"]["required"] == ["prompt"]
        assert content["schema"]["anyOf"] == [{"required": ["image"]}, {"required": ["control"]}]
