"""What someone at a shell sees of `sana doctor`, on this machine and on poorer ones."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sana_cli.commands.doctor import _has_token, _lines
from sana_cli.system.inventory import image_protocol
from sana_cli.weights.catalogue import known_models
from sana_cli.weights.layout import CONFIGS


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One for all tests here, as the first call measures this machine."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SANA_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def examine(cache, program):
    """Run `sana doctor --json` with environment variables, in a new interpreter after `code`."""

    def run(*words: str, code: str = "", **variables: str) -> tuple[dict, str]:
        start = f"{code}\nimport sys\nsys.argv[0] = 'sana'\nfrom sana_cli.app import main\nmain()"
        command = [sys.executable, "-P", "-c", start] if code else [program]
        done = subprocess.run(
            [*command, "doctor", "--json", *words],
            capture_output=True,
            text=True,
            timeout=60,
            env={k: v for k, v in os.environ.items() if not k.startswith("HF_")} | variables,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    return run


@pytest.fixture(scope="module")
def facts(examine, tmp_path_factory) -> dict:
    home = tmp_path_factory.mktemp("home")
    return examine(HF_HOME=str(home / "hf"), SANA_DATA_DIR=str(home / "data"))[0]


def test_it_tells_how_fast_products_are(facts, cache):
    if facts["products"] is None:
        pytest.skip("this torch has no oneDNN beside MKL")
    kept = json.loads((cache / "packing.json").read_text())
    assert [facts["products"][way] for way in ("onednn", "packed", "mkl")] in [
        rates[:3] for rates in kept.values()
    ]


def test_it_tells_what_torch_tells(facts):
    assert facts["torch"]["version"] == torch.__version__
    assert facts["cpu"]["kernels"] == torch.backends.cpu.get_cpu_capability()
    assert facts["cpu"]["cores"] >= 1
    cuda = [row for row in facts["devices"] if row["device"].startswith("cuda")]
    assert len(cuda) == torch.cuda.device_count()
    for row in cuda:
        assert 0 < row["free_bytes"] <= row["total_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_what_the_system_counts(facts):
    memory = facts["memory"]
    assert memory["total_bytes"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory["available_bytes"] < memory["total_bytes"]


def test_it_tells_where_weights_lie_without_making_the_folder(facts):
    hub = facts["hub"]
    assert hub["cache"].endswith("/hf/hub")
    assert (hub["exists"], hub["used_bytes"]) == (False, 0)
    assert not Path(hub["cache"]).exists()
    assert hub["free_bytes"] > 0
    assert hub["symlinks"] is True
    assert Path(hub["lock"]).name == "weights.lock.json"
    assert (hub["offline"], hub["endpoint"], hub["token"]) == (False, None, False)


def test_it_tells_what_is_kept_of_texts(examine, tmp_path, cache):
    (cache / "text").mkdir()
    (cache / "text" / "a.safetensors").write_bytes(bytes(1234))
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    facts, _ = examine(HF_HOME=str(tmp_path / "hf"))
    assert facts["text_cache"] == {"folder": str(cache), "used_bytes": size}


def test_it_lists_every_model_and_finds_the_bundled_one(facts):
    here = {row["name"]: row["cached"] for row in facts["models"]}
    assert list(here) == list(known_models())
    assert [name for name, cached in here.items() if cached] == ["demo"]


def test_the_command_it_recommends_can_be_run(facts, program, tmp_path):
    command = facts["next"]["command"]
    assert facts["next"]["reason"]
    if not facts["devices"]:
        assert command == 'sana generate "a red circle on a blue background" --model demo'
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    line = f"{command} --dry-run" if " generate " in command else "true"
    environment = os.environ | {"PATH": path}
    done = subprocess.run(["sh", "-ec", line], capture_output=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_it_predicts_how_long_an_image_of_each_model_that_fits_takes(facts):
    for row in facts["models"]:
        found = row["expected_time"]
        assert (found is None) == (row["fits"] == "no")
        assert found is None or (found["seconds"] > 0 and not found["measured"])


def test_switches_are_shown_and_secrets_are_not(examine, tmp_path):
    facts, _ = examine(
        HF_HOME=str(tmp_path),
        HF_HUB_OFFLINE="1",
        HF_TOKEN="hf_secret",
        HF_ENDPOINT="https://fox:secret@mirror.invalid/hub",
    )
    hub = facts["hub"]
    assert hub["variables"] == {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    assert (hub["offline"], hub["token"]) == (True, True)
    assert hub["endpoint"] == "https://mirror.invalid/hub"
    assert "secret" not in json.dumps(facts)


@pytest.mark.parametrize(("text", "is_there"), [("hf_secret\n", True), (" \n", False)])
def test_a_stored_token_is_told_without_asking_the_hub(monkeypatch, tmp_path, text, is_there):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "token"
    assert not _has_token(file)
    file.write_text(text)
    assert _has_token(file) == is_there


def test_a_model_that_was_fetched_is_found_and_recommended(examine, tmp_path):
    """Its files are as small as they come: what is looked at are names and the hub's sizes."""
    model = known_models()["sana-0.6b-512"]
    for source in model.sources:
        folder = tmp_path / "hub" / f"models--{source.repo.replace('/', '--')}" / "snapshots"
        for name in source.folders:
            part = folder / source.revision / name
            part.mkdir(parents=True, exist_ok=True)
            stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
            for file in CONFIGS[name]:
                (part / file).write_text("{}")
            (part / f"{stem}.{source.variants[0]}.safetensors").write_bytes(bytes(1000))
    facts, _ = examine(HF_HOME=str(tmp_path), SANA_DATA_DIR=str(tmp_path / "data"))
    cached = [row["name"] for row in facts["models"] if row["cached"]]
    assert cached == ["demo", "sana-0.6b-512"]
    assert facts["hub"]["used_bytes"] >= 3000
    assert facts["next"]["command"] == 'sana generate "a red fox in snow" --model sana-0.6b-512'


