"""What the Tab key offers, asked for in the way that the shells ask."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sana_cli.weights.catalogue import known_models

BIN = Path(sys.executable).parent
HUB = [model.name for model in known_models().values() if model.sources]


def offered(line: str, folder: Path, **environment: str) -> list[str]:
    """What bash would show for a line with the cursor at its end."""
    asked = {"_SANA_COMPLETE": "complete_bash", "COMP_WORDS": line}
    asked["COMP_CWORD"] = str(len(shlex.split(line)) - (not line.endswith(" ")))
    done = subprocess.run(
        [BIN / "sana"],
        cwd=folder,
        env=os.environ | asked | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_generate_offers_every_model(tmp_path):
    assert offered("sana generate --model ", tmp_path) == list(known_models())
    assert offered("sana generate 'a fox' -m sana-sp", tmp_path) == [
        "sana-sprint-0.6b",
        "sana-sprint-1.6b",
    ]


def test_generate_offers_folders_that_hold_a_model(tmp_path):
    for name in ("my-sana", "my-music"):
        (tmp_path / name).mkdir()
    (tmp_path / "my-sana" / "model_index.json").write_text("{}")
    assert offered("sana generate -m my", tmp_path) == ["my-sana"]
    # Of a path nothing is offered: then the shell completes it by itself.
    assert offered("sana generate -m ./my", tmp_path) == []


@pytest.mark.parametrize("verb", ["pull", "rm", "verify"])
def test_models_offers_those_of_the_hub(tmp_path, verb):
    assert offered(f"sana models {verb} ", tmp_path) == HUB
    assert offered(f"sana models {verb} demo sana1.5-4", tmp_path) == ["sana1.5-4.8b-1024"]


def test_completing_imports_nothing_heavy(tmp_path):
    spy = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=open('seen', 'w')))"
    (tmp_path / "sitecustomize.py").write_text(spy)
    assert offered("sana generate -m d", tmp_path, PYTHONPATH=str(tmp_path)) == ["demo"]
    seen = (tmp_path / "seen").read_text().split()
    assert "sana_cli.commands._completion" in seen
    assert not {"torch", "numpy", "PIL", "huggingface_hub", "rich.progress"} & set(seen)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_script_that_is_installed_works_in_bash(tmp_path):
    script = """
        eval "$(sana --show-completion)"
        complete -p sana >&2
        COMP_WORDS=(sana models pull sana-sprint) COMP_CWORD=3
        _sana_completion sana
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["sana-sprint-0.6b", "sana-sprint-1.6b"], done.stderr
    assert "-F _sana_completion sana" in done.stderr
