"""LoRAs over HTTP: the names of files in the folder that the server's owner chose, and no other."""

import base64
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from servers import PROMPT, TINY

BLUEPRINT = Path(__file__).resolve().parents[2] / "benchmarks" / "gallery" / "blueprint.safetensors"
FAST = ("-m", "demo", "-r", "256x256", "--steps", "1", "-s", "7")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """LoRAs to offer: one that fits `demo`, one that does not, and what is none; one outside."""
    folder = tmp_path_factory.mktemp("secret") / "loras"
    (folder / "sub").mkdir(parents=True)
    for path in (folder / "blueprint", folder / "sub" / "inner", folder.parent / "outside"):
        shutil.copy(BLUEPRINT, path.with_suffix(".safetensors"))
    module = "transformer.transformer_blocks.0.attn1.to_q"
    wide = {f"{module}.lora_A.weight": torch.ones(2, 1152)}
    wide[f"{module}.lora_B.weight"] = torch.ones(1152, 2)
    save_file(wide, folder / "wide.safetensors")
    (folder / "broken.safetensors").write_bytes(b"nothing")
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.fixture(scope="module")
def offering(serving, folder):
    with serving("-m", "demo", "--loras", str(folder)) as one:
        yield one


def test_the_files_of_the_folder_are_listed(offering, served):
    rows = offering.client.get("/v1/loras").json()["data"]
    assert [row["id"] for row in rows] == ["blueprint", "broken", "wide"]
    assert served.client.get("/v1/loras").json()["data"] == []


def test_a_name_and_a_scale_are_the_file_at_that_scale(offering, sana, tmp_path):
    words = ("generate", PROMPT, *FAST)
    run = sana(*words, "--lora", f"{BLUEPRINT}:0.5", "-o", f"{tmp_path}/here.png")
    assert run.code == 0, run.err
    here = (tmp_path / "here.png").read_bytes()
    (drawn,) = offering.draw(lora=["blueprint:0.5"]).json()["data"]
    assert base64.b64decode(drawn["b64_json"]) == here
    there = ("--lora", "blueprint:0.5", "--server", offering.url, "-o", f"{tmp_path}/there.png")
    run = sana(*words, *there)
    assert run.code == 0, run.err
    assert "LoRA blueprint at scale 0.5" in run.err
    assert (tmp_path / "there.png").read_bytes() == here
    assert base64.b64decode(offering.draw().json()["data"][0]["b64_json"]) != here


def test_a_form_may_name_several(offering, sana, tmp_path):
    Image.new("RGB", (256, 256), (200, 60, 30)).save(tmp_path / "in.png")
    words = ("generate", PROMPT, *FAST, "--image", f"{tmp_path}/in.png", "--server", offering.url)
    words = (*words, "--lora", "blueprint:0.5", "--lora", "blueprint:-0.25")
    run = sana(*words, "-o", f"{tmp_path}/a.png")
    assert run.code == 0, run.err
    form = {key: str(value) for key, value in TINY.items()} | {"dry_run": "true"}
    files = {"image": (tmp_path / "in.png").read_bytes()}
    data = form | {"lora": ["blueprint:0.5", "blueprint:-0.25"]}
    (recipe,) = offering.client.post("/v1/images/edits", data=data, files=files).json()["recipes"]
    assert [word.rpartition(":")[2] for word in recipe["lora"].split(",")] == ["0.5", "-0.25"]


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "sub/inner",
        "./blueprint",
        "blueprint.safetensors",
        "notes",
        "notes.txt",
        "",
        "..",
        "someone/else",
        "/etc/passwd",
        "blueprint\0",
        "{folder}/blueprint",
        "{folder}/blueprint.safetensors",
    ],
)
def test_no_other_file_can_be_named(offering, folder, name):
    answer = offering.draw(lora=[name.format(folder=folder)])
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "lora")
    assert "offers no LoRA" in error["message"] or "names no LoRA" in error["message"]


@pytest.mark.parametrize("name", ["wide", "broken"])
def test_an_error_of_a_file_names_it_without_its_folder(offering, name):
    text = offering.draw(lora=[name]).text
    assert f"{name}.safetensors" in text
    assert "secret" not in text


def test_the_folder_must_be_one(process, tmp_path):
    run = process("serve", "-m", "demo", "--loras", str(tmp_path / "none"))
    assert (run.returncode, run.stdout) == (2, b"")
    assert b"is not a folder" in run.stderr
