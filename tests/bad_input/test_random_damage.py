"""Files that are damaged at random."""

import pytest
from hypothesis import given, settings

from faults import CONFIGS, DAMAGE, FAST, PARTS, damaged

FUZZ = settings(
    max_examples=settings.default.max_examples // 4,
    derandomize=True,
    database=None,
)


def assert_survives(sana, *words: str) -> None:
    run = sana("generate", "a fox", *words, "-o", "fox.png", "-f")
    assert run.code in (0, 1, 2, 7), run.err
    assert "Traceback" not in run.err and "panicked" not in run.err, run.err
    assert len([line for line in run.err.splitlines() if line.startswith("error:")]) == bool(
        run.code
    )
    assert bool(run.out) == (run.code == 0)


@pytest.mark.hypothesis
@pytest.mark.parametrize("config", CONFIGS)
def test_random_damage_to_a_config_is_survived(sana, model, config):
    original = (model / config).read_bytes()
    # What the plan reads is not drawn: a digit more in a size would take minutes and gigabytes.
    draws = config.startswith(("text_encoder", "tokenizer"))
    words = ("-m", str(model), *FAST, *(() if draws else ("--dry-run",)))

    @FUZZ
    @given(DAMAGE)
    def survives(damage):
        (model / config).write_bytes(damaged(original, damage, len(original)))
        assert_survives(sana, *words)

    survives()


@pytest.mark.hypothesis
@PARTS
def test_random_damage_to_a_weight_header_is_survived(sana, model, part):
    original = (model / part).read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    (model / part).unlink()

    @FUZZ
    @given(DAMAGE)
    def survives(damage):
        (model / part).write_bytes(damaged(original, damage, header))
        assert_survives(sana, "-m", str(model), *FAST)

    survives()
