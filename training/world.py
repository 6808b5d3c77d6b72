"""Scenes, shapes and Noto's things behind one interface, which the stages of training use."""

import math
from dataclasses import dataclass

import numpy as np

from training import captions, chinese, emoji, emoji_captions, painter, scenes, shapes
from training.captions import Caption
from training.noto import things

Sample = scenes.Scene | shapes.Scene | emoji.Scene


@dataclass(frozen=True)
class World:
    """What training images show, and in which languages their captions are."""

    shapes: float = 0.4  # share of images; shapes have more sizes and positions than scenes
    things: float = 0.0  # share of images of Noto's things; the others are scenes
    chinese: float = 0.0  # share of the captions of scenes and shapes
    emoji: float = 0.0  # the same, in so far as emoji can express them

    def sample(self, rng: np.random.Generator) -> Sample:
        """Sample an image that is not held out for the evaluation."""
        at = rng.random()
        if at < self.shapes:
            return shapes.training_scene(rng)
        return (emoji if at < self.shapes + self.things else scenes).training_scene(rng)

    def describe(
        self,
        sample: Sample,
        rng: np.random.Generator,
        nonsense: float = captions.NONSENSE,
        withhold: bool = False,
    ) -> Caption:
        """Caption a sample; a share `nonsense` has random letters somewhere, except of shapes in
        English.

        `withhold` leaves out the names of things that the transformer must not see.
        """
        if isinstance(sample, emoji.Scene):
            return emoji_captions.caption(sample, rng, nonsense, withhold)
        at = rng.random() if self.chinese or self.emoji else 1.0
        flat = isinstance(sample, shapes.Scene)
        if at < self.emoji:
            if not flat and (found := emoji_captions.describe_scene(sample, rng)):
                return found
            if flat and (text := emoji_captions.describe_shapes(sample, rng)):
                return Caption(text, _shape_facts(sample))
        if at < self.emoji + self.chinese:
            if isinstance(sample, shapes.Scene):
                told = Caption(chinese.describe_shapes(sample, rng), _shape_facts(sample))
            else:
                told = chinese.describe_scene(sample, rng)
            noisy = rng.random() < nonsense
            return Caption(chinese.with_nonsense(told.text, rng), told.facts) if noisy else told
        if flat:
            return Caption(shapes.describe(sample, rng), _shape_facts(sample))
        return captions.caption(sample, rng, nonsense)


def draw(sample: Sample, side: int, window: tuple[int, int, int] | None = None) -> np.ndarray:
    """Paint a sample, uint8 RGB (side, side, 3), or only a `window` (top, left, size) of it."""
    if isinstance(sample, emoji.Scene):
        return emoji.draw(sample, side, window)
    paint = shapes.draw if isinstance(sample, shapes.Scene) else painter.paint
    return paint(sample, side, window)


def objects_at(sample: Sample, cells: int) -> np.ndarray:
    """Return which cells of a grid over the image an object's box covers, bool (cells, cells)."""
    found = np.zeros((cells, cells), bool)
    for left, right, top, bottom in sample.boxes:
        rows, columns = (
            slice(max(0, math.floor(start * cells + 0.1)), math.ceil(end * cells - 0.1))
            for start, end in ((top, bottom), (left, right))
        )
        found[rows, columns] = True
    return found


# Every fact that a caption can state, with its possible values; None if it is not stated.
QUESTIONS: dict[str, list[str | None]] = {
    "sky": [None, *scenes.SKIES, "night"],
    "land": [None, *scenes.LANDS],
    "kind 1": [None, *scenes.KINDS, *shapes.SHAPES, *(thing.name for thing in things())],
    "kind 2": [None, *scenes.KINDS, *shapes.SHAPES, *(thing.name for thing in things())],
    "colour 1": [None, *shapes.COLOURS],
    "colour 2": [None, *shapes.COLOURS],
    "count 1": [None, "1", "2", "3", "many"],
    "count 2": [None, "1", "2", "3", "many"],
    "place 1": [None, *scenes.PLACES, *shapes.POSITIONS],
    "relation": [None, *emoji.RELATIONS],
    "size": [None, *shapes.SIZES],
    "ground": [None, *shapes.COLOURS],
    "second ground": [None, *shapes.COLOURS],
    "axis": [None, "over", "beside"],
}


def _shape_facts(scene: shapes.Scene) -> dict[str, str]:
    facts: dict[str, str | None] = {}
    for i, thing in enumerate(scene.objects, 1):
        facts |= {f"kind {i}": thing.shape, f"colour {i}": thing.colour, f"count {i}": "1"}
    first = scene.objects[0]
    facts |= {"relation": scene.relation, "ground": scene.background[0]}
    if not scene.relation:
        facts |= {"size": first.size, "place 1": first.position}
    if len(scene.background) == 2:
        facts |= {"second ground": scene.background[1], "axis": ("over", "beside")[scene.axis]}
    return {name: value for name, value in facts.items() if value is not None}
