"""The words that the bundled model knows, and the warning for those that it does not."""

import json
import shutil

import pytest

from sana_cli.weights.layout import folder_parts
from sana_cli.weights.vocabulary import unknown_words, vocabulary, words

WARNING = "warning: demo was not trained on "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Hot-Air balloon, over the sea!", ["a", "hot-air", "balloon", "over", "the", "sea"]),
        ("snow-capped; 3 “birds”", ["snow-capped", "3", "birds"]),
        ("the cat's café", ["the", "cat's", "café"]),
        ("狐狸 on_white", ["狐狸", "on", "white"]),
        (" - ,;:", []),
    ],
)
def test_words_are_what_is_between_spaces_and_marks(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize(
    ("call", "unknown"),
    [
        (["A red circle, left of a blue star."], None),
        (["a dragon over a city", "a city and a Dragon"], '"dragon", and'),
        (["a circle", "--negative", "blurry"], '"blurry", and'),
        (["b c d e f g h i j k"], '"b", "c", "d", "e", "f", "g", "h", "j" and 1 more, and'),
    ],
)
def test_words_that_demo_does_not_know_are_warned_of(sana, tmp_path, call, unknown):
    drawn = ("-m", "demo", "--res", "256", "--steps", "1", "-s1", "-o", f"{tmp_path}/")
    run = sana("generate", *call, *drawn)
    assert run.code == 0, run.err
    (found,) = [line for line in run.err.splitlines() if WARNING in line] or [None]
    assert found == (unknown and f"{WARNING}{unknown} ignores such words")


def test_a_model_without_a_vocabulary_knows_every_word(tiny_model):
    assert unknown_words(["a dragon"], vocabulary(folder_parts(tiny_model))) == []


def test_a_model_trained_here_has_its_own(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "own")
    (folder / "vocabulary.json").write_text(json.dumps(["a", "fox"]))
    assert unknown_words(["a fox", "a red fox"], vocabulary(folder_parts(folder))) == ["red"]
