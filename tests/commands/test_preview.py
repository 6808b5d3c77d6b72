"""What someone at a terminal sees of `sana generate`: bars that go, results that stay, pictures."""

import base64
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from terminal import at_terminal, screen

PROMPT = "a red circle on a blue background"
FAST = ("-m", "demo", "-r", "256", "-s", "7", "--steps", "4", "-f")
# What a terminal of the tests' own is to be known by, and no other.
KNOWN_BY = ("NO_COLOR", "COLORTERM", "TMUX", "STY", "TERM_PROGRAM", "LC_TERMINAL", "COLUMNS")
TRUE_COLOR = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
CODES = (b"\033_G", b"\033]1337", "▀".encode())


@pytest.fixture
def environment(monkeypatch):
    """The environment of a terminal that says only what is given of itself."""

    def make(**known: str) -> dict[str, str]:
        prefixes = ("KITTY", "KONSOLE", "ITERM")
        rest = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
        return {k: v for k, v in rest.items() if k not in KNOWN_BY} | known

    return make


def drawn(folder: Path) -> np.ndarray:
    with Image.open(folder / "a.png") as image:
        return np.asarray(image.convert("RGB")).astype(int)


def blocks(seen: bytes) -> np.ndarray:
    """The pixels (height, width, 3) of half-blocks in 24-bit colours."""
    cell = re.compile(r"\033\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m(▀+)")
    rows = []
    for line in seen.decode().splitlines():
        cells = [[int(x) for x in m.groups()[:6]] for m in cell.finditer(line) for _ in m[7]]
        if cells:
            rows += [[c[:3] for c in cells], [c[3:] for c in cells]]
    return np.array(rows)


@pytest.mark.parametrize("width", [80, 120])
def test_bars_go_and_results_stay(quick, environment, tmp_path, width):
    command = [quick / "sana", "generate", "a fox", "an owl", *FAST, "-n", "2"]
    code, seen, _ = at_terminal(command, width, cwd=tmp_path, env=environment(**TRUE_COLOR))
    assert code == 0
    assert b"denoise" in seen
    assert "━".encode() in seen
    names = [f"{slug}-{seed}.png" for slug in ("a-fox", "an-owl") for seed in (7, 8)]
    assert screen(seen)[-4:] == names
    assert screen(seen)[0] == "2 prompts, 4 images"
    assert screen(seen)[1].startswith("model demo")
    assert max(map(len, screen(seen))) <= width


def test_a_batch_leaves_its_results_too(quick, environment, tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\nan owl\n")
    command = [quick / "sana", "batch", "prompts.txt", "-m", "demo", "-o", "out", "--steps", "3"]
    code, seen, _ = at_terminal(command, cwd=tmp_path, env=environment(**TRUE_COLOR))
    assert code == 0
    left = screen(seen)
    assert [line.split("-")[0] for line in left if line.startswith("out/")] == ["out/a", "out/an"]


def test_half_blocks_show_the_picture(quick, environment, tmp_path):
    command = [quick / "sana", "generate", PROMPT, *FAST, "-o", "a.png", "--preview"]
    code, seen, _ = at_terminal(command, cwd=tmp_path, env=environment(**TRUE_COLOR))
    assert code == 0
    shown = blocks(seen)
    assert shown.shape == (160, 40, 3)  # three estimates, and the picture drawn over them
    shown = shown[-40:]  # a square in 20 lines, so that 4 of 24 are left
    small = Image.fromarray(drawn(tmp_path).astype(np.uint8)).resize((40, 40))
    assert np.array_equal(shown, np.asarray(small))
    assert screen(seen)[-1] == "a.png"
    assert sum("▀" in line for line in screen(seen)) == 20


def test_half_blocks_fit_a_narrow_terminal(quick, environment, tmp_path):
    command = [quick / "sana", "generate", PROMPT, *FAST, "-o", "a.png", "--preview"]
    code, seen, _ = at_terminal(command, 30, 50, cwd=tmp_path, env=environment(**TRUE_COLOR))
    assert code == 0
    assert blocks(seen).shape == (120, 30, 3)


@pytest.mark.parametrize(
    ("known", "pattern"),
    [
        ({"TERM": "xterm-kitty"}, rb"\033_G([^;]*);([^\033]*)\033\\"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, rb"\033\]1337;([^:]*):(.*?)\a"),
    ],
    ids=["kitty", "iterm2"],
)
def test_a_terminal_with_a_protocol_is_sent_the_picture_itself(
    quick, environment, tmp_path, known, pattern
):
    command = [quick / "sana", "generate", PROMPT, *FAST, "-o", "a.png", "--preview"]
    code, seen, results = at_terminal(
        command, results=False, cwd=tmp_path, env=environment(**known)
    )
    assert (code, results) == (0, b"a.png\n")
    keys, parts = zip(*re.findall(pattern, seen), strict=True)
    starts = [i for i, key in enumerate(keys) if key.startswith((b"a=T", b"File="))]
    assert len(starts) == 4  # three estimates, then the picture
    assert seen.count(b"\033[20A") == 3
    keys, parts = keys[starts[-1] :], parts[starts[-1] :]
    with Image.open(io.BytesIO(base64.b64decode(b"".join(parts)))) as image:
        assert np.array_equal(np.asarray(image), drawn(tmp_path))
    if known["TERM"] == "xterm-kitty":
        assert keys[0] == b"a=T,f=100,r=20,q=2,m=1"
        assert set(keys[1:-1]) <= {b"q=2,m=1"}
        assert keys[-1] == b"q=2,m=0"
        assert max(map(len, parts)) == 4096
    else:
        assert keys[0].startswith(b"File=inline=1;size=")
    assert "▀".encode() not in seen


@pytest.mark.parametrize("word", ["--json", "-q", "--no-preview"])
def test_no_picture_for_programs_and_the_quiet(quick, environment, tmp_path, word):
    command = [quick / "sana", "generate", PROMPT, *FAST, "--preview", word]
    kitty = environment(TERM="xterm-kitty")
    code, seen, results = at_terminal(command, results=False, cwd=tmp_path, env=kitty)
    assert code == 0
    assert not any(mark in seen + results for mark in CODES)
    if word == "-q":
        assert seen == b""


def test_never_in_a_pipe(quick, environment, tmp_path):
    command = [quick / "sana", "generate", PROMPT, *FAST, "-o", "a.png", "--preview"]
    believed = environment(TERM="xterm-kitty", FORCE_COLOR="1")
    done = subprocess.run(command, cwd=tmp_path, env=believed, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, b"a.png\n")
    assert not any(mark in done.stderr for mark in CODES)
    assert b"no preview: stderr is not a terminal" in done.stderr


def test_without_colour_there_are_no_blocks(quick, environment, tmp_path):
    command = [quick / "sana", "generate", PROMPT, *FAST, "--preview", "--no-color"]
    code, seen, _ = at_terminal(command, cwd=tmp_path, env=environment(**TRUE_COLOR))
    assert code == 0
    assert "no preview: " in " ".join(screen(seen))
    assert "▀".encode() not in seen


def test_it_is_imported_only_when_it_is_asked_for(sana, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "sana_cli.commands._preview", raising=False)
    assert sana("generate", PROMPT, *FAST, "-o", str(tmp_path / "a.png")).code == 0
    assert "sana_cli.commands._preview" not in sys.modules
