"""The judge of Noto's things, judged: true drawings pass, also soft ones; others do not."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from examples import exhaustive
from training import emoji, evaluate
from training.emoji import SIZES, Scene
from training.emoji_captions import all_facts
from training.noto import Thing, rendering, things
from training.npm import PackageUnavailable
from training.scenes import LANDS, SKIES
from training.thing_checker import check

SIDE = 256
OTHER = {"left": (8, 0), "right": (-8, 0), "top": (0, 8), "bottom": (0, -8)}  # in steps


@pytest.fixture(scope="module", autouse=True)
def drawings():
    """Skip where the drawings are neither in the cache nor to be had from npm's registry."""
    pytest.importorskip("resvg_py", reason="resvg-py, which draws the things, is not installed")
    try:
        rendering(things()[0], 16)
    except PackageUnavailable as reason:
        pytest.skip(str(reason))


def scenes(count: int, seed: int, wanted: Callable[[Scene], bool] = lambda s: True) -> list[Scene]:
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        scene = emoji.sample_scene(rng)
        if wanted(scene):
            found.append(scene)
    return found


def obeyed(told: Scene, pixels: np.ndarray) -> bool:
    return all(check(all_facts(told) | {"size": told.size}, pixels).values())


def soft(pixels: np.ndarray) -> np.ndarray:
    """Blurred and noisy, as a small model draws."""
    rng = np.random.default_rng(4)
    blurred = ndimage.gaussian_filter(pixels.astype(np.float32), (1.5, 1.5, 0))
    return np.clip(blurred + rng.uniform(-8, 8, blurred.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("drawn", [lambda pixels: pixels, soft], ids=["clean", "soft"])
@pytest.mark.parametrize(("count", "side"), [(4, 256), *exhaustive((300, 256), (300, 512))])
def test_a_true_drawing_is_accepted(drawn, count, side):
    accepted = [obeyed(scene, drawn(emoji.draw(scene, side))) for scene in scenes(count, 1)]
    assert np.mean(accepted) >= 0.98


def pasted(scene: Scene, thing: Thing, at: tuple[float, float], cover: np.ndarray) -> np.ndarray:
    """Draw a scene without its things, and one thing with `cover` of its opacity in place."""
    picture = emoji.draw(replace(scene, spots=()), SIDE).astype(np.float32)
    drawing = rendering(thing, len(cover)).astype(np.float32)
    left, top = (round(a * SIDE / 16) for a in at)
    area = picture[top : top + len(cover), left : left + len(cover)]
    area += drawing[..., 3:] / 255 * cover[..., None] * (drawing[..., :3] - area)
    return np.rint(picture).astype(np.uint8)


def one_large(scene: Scene) -> bool:
    return len(scene.spots) == 1 and scene.size == "large"


def another_thing(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    others = [thing for thing in things() if thing not in scene.things]
    wrong = (others[int(rng.integers(len(others)))], *scene.things[1:])
    return emoji.draw(replace(scene, things=wrong), SIDE)


def half_a_thing(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The part on one side of the middle of what is drawn, not of its square."""
    pixels = SIZES[scene.size] * SIDE // 16
    inside = rendering(scene.things[0], pixels)[..., 3] > 128
    across = np.nonzero(inside)[1]
    cover = np.ones((pixels, pixels))
    middle = int(np.median(across))
    cover[:, slice(middle) if rng.random() < 0.5 else slice(middle, None)] = 0
    return pasted(scene, scene.things[0], scene.spots[0], cover)


def ghost(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    pixels = SIZES[scene.size] * SIDE // 16
    return pasted(scene, scene.things[0], scene.spots[0], np.full((pixels, pixels), 0.5))


def doubled(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A second copy beside the first and partly behind it, inside the image."""
    (left, top), wide = scene.spots[0], SIZES[scene.size]
    by = int(rng.integers(2, wide // 2 + 1))
    moved = left + by if left + by + wide <= 16 else left - by, top
    return emoji.draw(replace(scene, spots=(moved, scene.spots[0]), count=2), SIDE)


def another_count(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    return emoji.draw(replace(scene, spots=scene.spots[1:]), SIDE)


def another_size(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    size = str(rng.choice([size for size in SIZES if size != scene.size]))
    inset = (SIZES[scene.size] - SIZES[size]) // 2
    (left, top) = (min(max(at + inset, 0), 16 - SIZES[size]) for at in scene.spots[0])
    return emoji.draw(replace(scene, size=size, spots=((left, top),)), SIDE)


def another_place(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    if scene.place:
        (left, top), (right, down) = scene.spots[0], OTHER[scene.place]
        return emoji.draw(replace(scene, spots=((left + right, top + down),)), SIDE)
    return emoji.draw(replace(scene, spots=scene.spots[::-1]), SIDE)


def another_ground(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    if scene.land is None:
        free = [c for c in emoji.grounds(scene.things[0]) if c not in scene.ground]
        return emoji.draw(replace(scene, ground=(str(rng.choice(free)), *scene.ground[1:])), SIDE)
    what, known = ("sky", SKIES) if rng.random() < 0.5 else ("land", LANDS)
    other = str(rng.choice([name for name in known if name != getattr(scene.land, what)]))
    return emoji.draw(replace(scene, land=replace(scene.land, **{what: other})), SIDE)


@pytest.mark.parametrize(
    ("spoilt", "wanted"),
    [
        (another_thing, lambda scene: True),
        (half_a_thing, one_large),
        (ghost, one_large),
        (doubled, lambda scene: len(scene.spots) == 1),
        (another_count, lambda scene: scene.count > 1),
        (another_size, lambda scene: len(scene.spots) == 1),
        (another_place, lambda scene: scene.place or scene.relation not in (None, "beside")),
        (another_ground, lambda scene: scene.land or len(emoji.grounds(scene.things[0])) > 2),
    ],
)
@pytest.mark.parametrize("count", [3, *exhaustive(100)])
def test_one_wrong_fact_is_refused(spoilt, wanted, count):
    rng = np.random.default_rng(2)
    accepted = [obeyed(scene, spoilt(scene, rng)) for scene in scenes(count, 3, wanted)]
    assert np.mean(accepted) <= 0.02


def test_an_evaluation_goes_on_from_its_verdicts(tmp_path, monkeypatch, capsys):
    """With copies of four prompts, and after a kill in the middle of a line."""
    verdicts = tmp_path / "verdicts.jsonl"
    command = ["evaluate", "--world", "things", "--copies", "--side", "256"]
    command += ["--every", "150", "--json", "--resume", str(verdicts)]
    monkeypatch.setattr("sys.argv", command)
    evaluate.main()
    first, kept = json.loads(capsys.readouterr().out), verdicts.read_text()
    assert sum(row["prompts"] for row in first["languages"].values()) == 4
    verdicts.write_text(kept[:-5])
    evaluate.main()
    assert json.loads(capsys.readouterr().out) == first
    assert verdicts.read_text() == kept
    monkeypatch.setattr("sys.argv", [*command, "--steps", "3"])
    with pytest.raises(SystemExit, match="other settings"):
        evaluate.main()
