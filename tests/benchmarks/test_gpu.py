"""The command that measures a GPU, rehearsed on the CPU so that no part of it can be broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import CHECKS, SECTIONS
from examples import exhaustive

ROOT = Path(__file__).resolve().parents[2]


def rehearse(out: Path, *words: str) -> tuple[list[dict], subprocess.CompletedProcess]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick"]
    command += ["--out", str(out), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = (out / "gpu.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], done


def test_every_section_has_its_time_and_all_of_them_take_less_than_nine_minutes():
    assert CHECKS.keys() == SECTIONS.keys()
    assert sum(SECTIONS.values()) < 540


@pytest.mark.parametrize(
    "name",
    ["strips", *exhaustive(*(name for name in SECTIONS if name != "strips"))],
)
def test_a_section_runs_to_its_end_and_its_rows_make_a_table(tmp_path, name):
    if name in ("selfcheck", "kernels"):
        pytest.importorskip("triton")
    if name in ("likeness", "competitor"):
        pytest.importorskip("diffusers")
    rows, done = rehearse(tmp_path, "--only", name)
    assert done.returncode == 0, done.stderr
    (section,) = [row for row in rows if row["section"] == "section"]
    log = (tmp_path / "gpu.log").read_text(encoding="utf-8")
    assert (section["name"], section["state"]) == (name, "done"), log
    assert section["rows"] > 0
    assert name in done.stdout.splitlines()[-2]


def test_a_section_that_fails_is_told_and_the_others_run(tmp_path):
    """Here all do, as they are started in a folder without their code."""
    code = """
import sys
import benchmarks.gpu.__main__ as gpu
gpu.run_section.__globals__["ROOT"] = sys.argv.pop(1)
gpu.main()
"""
    words = [sys.executable, "-c", code, str(tmp_path), "--device", "cpu", "--quick"]
    words += ["--out", str(tmp_path / "out"), "--only", "strips", "profile"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    states = [line.split(",")[0] for line in done.stderr.splitlines() if ": " in line]
    assert states == [f"{name}: failed with exit code 1" for name in ("strips", "profile")]