def test_without_torch_it_says_so_and_how_to_get_it(examine, tmp_path):
    facts, _ = examine(code="import sys; sys.modules['torch'] = None", HF_HOME=str(tmp_path))
    assert (facts["torch"], facts["cpu"], facts["devices"]) == (None, None, None)
    assert "torch cannot be imported" in facts["problems"][0]
    assert facts["next"]["command"].startswith("python -m pip install")
    assert facts["hub"] and facts["models"]
    shown = dict(_lines(facts))
    assert "models" in shown and "fits" not in shown


@pytest.mark.parametrize("lock", ["{", "[]", '{"a": 1}'])
def test_a_broken_lock_and_a_broken_cache_do_not_stop_it(examine, tmp_path, lock):
    (tmp_path / "weights.lock.json").write_text(lock)
    (tmp_path / "hub").write_text("a file")
    variables = {"HF_HUB_CACHE": str(tmp_path / "hub"), "SANA_DATA_DIR": str(tmp_path)}
    facts, err = examine("--verbose", **variables)
    assert facts["models"] is None
    assert facts["hub"]["used_bytes"] is None
    assert "which models are here cannot be told: is the lock file broken?" in facts["problems"]
    assert "models: SanaError" in err
    assert facts["torch"]


@pytest.mark.skipif(sys.platform == "win32", reason="puts a shell script in the driver's place")
def test_a_driver_that_torch_cannot_use_is_a_problem(examine, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this torch can use it")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 570.86.10\n")
    program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    facts, _ = examine(PATH=path, HF_HOME=str(tmp_path))
    assert facts["nvidia_driver"]
    assert "there is an NVIDIA driver, but" in facts["problems"][0]
    if not torch.backends.cuda.is_built():
        assert "built for the CPU only" in facts["problems"][0]
        assert "install torch with CUDA first: https://" in facts["problems"][0]


def test_it_opens_no_connection(examine, tmp_path):
    code = """
import socket
def refuse(*words, **options):
    raise SystemExit("the network was used")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""
    facts, _ = examine(code=code, HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9")
    assert facts["hub"]["endpoint"] == "http://127.0.0.1:9"


def test_it_imports_torch_and_nothing_else_that_is_heavy(examine, tmp_path):
    code = """
import atexit, sys
def show():
    heavy = "torch transformers diffusers bitsandbytes triton tokenizers PIL scipy httpx2"
    print("imported:", *(name for name in heavy.split() if name in sys.modules), file=sys.stderr)
atexit.register(show)
"""
    _, err = examine(code=code, HF_HOME=str(tmp_path))
    assert err.splitlines()[-1] == "imported: torch"


def test_people_get_aligned_lines_with_the_next_command_last(sana):
    run = sana("doctor")
    assert (run.code, run.err) == (0, "")
    lines = run.out.splitlines()
    assert all(line[11] == " " != line[12] for line in lines)
    names = [line[:12].strip() for line in lines]
    assert "fits" in names
    assert names[:4] == ["sana", "system", "torch", "cpu"]
    assert names[-2:] == ["next", ""]
    if not torch.cuda.is_available():
        assert "kernels     torch path: there is no Triton for" in run.out
    assert "None" not in run.out and "\x1b" not in run.out


@pytest.mark.parametrize(
    ("environment", "protocol", "reason"),
    [
        ({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}, "kitty", "TERM is xterm-kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty", "TERM is xterm-ghostty"),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "230800"}, "kitty", "KONSOLE_VERSION"),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "210401"}, None, "older than 22.04"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2", "iTerm.app"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2", "WezTerm"),
        ({"TERM": "foot"}, "sixel", "TERM is foot"),
        ({"TERM": "xterm-256color"}, None, "no other variable names a protocol"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, None, "inside tmux"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux-0/default,1,0"}, None, "inside tmux"),
        ({}, None, "TERM is not set"),
    ],
)
def test_the_terminals_pictures_are_told_from_its_environment(environment, protocol, reason):
    found, because = image_protocol(environment, is_terminal=True)
    assert found == protocol
    assert reason in because
    assert image_protocol(environment, is_terminal=False) == (None, "stdout is not a terminal")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs POSIX terminals")
def test_on_a_terminal_it_knows_colour_width_and_pictures(program, tmp_path):
    leader, follower = os.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TMUX", "STY")}
    done = subprocess.run(
        [program, "doctor"],
        stdout=follower,
        stderr=subprocess.PIPE,
        env=environment | {"TERM": "xterm-kitty", "COLUMNS": "120", "HF_HOME": str(tmp_path)},
        timeout=60,
    )
    os.close(follower)
    time.sleep(0.1)
    shown = os.read(leader, 100_000).decode()
    os.close(leader)
    assert done.returncode == 0, done.stderr
    assert "120 columns, pictures kitty: TERM is xterm-kitty" in shown
    assert "\x1b[" in shown
