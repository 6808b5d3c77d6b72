"""The judge of illustrated scenes, judged: true drawings pass, also rough ones; others do not."""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from examples import exhaustive
from training.captions import all_facts
from training.checker import check, look
from training.painter import paint, role_colour
from training.scenes import (
    AT,
    LANDS,
    SKIES,
    STANDING,
    Group,
    Scene,
    sample_scene,
    wearable,
)
from training.things import REACH, THINGS

SIDE = 256


def clean(pixels: np.ndarray) -> np.ndarray:
    return pixels


def rough(pixels: np.ndarray) -> np.ndarray:
    """As a small generator might draw it: bent a little, soft, noisy, and through a coarse JPEG."""
    rng = np.random.default_rng(int(pixels[::32, ::32].sum()))
    side = len(pixels)
    bend = ndimage.gaussian_filter(rng.standard_normal((2, side, side)), (0, side / 10, side / 10))
    bend *= 0.006 * side / bend.std()
    where = np.indices((side, side)) + bend
    bent = [
        ndimage.map_coordinates(pixels[..., c].astype(np.float32), where, order=1, mode="nearest")
        for c in range(3)
    ]
    soft = ndimage.gaussian_filter(np.stack(bent, -1), (side / 200, side / 200, 0))
    noisy = np.clip(soft + rng.uniform(-8, 8, soft.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=50)
    with Image.open(file) as image:
        return np.asarray(image)


def scenes(count: int, seed: int, wanted: Callable[[Scene], bool] = lambda s: True) -> list[Scene]:
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        scene = sample_scene(rng)
        if wanted(scene):
            found.append(scene)
    return found


def obeyed(told: Scene, pixels: np.ndarray) -> bool:
    return all(check(all_facts(told), pixels).values())


@pytest.mark.parametrize("drawn", [clean, rough])
@pytest.mark.parametrize("count", [30, *exhaustive(300)])
def test_a_true_drawing_is_accepted(drawn, count):
    accepted = [obeyed(scene, drawn(paint(scene, SIDE))) for scene in scenes(count, seed=1)]
    assert np.mean(accepted) >= 0.99


def test_at_512_too():
    accepted = [obeyed(scene, paint(scene, 512)) for scene in scenes(20, seed=2)]
    assert np.mean(accepted) >= 0.99


def another_colour(scene: Scene, rng: np.random.Generator) -> Scene:
    which = int(rng.integers(len(scene.groups)))
    group = scene.groups[which]
    if group.kind == "cloud":
        which, group = 1 - which, scene.groups[1 - which]
    free = [c for c in wearable(group.kind, scene.light, scene.land) if c != group.colour]
    return with_group(scene, which, replace(group, colour=str(rng.choice(free))))


def another_count(scene: Scene, rng: np.random.Generator) -> Scene:
    """One more in a free place of the row, or one fewer."""
    which = int(rng.integers(len(scene.groups)))
    group = scene.groups[which]
    if group.count > 1:
        return with_group(scene, which, replace(group, spots=group.spots[1:]))
    (x, y, half), taken = group.spots[0], [s[0] for g in scene.groups for s in g.spots]
    far = max(np.linspace(0.16, 0.84, 9), key=lambda at: min(abs(at - t) for t in taken))
    half = min(half, 0.12 / REACH[group.kind][0])
    return with_group(scene, which, replace(group, spots=((x, y, half), (float(far), y, half))))


def another_object(scene: Scene, rng: np.random.Generator) -> Scene:
    """Of the same row, so that colour and place stay as told."""
    which = next(i for i, g in enumerate(scene.groups) if g.kind != "cloud")
    group = scene.groups[which]
    row = STANDING if group.kind in STANDING else ("balloon", "bird")
    others = [kind for kind in row if kind not in {g.kind for g in scene.groups}]
    kind = str(rng.choice(others or ["boat"]))
    return with_group(scene, which, replace(group, kind=kind))


def another_place(scene: Scene, rng: np.random.Generator) -> Scene:
    """Left for right; two objects in each other's places."""
    if scene.relation:
        first, second = scene.groups
        here, there = first.spots[0], second.spots[0]
        first = replace(first, spots=((there[0], there[1], here[2]),))
        second = replace(second, spots=((here[0], here[1], there[2]),))
        return replace(scene, groups=(first, second))
    which = next(i for i, g in enumerate(scene.groups) if g.place)
    group = scene.groups[which]
    ((_, y, half),) = group.spots
    place = str(rng.choice([p for p in AT if p != group.place]))
    return with_group(scene, which, replace(group, spots=((AT[place], y, half),)))


def with_group(scene: Scene, index: int, group: Group) -> Scene:
    groups = list(scene.groups)
    groups[index] = group
    return replace(scene, groups=tuple(groups))


def another_sky(scene: Scene, rng: np.random.Generator) -> Scene:
    return replace(scene, sky=str(rng.choice([sky for sky in SKIES if sky != scene.sky])))


def another_land(scene: Scene, rng: np.random.Generator) -> Scene:
    return replace(scene, land=str(rng.choice([land for land in LANDS if land != scene.land])))


def coloured(scene: Scene) -> bool:
    """Not a cloud only, and some other colour could be worn here."""
    named = [g for g in scene.groups if g.kind != "cloud"]
    return bool(named) and all(len(wearable(g.kind, scene.light, scene.land)) > 1 for g in named)


def roomy(scene: Scene) -> bool:
    return bool(scene.groups) and len(scene.groups[0].spots) < 3 and "bridge" not in kinds(scene)


def kinds(scene: Scene) -> set[str]:
    return {group.kind for group in scene.groups}


def placed(scene: Scene) -> bool:
    single = all(group.count == 1 for group in scene.groups)
    return single and (scene.relation is not None or any(g.place for g in scene.groups))


@pytest.mark.parametrize(
    ("spoilt", "wanted"),
    [
        (another_colour, coloured),
        (another_count, roomy),
        (another_object, coloured),
        (another_place, placed),
        (another_sky, lambda scene: True),
        (another_land, lambda scene: "boat" not in kinds(scene) and "bridge" not in kinds(scene)),
    ],
)
@pytest.mark.parametrize("count", [12, *exhaustive(50)])
def test_one_wrong_fact_is_refused(spoilt, wanted, count):
    rng = np.random.default_rng(4)
    accepted = [
        obeyed(scene, paint(spoilt(scene, rng), SIDE)) for scene in scenes(count, 5, wanted)
    ]
    assert np.mean(accepted) <= 0.02


@pytest.mark.parametrize("count", [20, *exhaustive(200)])
def test_a_blob_of_the_right_colour_and_place_is_refused(count):
    """Smooth random outlines: what a model draws that has learnt colours but no objects."""
    rng = np.random.default_rng(6)
    accepted = []
    for scene in scenes(count, 7, lambda scene: len(scene.groups) == 1):
        picture = paint(replace(scene, groups=()), SIDE)
        (group,) = scene.groups
        y, x = np.indices((SIDE, SIDE)) / SIDE
        for at, down, half in group.spots:
            wave = ndimage.gaussian_filter(rng.standard_normal((SIDE, SIDE)), half * SIDE / 5)
            reach = np.hypot((x - at) / REACH[group.kind][0], y - down) / half
            inside = reach + 0.4 * wave / wave.std() < 0.85
            picture[inside] = role_colour("main", group.kind, group.colour, scene.light)
        accepted.append(obeyed(scene, picture))
    assert np.mean(accepted) <= 0.02


def test_a_shuffled_drawing_has_no_objects():
    """All the right colours, none of the right outlines."""
    rng = np.random.default_rng(8)
    for scene in scenes(10, 9, lambda scene: len(scene.groups) == 2):
        tiles = paint(scene, SIDE).reshape(16, 16, 16, 16, 3).swapaxes(1, 2).reshape(256, 16, 16, 3)
        shuffled = rng.permutation(tiles).reshape(16, 16, 16, 16, 3).swapaxes(1, 2)
        assert not obeyed(scene, np.ascontiguousarray(shuffled.reshape(SIDE, SIDE, 3)))


@pytest.mark.parametrize("nothing", ["flat", "static"])
def test_a_picture_of_nothing_is_refused(nothing):
    rng = np.random.default_rng(10)
    picture = np.full((SIDE, SIDE, 3), 140, np.uint8)
    if nothing == "static":
        picture = rng.integers(0, 256, picture.shape, np.uint8)
    for scene in scenes(10, 11):
        assert not obeyed(scene, picture)


def test_every_kind_is_told_from_every_other():
    seen = {kind: set() for kind in THINGS}
    for scene in scenes(40, 12, lambda scene: len(scene.groups) == 1):
        (group,) = scene.groups
        seen[group.kind] |= {thing.kind for thing in look(rough(paint(scene, SIDE))).objects}
    assert all(found <= {kind} for kind, found in seen.items())


def test_a_scene_is_the_same_at_every_size():
    for scene in scenes(8, 13):
        small, large = paint(scene, 128), paint(scene, 512)
        shrunk = large.reshape(128, 4, 128, 4, 3).mean((1, 3))
        assert np.abs(small - shrunk).mean() < 1.5
        window = paint(scene, 512, (192, 64, 128))
        assert np.array_equal(window, large[192:320, 64:192])
