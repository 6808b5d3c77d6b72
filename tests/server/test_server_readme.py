"""The commands of the server's README do what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import sana_cli.server

README = Path(sana_cli.server.__file__).with_name("README.md")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
SHELL = [text for kind, text in BLOCKS if kind == "sh"]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]


@pytest.fixture
def here(served, tmp_path, monkeypatch):
    """A folder with what the commands use, and a server; what a command is for the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    (tmp_path / "prompts.txt").write_text("a blue star\n")
    Image.new("RGB", (256, 256), (200, 30, 30)).save("circle.png")
    Image.new("L", (256, 256), 255).save("mask.png")
    monkeypatch.setenv("SANA_STEPS", "2")
    monkeypatch.setenv("SANA_RES", "256")

    def command(text: str) -> str:
        text = text.replace("http://127.0.0.1:7262", served.url)
        return text.replace('"num_inference_steps": 8', '"num_inference_steps": 3').replace(
            "-F mask", "-F steps=2 -F mask"
        )

    return command


@pytest.mark.parametrize("text", SHELL[1:], ids=lambda text: text.split()[0] + str(len(text)))
def test_a_shell_command(here, text):
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", here(text)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert '"error"' not in run.stdout
    with Image.open("circle.png") as image:
        assert image.size == (256, 256)


def test_the_openai_client(here):
    (text,) = PYTHON
    run = subprocess.run([sys.executable, "-c", here(text)], capture_output=True, text=True)
    assert run.stdout.split() == [
        *["image_generation.partial_image"] * 2,
        "image_generation.completed",
    ], run.stderr


def test_the_words_of_the_unit_are_options(process, tmp_path):
    (unit,) = (text for kind, text in BLOCKS if kind == "ini")
    words = re.search(r"ExecStart=\S+ serve (.*)", unit)[1].split()
    options = {word for word in words if word.startswith("--")}
    described = process("serve", "--help-all").stdout.decode()
    assert options <= set(re.findall(r"--[a-z-]+", described))
