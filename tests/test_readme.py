"""What the README says is so."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.tables import BLOCK, TABLES, pages, rewritten

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def test_the_quick_start_is_the_first_two_code_blocks():
    (kind, install), (_, test) = BLOCKS[:2]
    assert kind == "sh"
    assert install.strip() == (
        'python -m pip install . && sana generate "a red circle on a blue background" --model demo'
    )
    assert test.strip() == 'python -m pip install ".[test]" && pytest -n auto'


PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in pages()}


@pytest.mark.parametrize("page", PAGES)
def test_every_generated_table_is_what_its_data_make(page):
    """`python -m benchmarks.tables` writes them."""
    assert rewritten(PAGES[page]) == PAGES[page]


def test_every_generated_table_is_on_a_page():
    found = {match["name"] for text in PAGES.values() for match in BLOCK.finditer(text)}
    assert found >= TABLES.keys()


def demo_commands() -> list[str]:
    lines = "\n".join(text for kind, text in BLOCKS[2:] if kind == "sh").splitlines()
    return [line for line in lines if line.startswith("sana generate") and " demo" in line]


@pytest.mark.parametrize("line", demo_commands())
def test_every_command_on_the_demo_runs(sana, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line.split(" > ")[0])[1:]
    run = sana(*words, "--dry-run")
    assert run.code == 0, run.err


def test_every_file_it_names_exists():
    tree = next(text for _, text in BLOCKS if text.startswith("sana_cli/app.py"))
    names = [line.split()[0] for line in tree.splitlines()]
    for name in names:
        head, _, tail = name.partition("{")
        parts = tail.rstrip(".py").rstrip("}").split(",") if tail else [""]
        for part in parts:
            assert (ROOT / f"{head}{part}{'.py' if tail else ''}").exists(), name
    for link in re.findall(r"\]\(((?!http|#)[^)]+)\)", README):
        assert (ROOT / link).exists(), link
