"""The command as a whole: start-up, help, streams, and the shape of the package."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from sana_cli import app
from terminal import at_terminal, screen

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "diffusers", "numpy", "PIL", "huggingface_hub")

# From top to bottom: a file may import those after it, not those before it. Kernels are one idea in
# two files each, X and X_triton, which name each other.
ORDER = """
    __main__ app
    commands: serve bench batch generate doctor models info config _bench_tables
              _batch_view _options _completion _preview _session _help _defaults
    server:   app access images_api page security service fields metrics gallery jobs loras errors
    api diffusers_compat
    ui
    batch:    run on_ray processes this_process recorder worker engine placement jobs rows templates
              manifest disk_store object_store store lines shards events
    bench:    run baseline competitor phases forecast counted roofline random_weights
    sheet
    remote session
    replay resolve
    pipeline: draw canvases guidance oom_retry plan peaks text_encoder weight_cache text_cache
              networks packing solver timings events
    images:   contact_sheet names masks files metadata other_tools a1111 claims formats profiles
    weights:  fetch lora download model_files single_file hub_cache checkpoint original_names
              lora_choice catalogue vocabulary config_files headers layout fingerprint
              tensor_cache
    models:   streaming.graphed_decoder streaming.autoencoder streaming.strip_pipeline
              streaming.layers fused_dit w8a8
              fused_controlnet fused_layers controlnet streaming.subpixel int8 cross_attention
              architectures streaming.ops cuda_graph dit gemma dc_ae
              configs
    kernels
    system:   devices memory inventory signals folders json_cache disk
    shapes recipe settings instruction decoding units reporter errors
"""


def places() -> dict[str, int]:
    """Of each module of ORDER, without `sana_cli.`, how many stand above it."""
    folder, found = "", {}
    for line in ORDER.strip().splitlines():
        head, colon, rest = line.partition(":")
        if colon:
            folder = f"{head.strip()}."
        elif not line.startswith(" " * 8):  # no going on of the line before
            folder = ""
        for name in (rest if colon else line).split():
            found[folder + name] = len(found)
    return found


PLACES = places()
FILES = sorted([*(ROOT / "sana_cli").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


@pytest.mark.parametrize(
    "words",
    [["--help"], ["generate", "--help"], ["bench", "--help"], ["serve", "--help"], ["--version"]],
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


def test_commands_that_only_read_import_nothing_heavy(tmp_path):
    """Where torch could find a GPU, what fits depends on it: then it is asked."""
    (tmp_path / "jobs.csv").write_text("prompt,seed\na red star,1\na ring,2\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    code = f"""
import sys
from sana_cli.app import main
from sana_cli.system.devices import _may_have_gpu

def run(code, *words, allowed=()):
    sys.argv = ["sana", *words]
    try:
        main()
    except SystemExit as stop:
        assert (stop.code or 0) == code, (words, stop.code)
    found = [name for name in {HEAVY!r} if name in sys.modules and name not in allowed]
    assert not found, (words, found)

run(0, "config", "path")
run(0, "batch", "jobs.csv", "--check", "-m", "demo", "--device", "cpu")
run(2, "batch", "jobs.csv", "--check", "-m", "demo", "--steps", "0")
run(2, "batch", "status", ".")
if not _may_have_gpu():
    run(0, "batch", "jobs.csv", "--check", "-m", "demo")
    run(0, "models", "list", "--json", allowed=("huggingface_hub",))  # its constants
run(1, "info", "plain.png", allowed=("huggingface_hub", "PIL"))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_a_plan_whose_peaks_are_kept_imports_no_torch(sana):
    words = ("generate", "a star", "-m", "demo", "-r", "256", "--device", "cpu", "--dry-run")
    first = sana(*words)
    code = f"""
import sys
sys.argv = ["sana", *{words!r}]
from sana_cli.app import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = [json.loads(text)["peak_bytes"] for text in (first.out, done.stdout)]
    assert peaks[0] == peaks[1]


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


def every_command(command, path=()):
    """Yield each command and group, with the words that lead to it."""
    yield path, command
    for name, one in getattr(command, "commands", {}).items():
        yield from every_command(one, (*path, name))


COMMANDS = dict(every_command(app.command()))


def test_every_option_has_help_and_a_name_for_its_value():
    for path, command in COMMANDS.items():
        assert command.help, path
        for parameter in command.params:
            if parameter.param_type_name == "option" and path:
                assert parameter.help, (path, parameter.name)
                assert parameter.is_flag or parameter.metavar, (path, parameter.name)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_is_read_at_80_columns(sana, monkeypatch, path):
    monkeypatch.setenv("COLUMNS", "80")
    shown = sana(*path, "--help").out
    assert "<bool>" not in shown
    options = shown.split("Options\n")[1].splitlines()
    assert max(map(len, options)) <= 80
    texts = [line for line in options if line.startswith(" " * 24)]
    assert not texts or max(map(len, texts)) > 60  # the text has more than half of the screen


@pytest.mark.parametrize("path", [("generate",), ("batch", "run"), ("serve",), ("bench",)])
def test_help_all_shows_every_option_and_help_those_for_every_day(sana, path):
    words = [word for word in path if word != "run"]
    everyday, whole = sana(*words, "--help").out, sana(*words, "--help-all").out
    names = {n.lstrip("-") for p in COMMANDS[path].params for n in p.opts if n.startswith("--")}
    assert not {name for name in names if name not in whole}
    assert "--help-all" in everyday
    assert "--memory" in whole
    assert "--memory" not in everyday
    assert len(everyday) < len(whole)


@functools.cache
def imported(path: Path) -> set[str]:
    """The modules that a file imports, and the names that it takes from them: dotted."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("sana_cli", *parts) if parts[0] == "kernels" else parts)


