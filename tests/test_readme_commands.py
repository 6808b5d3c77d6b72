"""The commands, the Python and the links of every README.md work as they are printed."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from sana_cli.app import command

ROOT = Path(__file__).resolve().parents[1]
RUN = {"cwd": ROOT, "capture_output": True, "check": True, "text": True}
LISTING = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*README.md"]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in subprocess.run(LISTING, **RUN).stdout.splitlines()
}
BLOCKS = {name: re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL) for name, text in PAGES.items()}
TINY = ("-m", "demo", "--res", "256", "--steps", "1", "--seed", "7")
PYTHON = [text for kind, text in BLOCKS["README.md"] if kind == "python"]


def test_the_front_page_is_short_and_begins_with_the_two_commands_of_setting_up():
    (kind, install), (_, test) = BLOCKS["README.md"][:2]
    assert kind == "sh"
    assert install.strip() == (
        'python -m pip install . && sana generate "a red circle on a blue background" --model demo'
    )
    assert test.strip() == 'python -m pip install -e ".[test]" && pytest -n auto'
    assert len(PAGES["README.md"].splitlines()) <= 220


def commands_of(line: str) -> list[list[str]]:
    """The words of each `sana` command of a line of shell, without redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if re.fullmatch(r"[|&;<>()]+", word):
            found.append([])
        else:
            found[-1].append(word)
    return [words[1:] for words in found if words and words[0] == "sana"]


def every_command() -> list[str]:
    """Each `sana` command of every page, but for those that tests/batch runs as one script."""
    lines = [
        line
        for name, blocks in BLOCKS.items()
        if name != "sana_cli/batch/README.md"
        for kind, text in blocks
        if kind == "sh"
        for line in text.replace("\\\n", " ").splitlines()
    ]
    return list(dict.fromkeys(shlex.join(words) for line in lines for words in commands_of(line)))


@pytest.fixture
def folder(tmp_path, monkeypatch, machine) -> Path:
    """A working folder with the files that the pages name, but for images of `sana` itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SANA_CONFIG", str(tmp_path / "config.toml"))
    Image.new("RGB", (512, 512), "teal").save("fox.jpg")
    Image.new("RGB", (1024, 1024)).save("edges.png")
    to_q = "transformer.transformer_blocks.0.attn1.to_q"
    factors = {"A": np.ones((4, 1152), "f4"), "B": np.ones((1152, 4), "f4")}
    save_file({f"{to_q}.lora_{k}.weight": v for k, v in factors.items()}, "style.safetensors")
    Path("runs/lora").mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks" / "gallery" / "blueprint.safetensors", "runs/lora")
    mask = Image.new("L", (512, 512))
    mask.paste(255, (64, 64, 192, 192))
    mask.save("mask.png")
    Path("circles.txt").write_text("a {red|green|blue} circle on white\n")
    return tmp_path


@pytest.mark.parametrize("line", every_command())
def test_every_command_works(line, folder, sana):
    """What draws is planned, short commands run, and those that download or measure are parsed."""
    verb, *words = shlex.split(line)
    if "fox-7.png" in words or "*.png" in words:
        run = sana("generate", "a red ring", *TINY, "-o", "fox-7.png")
        assert run.code == 0, run.err
        words = ["fox-7.png" if word == "*.png" else word for word in words]
    if verb == "generate" and "--server" not in words:
        words = ["a red ring" if word == "-" and at == 0 else word for at, word in enumerate(words)]
        run = sana(verb, *words, "--dry-run", "--offline")
        assert run.code in (0, 5), run.err  # 5: its model is not on this machine
        assert run.code == 0 or "demo" not in words
    elif verb in ("config", "info") or (verb == "batch" and words[0] != "status"):
        more = ["--check"] if verb == "batch" else []
        run = sana(verb, *words, *more)
        assert run.code == 0, run.err
    else:
        parse([verb, *words])


def parse(words: list[str]) -> None:
    """click.UsageError for a verb, an option or a value that does not exist."""
    verb = command()
    while isinstance(verb, click.Group):
        verb, words = verb.commands[words[0]], words[1:]
    verb.make_context("sana", list(words))


def test_the_python_of_the_front_page_draws_what_diffusers_draws(tmp_path, monkeypatch):
    """Both examples, in fewer steps: to one level on all but 0.1 % of the values."""
    monkeypatch.chdir(tmp_path)
    Path("sana_cli").symlink_to(ROOT / "sana_cli")
    for text in PYTHON:
        text = text.replace("seed=7", "seed=7, steps=4")
        text = text.replace("height=512", "num_inference_steps=4, height=512")
        exec(compile(text, "README.md", "exec"), {})
    ours, theirs = (
        np.asarray(Image.open(name), int) for name in ("circle.png", "circle-diffusers.png")
    )
    assert np.mean(np.abs(ours - theirs) > 1) < 0.001


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(name):
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", PAGES[name]):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


def test_every_module_that_a_page_names_exists():
    """`file.py` anywhere in the tree, but for `X.py`, which stands for any."""
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], **RUN).stdout.split()
    for name, text in PAGES.items():
        for file in re.findall(r"`([\w./-]+\.py)`", text):
            found = any(f"/{path}".endswith(f"/{file.lstrip('./')}") for path in tracked)
            assert found or Path(file).name.startswith("X"), f"{file} in {name}"
