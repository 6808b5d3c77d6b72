"""The commands of sana_cli/batch/README.md, run."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from batches import PROMPTS, pictures
from sana_cli.app import command

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "sana_cli/batch/README.md").read_text(encoding="utf-8")
SCRIPTING = PAGE.split("<!-- scripting -->")[1].split("<!-- /scripting -->")[0]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", SCRIPTING, re.DOTALL)


@pytest.fixture
def shell(quick):
    def run(text: str, **environment: str) -> subprocess.CompletedProcess:
        path = f"{quick}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, "PATH": path, **environment},
        )

    return run


@pytest.mark.exhaustive
@pytest.mark.skipif(not all(map(shutil.which, ("bash", "jq", "make"))), reason="needs jq and make")
def test_every_command_on_the_scripting_page_runs(shell, here):
    """In order, in one folder, as someone would who reads from top to bottom."""
    assert [kind for kind, _ in BLOCKS] == (
        ["sh"] * 7 + ["cron", "sh", "slurm", "ray", "s3", "make"]
    )
    outputs = []
    for kind, text in BLOCKS:
        if kind in ("ray", "s3"):  # run by test_on_ray.py and test_object_store.py, exhaustively
            continue
        # Fewer steps and pixels than the page, for time.
        text = text.replace("-m demo", "-m demo --steps 1 --res 256")
        if kind == "cron":
            (here / "images").mkdir()
            (here / "images/jobs.txt").write_text(PROMPTS[0])
            minute, hour, *days, command = text.split(None, 5)
            assert (minute, hour, days) == ("0", "2", ["*", "*", "*"])
            run = shell(command, HOME=str(here))
        elif kind == "slurm":
            tasks = re.search(r"--array=1-(\d+)", text)[1]
            for task in range(1, int(tasks) + 1):
                ids = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_MIN": "1"}
                run = shell(text, **ids, SLURM_ARRAY_TASK_COUNT=tasks)
        elif kind == "make":
            Path("Makefile").write_text(text)
            run = shell("make && make -q")
        else:
            run = shell(text)
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout)
    assert len(outputs[0].splitlines()) == 2
    assert outputs[1].splitlines()[0] == "4 jobs, 4 to draw into shapes"
    assert outputs[1].splitlines()[-1] == "4 done"
    assert outputs[2] == "shapes.webp\n" and Path("shapes/index.html").exists()
    assert outputs[3].splitlines()[0].startswith("table/Sun & Co/a-red-circle-on-white")
    assert outputs[4].count("rings-images/") == 2
    sums = subprocess.run(["sha256sum", "-c", "SHA256"], cwd="rings-images", capture_output=True)
    assert sums.returncode == 0
    assert outputs[5].count("drawn: hearts/") == 2
    assert (here / "images/batch.log").read_text().startswith("jobs-images/")
    images = pictures("shapes").keys() - {".done", "index.html"}
    assert pictures("shared").keys() == pictures("processes").keys() == images


@pytest.mark.parametrize(
    "path", sorted((ROOT / "sana_cli/batch/recipes").iterdir()), ids=lambda path: path.name
)
def test_a_recipe_for_a_cluster_names_options_that_exist(path):
    run = command().commands["batch"].commands["run"]
    options = {word for parameter in run.params for word in parameter.opts}
    (line,) = re.findall(r"^\W*(?:\w+: )?sana batch (.*)$", path.read_text(), re.MULTILINE)
    assert set(re.findall(r"(?<=\s)-[-a-z]+", f" {line}")) <= options
    if path.suffix == ".sh":
        assert subprocess.run(["bash", "-n", path]).returncode == 0
