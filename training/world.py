"""Scenes and shapes behind one interface, which the stages of training use."""

import math

import numpy as np

from training import captions, painter, scenes, shapes

SHAPES_SHARE = 0.4  # shapes have more sizes and positions than the objects of scenes
Sample = scenes.Scene | shapes.Scene


def training_sample(rng: np.random.Generator) -> Sample:
    """Sample a scene or shapes that are not held out for the evaluation."""
    return (shapes if rng.random() < SHAPES_SHARE else scenes).training_scene(rng)


def draw(sample: Sample, side: int, window: tuple[int, int, int] | None = None) -> np.ndarray:
    """Paint a sample, uint8 RGB (side, side, 3), or only a `window` (top, left, size) of it."""
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


def describe(
    sample: Sample, rng: np.random.Generator, nonsense: float = captions.NONSENSE
) -> captions.Caption:
    """Caption a sample; of scenes a share `nonsense` has random letters at one end."""
    if isinstance(sample, shapes.Scene):
        return captions.Caption(shapes.describe(sample, rng), _shape_facts(sample))
    return captions.caption(sample, rng, nonsense)


# Every fact that a caption can state, with its possible values; None if it is not stated.
QUESTIONS: dict[str, list[str | None]] = {
    "sky": [None, *scenes.SKIES, "night"],
    "land": [None, *scenes.LANDS],
    "kind 1": [None, *scenes.KINDS, *shapes.SHAPES],
    "kind 2": [None, *scenes.KINDS, *shapes.SHAPES],
    "colour 1": [None, *shapes.COLOURS],
    "colour 2": [None, *shapes.COLOURS],
    "count 1": [None, "1", "2", "3", "many"],
    "count 2": [None, "1", "2", "3", "many"],
    "place 1": [None, *scenes.PLACES, *shapes.POSITIONS],
    "relation": [None, *scenes.RELATIONS],
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
