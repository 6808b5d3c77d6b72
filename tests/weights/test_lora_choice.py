"""What `--lora` may say."""

from pathlib import Path

import pytest

from sana_cli.errors import UsageError
from sana_cli.weights.lora_choice import lora_source, parse_lora


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("fox.safetensors", "a:b.safetensors", "x:0.5", "owner/name.safetensors"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("fox.safetensors", "fox.safetensors", 1),
        ("fox.safetensors:0.8", "fox.safetensors", 0.8),
        ("./fox.safetensors:.8", "./fox.safetensors", 0.8),
        ("fox.safetensors:-0.5", "fox.safetensors", -0.5),
        ("fox.safetensors:+2", "fox.safetensors", 2),
        ("fox.safetensors:0", "fox.safetensors", 0),
        ("fox.safetensors:5e-1", "fox.safetensors", 0.5),
        ("a:b.safetensors", "a:b.safetensors", 1),
        ("a:b.safetensors:0.25", "a:b.safetensors", 0.25),
        ("x:0.5", "x:0.5", 1),  # a file of that name
        ("x:0.5:2", "x:0.5", 2),
        ("owner/name.safetensors:0.3", "owner/name.safetensors", 0.3),
    ],
)
def test_a_file_and_its_scale(here, text, path, scale):
    choice = parse_lora(text)
    assert (choice.place, choice.scale) == (Path(path), scale)


def test_the_home_folder(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    assert parse_lora("~/fox.safetensors:0.5").place == here / "fox.safetensors"


@pytest.mark.parametrize(
    ("text", "repo", "file", "scale"),
    [
        ("someone/fox", "someone/fox", "", 1),
        ("someone/fox:0.8", "someone/fox", "", 0.8),
        ("some.one/fox-v1.5:-1", "some.one/fox-v1.5", "", -1),
        ("someone/fox/a.safetensors", "someone/fox", "a.safetensors", 1),
        ("someone/fox/sub/a.safetensors:0.7", "someone/fox", "sub/a.safetensors", 0.7),
    ],
)
def test_a_repository_and_its_scale(here, text, repo, file, scale):
    choice = parse_lora(text)
    assert (choice.place, choice.scale) == (lora_source(repo, file), scale)
    assert choice.name == text.split(":")[0]


@pytest.mark.parametrize(
    "text", ["C:\\loras\\fox.safetensors", "C:/loras/fox.safetensors", "c:\\fox.safetensors:0.8"]
)
def test_the_letter_of_a_drive_is_no_scale(here, text):
    with pytest.raises(UsageError, match="does not exist"):  # there is no such drive here
        parse_lora(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no LoRA"),
        (":0.5", "names no LoRA"),
        ("fox.safetensors:", "'' is not a scale"),
        ("fox.safetensors:high", "'high' is not a scale"),
        ("fox.safetensors:nan", "not a scale"),
        ("fox.safetensors:inf", "not a scale"),
        ("fox.safetensors:1e999", "not a scale"),
        ("fox.safetensors:101", "not a scale between -100 and 100"),
        ("fox.safetensors:0,8", "not a scale"),
        ("someone/fox:0.8:x", "not a scale"),
        ("owner", "is a folder"),
        ("absent.safetensors", "does not exist"),
        ("loras/absent.safetensors:0.5", "does not exist"),
        ("./someone/fox", "does not exist"),
        ("someone/fox/sub", "does not exist"),
        ("someone/fox/a.bin", "pickle"),
        ("https://huggingface.co/someone/fox", "is an address"),
        ("x" * 5000, "does not exist"),
        ("a\0b", "does not exist"),
    ],
)
def test_what_names_no_lora_is_refused_with_the_form(here, text, says):
    with pytest.raises(UsageError) as caught:
        parse_lora(text)
    assert says in caught.value.message
    assert caught.value.hint
    assert len(caught.value.message) < 400
