"""The vocabulary of the bundled model is that of the captions."""

from pathlib import Path

from training.vocabulary import as_json, vocabulary
from training.world import World

DEMO = Path(__file__).resolve().parents[2] / "sana_cli" / "demo"


def test_the_bundled_vocabulary_is_that_of_the_captions():
    assert (DEMO / "vocabulary.json").read_text() == as_json(vocabulary(World()))
