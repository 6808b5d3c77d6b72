"""The words of the training captions, which the command compares with those of a prompt.

    python -m training.vocabulary > sana_cli/demo/vocabulary.json

`export` writes the same file beside the weights.
"""

import json
import sys

import numpy as np

from sana_cli.weights.vocabulary import is_chinese, words
from training import chinese, emoji_captions
from training.noto import things
from training.world import World

CAPTIONS = 5_000  # enough that every wording occurs


def vocabulary(world: World, captions: int = CAPTIONS, seed: int = 1) -> list[str]:
    """Return every word of so many captions without their random letters, sorted."""
    rng = np.random.default_rng(seed)
    texts = (world.describe(world.sample(rng), rng, nonsense=0).text for _ in range(captions))
    found = {word for text in texts for word in words(text)}
    if world.things:
        names = [name for one in things() for pair in one.english for name in pair]
        found.update(word for name in names for word in words(name))
        found.update(word for one in emoji_captions.characters() for word in words(one))
    if world.things or world.chinese:
        found = {word for word in found if not is_chinese(word)} | chinese.words()
    return sorted(found)


def as_json(found: list[str]) -> str:
    return json.dumps(found, indent=0) + "\n"


if __name__ == "__main__":
    sys.stdout.write(as_json(vocabulary(World())))
