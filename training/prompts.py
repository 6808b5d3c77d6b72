"""The 500 prompts that evaluate the bundled model, in GenEval's six categories.

Their templates occur in no training caption, and their combinations of objects (for one object:
with sky and land) were held out of training. The checker tests the `facts` that a prompt states;
half of the prompts also state the sky and the land.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from training import shapes
from training.captions import LAND, NOUNS, RELATION, WHEN, Pick, all_facts, article, picker
from training.scenes import Group, Scene, named_colours, sample_scene

SEED = 20_000  # training uses other random streams
PROMPTS = {
    "single object": 84,
    "two objects": 84,
    "colours": 83,
    "counting": 83,
    "position": 83,
    "colour binding": 83,
}
SHAPES = {"one shape": 200, "two shapes": 100}
COUNTS = {2: "two", 3: "three"}


@dataclass(frozen=True)
class Prompt:
    category: str
    text: str
    facts: dict[str, str]
    scene: Scene  # an example that the prompt describes


@cache  # the search takes seconds
def prompts(seed: int = SEED) -> tuple[Prompt, ...]:
    """Return all prompts, ordered by category."""
    rng = np.random.default_rng(seed)
    found: list[Prompt] = []
    for category, count in PROMPTS.items():
        texts: set[str] = set()
        while len(texts) < count:
            prompt = _worded(category, _scene(category, rng), rng)
            if prompt.text not in texts:
                texts.add(prompt.text)
                found.append(prompt)
    return tuple(found)


def shape_prompts(count: int, objects: int, seed: int = SEED) -> list[tuple[shapes.Scene, str]]:
    """Return scenes of shapes that were held out of training, in the wording of training."""
    rng = np.random.default_rng((seed, objects))
    found = []
    while len(found) < count:
        scene = shapes.sample_scene(rng, objects)
        if scene.held_out:
            found.append((scene, shapes.describe(scene, rng)))
    return found


def _scene(category: str, rng: np.random.Generator) -> Scene:
    """Sample a held-out scene with the properties that a category tests."""
    while True:
        scene = sample_scene(rng)
        groups = scene.groups
        coloured = all(named_colours(group.kind) for group in groups)
        single = all(group.count == 1 for group in groups)
        colours = len({group.colour for group in groups})
        if scene.held_out and {
            "single object": len(groups) == 1 and single,
            "two objects": len(groups) == 2 and single,
            "colours": len(groups) == 1 and single and coloured,
            "counting": len(groups) == 1 and not single,
            "position": len(groups) == 2 and scene.relation is not None and single,
            "colour binding": colours == 2 and single and coloured,
        }.get(category):
            return scene


def _worded(category: str, scene: Scene, rng: np.random.Generator) -> Prompt:
    pick = picker(rng)
    full = all_facts(scene)
    stated = ["kind 1", "count 1", "kind 2", "count 2"]
    if category in ("colours", "colour binding"):
        stated += ["colour 1", "colour 2"]
    names = [_name(g, f"colour {i}" in stated, pick) for i, g in enumerate(scene.groups, 1)]
    if category == "position":
        stated.append("relation")
        what = f"{names[0]} {pick(RELATION[str(scene.relation)])} {names[1]}"
    else:
        what = " and ".join(names)
    templates = ["a photo of {}", "show me {}", "please draw {}", "here is {}", "my painting of {}"]
    if rng.random() < 0.5:
        stated += ["sky", "land"]
        when, where = pick(WHEN[scene.sky]), pick(LAND[scene.land])
        templates = [
            f"a photo of {{}} {when} with {where} behind",
            f"please draw {{}}; {where}; {when}",
            f"{when} we see {{}}, and {where} too",
            f"{where}, {{}} and all of it {when}",
            f"show me {where} {when} and {{}}",
        ]
    facts = {name: full[name] for name in stated if name in full}
    return Prompt(category, pick(templates).format(what), facts, scene)


def _name(group: Group, coloured: bool, pick: Pick) -> str:
    one, many = NOUNS[group.kind][0]
    noun = one if group.count == 1 else many
    if coloured:
        noun = f"{group.colour} {noun}"
    return article(noun) if group.count == 1 else f"{COUNTS[group.count]} {noun}"
