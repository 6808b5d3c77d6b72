"""A batch that is killed at any place finishes when it is run again."""

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from batches import DEMO, PROMPTS, lines, pictures
from examples import exhaustive

KILLED = 256 - 9  # as forks.py tells SIGKILL


@pytest.fixture
def killed(quick):
    """Run the command in a process that is killed at a place or after a time; its exit code."""

    def run(*words: str, place: int = 0, seconds: float = 0) -> int:
        environment = dict(os.environ)
        if place:
            environment["SANA_TEST_KILL"] = str(place)
        if seconds:
            environment["SANA_TEST_KILL_AFTER"] = str(seconds)
        run = subprocess.run(
            [quick / "sana", *words], env=environment, stdout=subprocess.DEVNULL, timeout=60
        )
        return run.returncode

    return run


def inodes(folder: str) -> dict[str, int]:
    done = {line["path"] for line in lines_that_parse(folder) if line["status"] == "done"}
    return {name: (Path(folder) / name).stat().st_ino for name in done}


def lines_that_parse(folder: str) -> list[dict]:
    from sana_cli.batch.lines import read_lines

    path = Path(folder) / "manifest.jsonl"
    return read_lines(path.read_bytes())[0] if path.exists() else []


def assert_finished(folder: str, expected: dict[str, bytes], before: dict[str, int]) -> None:
    """Every picture once and whole, no other file; those that were there are the same files."""
    assert pictures(folder) == expected
    assert inodes(folder).items() >= before.items()
    assert sorted(line["path"] for line in lines(folder, "done")) == sorted(expected)


@pytest.mark.parametrize("every", [6, *exhaustive(1)])
def test_killed_at_any_change_it_makes_it_finishes_when_run_again(killed, here, every):
    Path("two.txt").write_text("\n".join(PROMPTS[:2]))
    call = ("batch", "two.txt", *DEMO, "-q")
    assert killed(*call) == 0
    expected = pictures("two-images")
    for place in range(1, 100, every):
        shutil.rmtree("two-images")
        code = killed(*call, place=place)
        if code == 0:
            break
        assert code == KILLED
        before = inodes("two-images") if Path("two-images").exists() else {}
        assert killed(*call) == 0
        assert_finished("two-images", expected, before)
    assert 10 < place < 40  # a line, a file and another line are several changes each


@pytest.mark.exhaustive
def test_killed_at_any_moment_again_and_again_it_finishes(killed, here):
    Path("many.txt").write_text("\n".join(f"{text} {i}" for text in PROMPTS for i in range(5)))
    call = ("batch", "many.txt", *DEMO, "-q")
    assert killed(*call, "-o", "whole") == 0
    expected = pictures("whole")
    chance = random.Random(0)
    kills = 0
    for _ in range(15):
        before = inodes("many-images") if Path("many-images").exists() else {}
        if killed(*call, seconds=chance.uniform(0.05, 0.5)) == 0:
            break
        kills += 1
        assert inodes("many-images").items() >= before.items()
    assert kills > 2
    assert killed(*call) == 0
    assert_finished("many-images", expected, before)
