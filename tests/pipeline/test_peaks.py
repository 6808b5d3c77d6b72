"""Peaks are counted once: what is kept on disk is found again, and never believed blindly."""

import json
from collections.abc import Callable

import pytest

from sana_cli.models.architectures import DC_AE_F32C32, GEMMA_2_2B
from sana_cli.models.gemma import peak_bytes
from sana_cli.pipeline import peaks
from sana_cli.pipeline.peaks import FILE, PeakCache
from sana_cli.system.memory import PeakMemory

TOKENS = 3
RIGHT = peak_bytes(GEMMA_2_2B, "float32", TOKENS)


@pytest.fixture(autouse=True)
def new_process() -> Callable[[], None]:
    """Forget what this process has counted."""
    PeakCache.counted.clear()
    return PeakCache.counted.clear


@pytest.fixture
def counts(monkeypatch) -> list[object]:
    """An item for every network that is run to count its memory."""
    found: list[object] = []
    enter = PeakMemory.__enter__
    monkeypatch.setattr(PeakMemory, "__enter__", lambda self: found.append(self) or enter(self))
    return found


def test_a_second_dry_run_counts_nothing_and_says_the_same(sana, counts, new_process):
    words = ("generate", "a fox", "-m", "demo", "--dry-run", "-s", "7")
    first = sana(*words)
    assert counts
    counts.clear()
    new_process()
    second = sana(*words)
    assert not counts
    stages = [json.loads(run.out)["peak_bytes"] for run in (first, second)]
    assert stages[0] == stages[1]
    sana(*words, "--dtype", "bfloat16")
    assert counts  # the same sizes in another precision
    counts.clear()
    new_process()
    sana(*words, "--no-cache")
    assert counts
    counts.clear()
    sana(*words, "--no-cache")
    assert not counts


def test_different_questions_have_different_answers(tmp_path, counts):
    cache = PeakCache(tmp_path)
    grid = (16, 16)
    asked = {
        cache.text_encoder(GEMMA_2_2B, "float32", TOKENS),
        cache.text_encoder(GEMMA_2_2B, "int8", TOKENS),
        cache.autoencoder(DC_AE_F32C32, "decoder", "float32", grid, 1 << 24),
        cache.autoencoder(DC_AE_F32C32, "encoder", "float32", grid, 1 << 24),
        cache.autoencoder(DC_AE_F32C32, "decoder", "float32", grid, 1 << 18),
    }
    assert len(asked) == 5
    assert len(json.loads((tmp_path / FILE).read_text())["peaks"]) == 5


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[1]",
        b"[" * 100_000,
        b'{"sources": 7}',
        b'{"sources": "%(mine)s"}',
        b'{"sources": "%(mine)s", "peaks": [1]}',
        b'{"sources": "%(mine)s", "peaks": {"%(key)s": "5"}}',
        b'{"sources": "%(mine)s", "peaks": {"%(key)s": -5}}',
        b'{"sources": "%(mine)s", "peaks": {"%(key)s": true}}',
        b'{"sources": "others", "peaks": {"%(key)s": 5}}',
    ],
)
def test_a_file_that_is_damaged_or_of_other_sources_is_replaced(tmp_path, content, new_process):
    PeakCache(tmp_path).text_encoder(GEMMA_2_2B, "float32", TOKENS)
    file = tmp_path / FILE
    whole = file.read_bytes()
    (key,) = json.loads(whole)["peaks"]
    names = {b"mine": peaks.sources().encode(), b"key": key.encode()}
    file.write_bytes(content % names if b"%" in content else content)
    new_process()
    assert PeakCache(tmp_path).text_encoder(GEMMA_2_2B, "float32", TOKENS) == RIGHT
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_reported(sana, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("SANA_CACHE_DIR", str(blocked))
    run = sana("generate", "a fox", "-m", "demo", "--dry-run")
    assert run.code == 0
    assert run.err.count(f"the cache in {blocked} cannot be written") == 1
    assert json.loads(run.out)["peak_bytes"]["decode"] > 0
