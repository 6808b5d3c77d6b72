"""The command as a whole: start-up, help, streams, and the shape of the package."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from sana_cli.app import ELSEWHERE, app

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "diffusers", "numpy", "PIL", "huggingface_hub")

# Lower layers never import higher ones. A module may import its own layer and any below.
LAYERS = [
    {"errors", "kernels", "store", "memory", "places", "graph"},
    {"shapes", "recipe", "solver", "device", "instruction", "signals", "layout", "settings"},
    {"configuration"},
    {"machine", "units"},
    {"rows", "templates", "shards"},
    {"weights", "dit", "dc_ae", "gemma"},
    {"checkpoint", "architectures", "hub_cache", "cross_attention", "strips", "int8", "text_cache"},
    {"metadata", "engine"},
    {"text_encoder", "images", "download", "sampling", "model_files"},
    {"names", "plan", "resolve", "replay", "manifest", "random_weights"},
    {"guidance", "roofline"},
    {"pipeline"},
    {"jobs", "events", "bench"},
    {"runner", "against"},
    {"ui", "preview"},
    {"commands"},
    {"app", "api"},
    {"__init__", "__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FILES = sorted([*(ROOT / "sana_cli").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


@pytest.mark.parametrize(
    "words", [["--help"], ["generate", "--help"], ["bench", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(words):
    code = f"""
import sys
sys.argv = ["sana", *{words!r}]
from sana_cli.app import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
found = [name for name in {HEAVY!r} if name in sys.modules]
assert not found, found
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sana" in done.stdout


def test_a_wrong_call_is_refused_before_torch_is_imported():
    code = """
import sys
sys.argv = ["sana", "generate", "a fox", "--res", "77q"]
from sana_cli.app import main
try:
    main()
except SystemExit as stop:
    assert stop.code == 2, stop.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words",
    [["nonsense"], ["generate"], ["generate", "x", "--nope"], ["generate", "x", "--steps", "a"]],
)
def test_a_call_that_cannot_be_parsed_is_one_line_and_a_hint(sana, words):
    run = sana(*words)
    assert (run.code, run.out) == (2, "")
    lines = run.err.splitlines()
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2


def test_every_option_has_help():
    for command in get_command(app).commands.values():
        assert command.help
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, f"{command.name} {parameter.name}"


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("sana_cli.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    mine = parts[0] if parts[0] == "kernels" else parts[1]
    assert mine in RANK, f"{mine} has no place in LAYERS"
    upwards = {name for name in imported(path) if name in RANK and RANK[name] > RANK[mine]}
    assert not upwards


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_ever_unpickled(path):
    source = path.read_text(encoding="utf-8")
    assert "torch.load" not in source
    assert "pickle" not in imported(path)


def test_a_prompt_without_a_verb_is_told_the_verb(sana):
    run = sana("a red fox")
    assert run.code == 2
    assert 'sana generate "a red fox"' in run.err
    assert "sana models --help" in sana("models", "bogus").err


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_an_option_of_another_tool_is_told_ours(sana, name):
    run = sana("generate", "a red fox", name, "4")
    assert run.code == 2
    (hint,) = (line for line in run.err.splitlines() if line.startswith("hint: here that is "))
    ours = re.findall(r"--[a-z]+", hint)
    assert ours or "the first word" in hint
    options = {word for p in get_command(app).commands["generate"].params for word in p.opts}
    assert set(ours) <= options
