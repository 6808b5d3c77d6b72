"""The judge of the bundled model, judged: drawings of a scene pass, drawings of another do not."""

import numpy as np
import pytest

from examples import exhaustive
from training.shape_checker import check
from training.shapes import COLOURS, RELATIONS, SHAPES, Scene, draw, sample_scene

SIDE = 256


def scenes(count: int, objects: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, objects) for _ in range(count)]


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("count", [20, *exhaustive(120)])
def test_ground_truth_is_accepted(objects, count):
    wanted = scenes(count, objects, seed=1)
    right = [all(check(scene, draw(scene, SIDE)).values()) for scene in wanted]
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize(
    ("what", "count"),
    [
        *(("shape", 10), ("colour", 10), ("background", 10), ("place", 100)),
        *exhaustive(("shape", 100), ("colour", 100), ("background", 100)),
    ],
)
def test_one_wrong_attribute_is_refused(what, objects, count):
    rng = np.random.default_rng(2)
    accepted = [
        all(check(scene, draw(_spoilt(scene, what, rng), SIDE)).values())
        for scene in scenes(count, objects, seed=3)
        if objects == 2 or what != "place" or scene.objects[0].position
    ]
    assert np.mean(accepted) <= 0.02


def _spoilt(scene: Scene, what: str, rng: np.random.Generator) -> Scene:
    """The same scene but for one attribute that its caption states."""
    from dataclasses import replace

    things = list(scene.objects)
    which = int(rng.integers(len(things)))
    used = {*scene.background, *(thing.colour for thing in things)}
    fresh = str(rng.choice([name for name in COLOURS if name not in used]))
    if what == "shape":
        others = [shape for shape in SHAPES if shape != things[which].shape]
        things[which] = replace(things[which], shape=str(rng.choice(others)))
    elif what == "colour":
        things[which] = replace(things[which], colour=fresh)
    elif what == "background":
        ground = list(scene.background)
        ground[int(rng.integers(len(ground)))] = fresh
        return replace(scene, background=tuple(ground))
    elif len(things) == 2:  # the other way round
        first, second = things
        things = [
            replace(first, x=second.x, y=second.y),
            replace(second, x=first.x, y=first.y),
        ]
    else:
        x, y = things[0].x, things[0].y
        central = abs(x - 0.5) < 0.1 and abs(y - 0.5) < 0.1
        things[0] = replace(things[0], x=0.3 if central else 1 - y, y=0.5 if central else 1 - x)
        if not central and abs(things[0].x - x) < 0.1:
            things[0] = replace(things[0], x=1 - x, y=1 - y)
    return replace(scene, objects=tuple(things))


def test_every_relation_and_shape_is_told_apart():
    assert {scene.relation for scene in scenes(100, 2, seed=4)} == set(RELATIONS)


@pytest.mark.parametrize("count", [60, *exhaustive(200)])
def test_a_blob_of_the_right_colour_and_place_is_refused(count):
    """Smooth random outlines: what a model draws that has learnt colours but no shapes."""
    from scipy import ndimage

    rng = np.random.default_rng(7)
    accepted = []
    for scene in scenes(count, 1, seed=8):
        thing = scene.objects[0]
        picture = draw(Scene((), scene.background, scene.axis), SIDE)
        rows, columns = np.indices((SIDE, SIDE)) / SIDE
        distance = np.hypot(columns - thing.x, rows - thing.y) / thing.radius
        wave = ndimage.gaussian_filter(rng.standard_normal((SIDE, SIDE)), 12)
        picture[distance + 0.5 * wave / wave.std() < 0.9] = COLOURS[thing.colour]
        accepted.append(all(check(scene, picture).values()))
    assert np.mean(accepted) <= 0.02


@pytest.mark.parametrize("noise", ["flat", "static"])
def test_a_picture_of_nothing_is_refused(noise):
    rng = np.random.default_rng(5)
    for scene in scenes(20, 1, seed=6):
        picture = np.zeros((SIDE, SIDE, 3), np.uint8)
        picture[:] = COLOURS[scene.background[0]]
        if noise == "static":
            picture = rng.integers(0, 256, picture.shape, np.uint8)
        assert not all(check(scene, picture).values())