def place(name: str) -> int | None:
    """Of a module, or of a name in one; None for what is not ours, or a package's face."""
    short = name.removeprefix("sana_cli.")
    if short.split(".")[0] == "kernels":
        return PLACES["kernels"]
    return PLACES.get(short, PLACES.get(short.rpartition(".")[0]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    name = module(path)
    if name.endswith(".__init__"):  # a package's face, which says what it is for
        return
    mine = place(name)
    assert mine is not None, f"{name} has no place in ORDER"
    ours = {other for other in imported(path) if other.startswith("sana_cli.")}
    upwards = {other for other in ours if (at := place(other)) is not None and at < mine}
    assert not upwards


# What `sana bench --against` compares with; Ray, for `--engine ray`; and fsspec, which its clients
# of object stores bring.
OPTIONAL = {"diffusers", "transformers", "ray", "fsspec"}
MODULES = {"pillow": "PIL", "triton-windows": "triton"}  # elsewhere torch brings Triton


def test_whatever_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    declared = {MODULES.get(name, name.replace("-", "_")) for name in declared}
    declared -= {"python_multipart"}  # FastAPI imports it to read forms
    found = {name.split(".")[0] for path in FILES for name in imported(path)}
    ours = {"sana_cli", *sys.stdlib_module_names}
    assert found - ours - OPTIONAL == declared


def test_every_verb_is_one_file():
    """The others in the folder help them, and begin with an underscore."""
    files = {path.stem for path in (ROOT / "sana_cli/commands").glob("*.py")}
    verbs = {name for name in files if not name.startswith("_")}
    assert verbs == set(app.command().commands)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_top_knows_a_terminal(path):
    """Everything below reports to a `Reporter`, or yields events."""
    name = path.relative_to(ROOT).as_posix()
    tops = ("sana_cli/app.py", "sana_cli/ui.py", "kernels/aot.py")  # the last is a command itself
    if not name.startswith("sana_cli/commands/") and name not in tops:
        assert not {other.split(".")[0] for other in imported(path)} & {"rich", "typer", "click"}


def test_a_solver_sees_no_network():
    names = imported(ROOT / "sana_cli/pipeline/solver.py")
    assert not {name for name in names if name.startswith("sana_cli")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_ever_unpickled(path):
    source = path.read_text(encoding="utf-8")
    assert "torch.load" not in source
    assert not {name for name in imported(path) if name.split(".")[0] == "pickle"}


def test_a_prompt_without_a_verb_is_told_the_verb(sana):
    run = sana("a red fox")
    assert run.code == 2
    assert 'sana generate "a red fox"' in run.err
    assert "sana models --help" in sana("models", "bogus").err


@pytest.mark.parametrize("name", sorted(app.ELSEWHERE))
def test_an_option_of_another_tool_is_told_ours(sana, name):
    run = sana("generate", "a red fox", name, "4")
    assert run.code == 2
    (hint,) = (line for line in run.err.splitlines() if line.startswith("hint: here that is "))
    ours = re.findall(r"--[a-z]+", hint)
    assert ours or "the first word" in hint
    options = {word for p in app.command().commands["generate"].params for word in p.opts}
    assert set(ours) <= options


@pytest.mark.parametrize("words", [(), ("models",), ("config",)])
def test_a_command_alone_shows_its_help_and_no_error(sana, words):
    run = sana(*words)
    assert (run.code, run.err) == (2, "")
    assert re.search(f"Usage: .*{' '.join(('sana', *words))} ", run.out)


@pytest.mark.parametrize(
    "prompt", ["-a red circle", "--a red circle", "- a circle", "-qx circle", "-s of fog"]
)
def test_a_prompt_that_begins_with_a_dash_is_told_what_to_put_before_it(sana, prompt):
    run = sana("generate", prompt)
    assert run.code == 2
    assert run.err.splitlines()[1].startswith(
        "hint: before a prompt that begins with a dash put --"
    )


@pytest.mark.parametrize(
    "words", [("x", "--nope"), ("x", "--negative", "-x y", "--nope"), ("--negative", "-x y")]
)
def test_a_wrong_option_is_not_taken_for_a_prompt(sana, words):
    assert "begins with a dash" not in sana("generate", *words).err


@pytest.mark.parametrize("name", ["COLUMNS", "TERMINAL_WIDTH", "LINES"])
def test_a_width_of_zero_is_no_width(sana, monkeypatch, name):
    monkeypatch.setenv(name, "0")
    assert "error: no PROMPT is given" in sana("generate").err
    assert "demo" in sana("models", "list").out
    code = "import sys; sys.argv = ['sana', '--help']; from sana_cli.app import main; main()"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert 70 < max(map(len, done.stdout.splitlines())) <= 80


def test_a_terminal_that_says_its_width_is_zero_is_written_to_as_one_of_80_columns():
    command = [sys.executable, "-P", "-m", "sana_cli", "generate", "a fox", "--steps", "x"]
    code, seen, _ = at_terminal(command, 0, 0)
    assert code == 2
    assert "error: Invalid value for '--steps'" in "".join(screen(seen))


def test_waiting_threads_do_not_spin_unless_the_user_says_so():
    code = "import os, sana_cli; print(os.environ['OMP_WAIT_POLICY'])"
    for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        rest = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], env=rest | given, capture_output=True
        )
        assert done.stdout.decode().strip() == expected


def test_torch_is_loaded_after_its_threads_were_told_to_spin_no_more_than_microseconds():
    rest = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import sana_cli.pipeline.draw"],
        env=rest | {"OMP_DISPLAY_ENV": "verbose"},
        **{"capture_output": True, "text": True},
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch is not built with GNU's OpenMP")
    assert "GOMP_SPINCOUNT = '300'" in done.stderr
