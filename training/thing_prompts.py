"""The 600 prompts about Noto's things: 200 each in English, Chinese and with emoji.

As in `prompts`, their templates occur in no training caption, and their combinations were held out
of training. Prompts in emoji have words only where emoji cannot express a relation or a template.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from training import captions, chinese, emoji_captions
from training.captions import Pick, picker
from training.emoji import Scene, flies, sample_scene
from training.emoji_captions import LANGUAGES
from training.shapes import COLOURS

SEED = 30_000  # training uses other random streams
CATEGORIES = {
    "single thing": 34,
    "two things": 34,
    "counting": 33,
    "position": 33,
    "scene": 33,
    "ground": 33,
}
TEMPLATES = {
    "English": ("a photo of {}", "show me {}", "please draw {}", "here is {}", "my painting of {}"),
    "Chinese": ("一张{}的照片", "请给我看{}", "帮我生成{}", "这里是{}", "我画的{}"),
    "emoji": ("show me {}", "{}!", "请给我看{}", "my painting: {}", "{} please"),
}
BEHIND = {
    "English": "{}, with nothing but {} behind",
    "Chinese": "{}，后面全是{}",
    "emoji": "{} | {}",
}
AMID = {
    "English": ("{what}, and {where} too, {when}", "{where}, {what} and all of it {when}"),
    "Chinese": ("{what}，还有{where}，都是{when}", "{where}跟{what}，{when}"),
    "emoji": ("{where}, {when}: {what}", "{what} + {where} + {when}"),
}
RELATIONS = {
    "left of": "left of",
    "right of": "right of",
    "beside": "next to",
    "above": "above",
    "below": "below",
    "on": "on",
}


@dataclass(frozen=True)
class ThingPrompt:
    category: str
    language: str
    text: str
    facts: dict[str, str]
    scene: Scene  # an example that the prompt describes


@cache  # the search takes seconds
def thing_prompts(seed: int = SEED) -> tuple[ThingPrompt, ...]:
    """Return all prompts, ordered by language and category."""
    rng = np.random.default_rng(seed)
    found: dict[str, ThingPrompt] = {}
    for language in LANGUAGES:
        for category, count in CATEGORIES.items():
            for _ in range(count):
                while (prompt := _prompt(category, language, rng)).text in found:
                    pass
                found[prompt.text] = prompt
    return tuple(found.values())


def _prompt(category: str, language: str, rng: np.random.Generator) -> ThingPrompt:
    scene = _scene(category, language, rng)
    pick, full = picker(rng), emoji_captions.all_facts(scene)
    stated = ["kind 1", "count 1", "kind 2", "count 2"]
    names = [_name(scene, i, language) for i in range(len(scene.things))]
    if category == "position":
        stated.append("relation")
        what = _related(names, str(scene.relation), language)
    else:
        what = {"English": " and ", "Chinese": "与", "emoji": " & "}[language].join(names)
    if scene.ground:
        stated.append("ground")
        colour = scene.ground[0]
        behind = {"English": colour, "Chinese": chinese.COLOURS[colour][0]}.get(language)
        what = BEHIND[language].format(what, behind or emoji_captions.SQUARES[colour])
    elif category == "scene":
        stated += ["sky", "land"]
        what = _amid(what, scene, language, pick)
    facts = {name: full[name] for name in stated if name in full}
    return ThingPrompt(category, language, pick(TEMPLATES[language]).format(what), facts, scene)


def _scene(category: str, language: str, rng: np.random.Generator) -> Scene:
    """Sample a held-out scene with the properties that a category tests."""
    while True:
        scene = sample_scene(rng)
        two = len(scene.things) == 2
        if not scene.held_out or scene.says_size or scene.place or len(scene.ground) == 2:
            continue
        if language == "emoji" and (
            (scene.ground and scene.ground[0] not in emoji_captions.SQUARES)
            or (scene.land and category == "scene" and scene.land.land == "hills")
        ):
            continue
        first_left = scene.relation in ("left of", "beside") or bool(
            scene.land and flies(scene.things[0]) != flies(scene.things[-1])
        )
        if {
            "single thing": not two and scene.count == 1,
            "two things": two and first_left,
            "counting": scene.count > 1,
            "position": two,
            "scene": not two and scene.count == 1 and bool(scene.land),
            "ground": not two and scene.count == 1 and bool(scene.ground),
        }[category]:
            return scene


def _name(scene: Scene, index: int, language: str) -> str:
    thing, count = scene.things[index], scene.count
    if language == "emoji":
        return thing.emoji * count
    if language == "Chinese":
        return f"{chinese.NUMBERS[count][0]}{thing.measure}{thing.chinese[0]}"
    single, plural = thing.english[0]
    return captions.article(single) if count == 1 else f"{captions.NUMBERS[count][0]} {plural}"


def _related(names: list[str], relation: str, language: str) -> str:
    if language == "Chinese":
        return names[0] + chinese.RELATIONS[relation][0].format(names[1])
    return f"{names[0]} {RELATIONS[relation]} {names[1]}"


def _amid(what: str, scene: Scene, language: str, pick: Pick) -> str:
    land = scene.land
    assert land is not None
    if language == "emoji":
        where, when = emoji_captions.LANDS[land.land][0], emoji_captions.SKIES[land.sky]
    elif language == "Chinese":
        where, when = chinese.LANDS[land.land][0], chinese.WHEN[land.sky][0]
    else:
        where, when = captions.LAND[land.land][0], captions.WHEN[land.sky][0]
    return pick(AMID[language]).format(what=what, where=where, when=when)


assert set(chinese.COLOURS) == set(COLOURS)
