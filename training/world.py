"""Both worlds as one: what the stages of the training see."""

import math

import numpy as np

from training import captions, painter, scenes, shapes

SHAPES_SHARE = 0.4  # shapes come in more sizes and places than objects of a scene
Sample = scenes.Scene | shapes.Scene


def training_sample(rng: np.random.Generator) -> Sample:
    """A scene of one of the worlds that is not held out for the evaluation."""
    return (shapes if rng.random() < SHAPES_SHARE else scenes).training_scene(rng)


def draw(sample: Sample, side: int, window: tuple[int, int, int] | None = None) -> np.ndarray:
    """uint8 RGB (side, side, 3); only the `window` (top, left, size) if given."""
    paint = shapes.draw if isinstance(sample, shapes.Scene) else painter.paint
    return paint(sample, side, window)


def objects_at(sample: Sample, cells: int) -> np.ndarray:
    """bool (cells, cells): where in a grid of the picture an object is, by its box."""
    found = np.zeros((cells, cells), bool)
    for left, right, top, bottom in sample.boxes:
        rows, columns = (
            slice(max(0, math.floor(start * cells + 0.1)), math.ceil(end * cells - 0.1))
            for start, end in ((top, bottom), (left, right))
        )
        found[rows, columns] = True
    return found


def describe(sample: Sample, rng: np.random.Generator) -> captions.Caption:
    if isinstance(sample, shapes.Scene):
        return captions.Caption(shapes.describe(sample, rng), _shape_facts(sample))
    return captions.caption(sample, rng)


# Every question that a caption can answer, with its answers; None where it does not say.
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
