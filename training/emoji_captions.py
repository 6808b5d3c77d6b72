"""Captions in emoji, and captions of Noto's things in English, Chinese, emoji, or several of them.

Every caption has the facts that it states, as in `captions`. Of a tenth of the pairs of a thing and
a language, no name is used in `describe(…, withhold=True)`, by which the transformer is trained: it
sees the word only through a text encoder that has read it in all languages.
"""

from zlib import crc32

import numpy as np

from training import captions, chinese, scenes, shapes
from training.captions import CANDIDATES, TEMPERATURE, Caption, Pick, article, picker
from training.emoji import Scene, flies
from training.noto import Thing, things

LANGUAGES = ("English", "Chinese", "emoji")
SELECTOR = "\ufe0f"  # asks for the coloured form of a character; half of all writers leave it out
KINDS = {
    "house": "🏠",
    "tree": "🌳",
    "pine": "🌲",
    "cactus": "🌵",
    "boat": "⛵",
    "bridge": "🌉",
    "balloon": "🎈",
    "cloud": "☁️",
    "bird": "🐦",
}
SKIES = {"dawn": "🌅", "noon": "🌞", "sunset": "🌇", "starry night": "🌌", "moonlit night": "🌕"}
LANDS = {
    "mountains": ("⛰️",),
    "snowy mountains": ("🏔️",),
    "dunes": ("🏜️",),
    "sea": ("🌊",),
    "city": ("🏙️",),
}
JOINTS = ("", "", " ", " ", " / ", "·", " - ")
WAYS_TO_COUNT = ("number", "repeated", "repeated")  # the encoder learns to count repeats slowly
BEACH = "🏖️"
SQUARES = {
    "red": "🟥",
    "orange": "🟧",
    "yellow": "🟨",
    "green": "🟩",
    "blue": "🟦",
    "purple": "🟪",
    "brown": "🟫",
    "black": "⬛",
    "white": "⬜",
}
SHAPES = {
    "circle": dict(zip(SQUARES, "🔴🟠🟡🟢🔵🟣🟤⚫⚪", strict=True)),
    "heart": dict(zip(SQUARES, ("❤️", *"🧡💛💚💙💜🤎🖤🤍"), strict=True))
    | {"pink": "🩷", "cyan": "🩵", "gray": "🩶"},
    "star": {"yellow": "⭐"},
    "triangle": {"red": "🔺"},
}
ENGLISH_SIZES = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium-sized", "medium"),
    "large": ("large", "big", "huge"),
}
ENGLISH_PLACES = {
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
}
ENGLISH_RELATIONS = captions.RELATION | {
    "beside": ("beside", "next to", "by the side of"),
    "on": ("on", "on top of", "standing on"),
}


def characters() -> set[str]:
    """Return every emoji of the captions."""
    lands = (one for options in LANDS.values() for one in options)
    shapes_of = (one for table in SHAPES.values() for one in table.values())
    named = (thing.emoji for thing in things())
    return {*KINDS.values(), *SKIES.values(), *lands, BEACH, *SQUARES.values(), *shapes_of, *named}


def withheld(thing: Thing) -> str | None:
    """Return the language in which the transformer never sees this thing's name, if any.

    Three in ten things have one, so that it is a tenth of all pairs.
    """
    number = crc32(thing.name.encode()) % 10
    return LANGUAGES[number] if number < len(LANGUAGES) else None


def all_facts(scene: Scene) -> dict[str, str]:
    facts = {}
    for i, thing in enumerate(scene.things, 1):
        facts |= {f"kind {i}": thing.name, f"count {i}": str(scene.count)}
    facts |= {"size": scene.size} if scene.says_size else {}
    facts |= {"place 1": scene.place} if scene.place else {}
    facts |= {"relation": scene.relation} if scene.relation else {}
    return facts | _around(scene)


def _around(scene: Scene) -> dict[str, str]:
    if scene.land:
        return {"sky": scene.land.sky, "land": scene.land.land}
    facts = {"ground": scene.ground[0]}
    if len(scene.ground) == 2:
        facts |= {"second ground": scene.ground[1], "axis": ("over", "beside")[scene.axis]}
    return facts


def caption(scene: Scene, rng: np.random.Generator, nonsense: float, withhold: bool) -> Caption:
    """Sample one of several captions in one language, the fuller ones more often (paper, §4)."""
    language = str(rng.choice(LANGUAGES, p=(0.4, 0.35, 0.25)))
    found = [candidate(scene, language, rng, withhold) for _ in range(CANDIDATES)]
    shares = np.array([len(one.facts) / len(all_facts(scene)) for one in found])
    weights = np.exp(shares / TEMPERATURE)
    chosen = found[int(rng.choice(CANDIDATES, p=weights / weights.sum()))]
    if rng.random() >= nonsense:
        return chosen
    add = captions.with_nonsense if language == "English" else chinese.with_nonsense
    return Caption(add(chosen.text, rng), chosen.facts)


def candidate(
    scene: Scene, language: str, rng: np.random.Generator, withhold: bool = False
) -> Caption:
    """Write a caption of random length and wording; all that it states is true.

    A caption that emoji alone cannot express is English or Chinese with emoji for the things.
    """
    pick = picker(rng)
    if language == "emoji":
        silent = withhold and any(withheld(thing) == "emoji" for thing in scene.things)
        if not silent and rng.random() < 0.6 and (found := _in_emoji(scene, rng)):
            return found
        language, own = pick(("English", "Chinese")), 0.0
    else:
        own = 0.85  # share of names in the caption's language
    named, relation, facts = list(scene.things), scene.relation, {}
    says_relation = rng.random() < 0.8 or not _follows(scene)
    swaps = rng.random() < 0.4 if says_relation else relation == "right of"
    if swaps and relation in captions.OPPOSITE:
        named.reverse()
        relation = captions.OPPOSITE[relation]
    names = []
    for i, thing in enumerate(named, 1):
        facts |= {f"kind {i}": thing.name, f"count {i}": str(scene.count)}
        other = pick(("emoji", "emoji", "emoji", *LANGUAGES[:2]))
        spoken = language if rng.random() < own else ("emoji" if own == 0 else other)
        if withhold and withheld(thing) == spoken:
            spoken = language if withheld(thing) != language else "emoji"
        names.append(_name(thing, scene, spoken, language, pick))
    if scene.says_size:
        facts["size"] = scene.size
    if len(named) == 2 and says_relation:
        facts["relation"] = str(relation)
    if scene.place:
        facts["place 1"] = scene.place
    says_land, says_sky = rng.random(2) < (0.62, 0.6)
    if scene.land:
        facts |= {"land": scene.land.land} if says_land else {}
        if says_sky:
            vague = scene.land.light == "night" and rng.random() < 0.3
            facts["sky"] = "night" if vague else scene.land.sky
    else:
        facts |= _around(scene)
    if language == "English":
        return Caption(_english(scene, named, names, facts, pick, rng), facts)
    return Caption(_chinese(scene, named, names, facts, pick), facts)


def _follows(scene: Scene) -> bool:
    """Whether the positions of two things follow without their relation."""
    if scene.land and flies(scene.things[0]) != flies(scene.things[-1]):
        return True
    return scene.relation in ("left of", "right of", "beside")


def written(characters: str, pick: Pick) -> str:
    """Return emoji with or without the selector of their coloured form."""
    return characters if pick(("with", "without")) == "with" else characters.replace(SELECTOR, "")


def _name(thing: Thing, scene: Scene, spoken: str, language: str, pick: Pick) -> str:
    """Name a thing and its number in the language `spoken`, within a sentence in `language`."""
    count, size = scene.count, scene.size if scene.says_size else None
    if spoken == "emoji":
        one = written(thing.emoji, pick)
        if language == "English":
            size_words = f"{pick(ENGLISH_SIZES[size])} " if size else ""
            if count > 1 and pick(WAYS_TO_COUNT) == "number":
                return f"{pick(captions.NUMBERS[count][:2])} {one}"
            return f"{article(size_words + one)}" if size else one * count
        if size:
            return f"{pick(chinese.SIZES[size])}{one}"
        if count > 1 and pick(WAYS_TO_COUNT) == "number":
            return chinese.counted(count, thing.measure, one, pick)
        return one * count
    if spoken == "Chinese":
        noun = pick((thing.chinese[0], *thing.chinese))
        if size:
            noun = pick(chinese.SIZES[size]) + noun
        return chinese.counted(count, thing.measure, noun, pick)
    single, plural = thing.english[0]
    if len(thing.english) > 1 and pick(("usual", "other")) == "other":
        single, plural = thing.english[1]
    noun = single if count == 1 else plural
    if size:
        noun = f"{pick(ENGLISH_SIZES[size])} {noun}"
    if count == 1:
        return article(noun)
    return f"{pick(captions.NUMBERS[count])} {noun}"


def _english(
    scene: Scene,
    named: list[Thing],
    names: list[str],
    facts: dict[str, str],
    pick: Pick,
    rng: np.random.Generator,
) -> str:
    if "relation" in facts:
        what = f"{names[0]} {pick(ENGLISH_RELATIONS[facts['relation']])} {names[1]}"
    else:
        what = pick((" and ", " and ", ", ", " with ")).join(names)
    if scene.place:
        what += f" {pick(ENGLISH_PLACES[scene.place])}"
    if not scene.land:
        opening = pick(("", "", "", *captions.OPENINGS))
        return shapes.on_ground(what, scene.ground, scene.axis, opening, pick)
    where = pick(captions.LAND[scene.land.land]) if "land" in facts else ""
    when = pick(captions.WHEN[facts["sky"]]) if "sky" in facts else ""

    def around() -> str:
        if named[0].place == "sea":
            return f"{pick(('on', 'in'))} {where}"
        if flies(named[0]):
            return f"{pick(('over', 'above', 'over'))} {where}"
        if scene.land and scene.land.land == "sea":
            beach = ("on the beach", "at the beach", "on a sandy beach")
            return pick((*beach, f"by {where}", f"beside {where}"))
        return f"{pick(('in front of', 'before', 'in', 'near'))} {where}"

    return captions.sentence(what, where, when, around, pick, rng)


def _chinese(
    scene: Scene,
    named: list[Thing],
    names: list[str],
    facts: dict[str, str],
    pick: Pick,
) -> str:
    what = chinese.joined(names, facts.get("relation"), pick)
    if scene.place:
        what += pick(chinese.PLACES[scene.place])
    if not scene.land:
        return chinese.on_ground(what, chinese.ground(scene.ground, scene.axis, pick), pick)
    place = named[0].place if named[0].place in ("sea", "sky") else "ground"
    around = chinese.setting(place, scene.land.land, pick) if "land" in facts else ""
    when = pick(chinese.WHEN[facts["sky"]]) if "sky" in facts else ""
    return chinese.sentence(what, around, when, pick)


def _in_emoji(scene: Scene, rng: np.random.Generator) -> Caption | None:
    """Write a scene of things in emoji alone, or return None if they cannot express it."""
    if scene.says_size or scene.place or (len(scene.things) == 2 and not _follows(scene)):
        return None
    pick, named = picker(rng), list(scene.things)
    if scene.relation == "right of":
        named.reverse()
    facts = {}
    parts = []
    for i, thing in enumerate(named, 1):
        facts |= {f"kind {i}": thing.name, f"count {i}": str(scene.count)}
        parts.append(written(thing.emoji, pick) * scene.count)
    if scene.land:
        around, told = _surroundings(scene.land, pick, rng)
        parts, facts = parts + around, facts | told
    elif len(scene.ground) == 1 and scene.ground[0] in SQUARES:
        parts.append(SQUARES[scene.ground[0]])
        facts |= _around(scene)
    else:
        return None
    return Caption(pick(JOINTS).join(parts), facts)


def _surroundings(
    scene: scenes.Scene, pick: Pick, rng: np.random.Generator
) -> tuple[list[str], dict[str, str]]:
    """Return emoji for land and sky, each of them or not, and the facts that they state."""
    parts, facts = [], {}
    if scene.land in LANDS and rng.random() < 0.62:
        choices = (*LANDS[scene.land], BEACH) if scene.shore else LANDS[scene.land]
        parts.append(written(pick(choices), pick))
        facts["land"] = scene.land
    if rng.random() < 0.6:
        parts.append(SKIES[scene.sky])
        facts["sky"] = scene.sky
    return parts, facts


def describe_scene(scene: scenes.Scene, rng: np.random.Generator) -> Caption | None:
    """Caption an illustrated scene in emoji alone; None if they cannot express it."""
    groups = list(scene.groups)
    diagonal = scene.relation in ("left of", "right of") and not scene.one_row
    if not groups or diagonal or any(group.place not in (None, "middle") for group in groups):
        return None
    if scene.relation == "right of":
        groups.reverse()
    pick = picker(rng)
    facts, parts = {}, []
    for i, group in enumerate(groups, 1):
        facts |= {f"kind {i}": group.kind, f"count {i}": str(group.count)}
        parts.append(written(KINDS[group.kind], pick) * group.count)
    around, told = _surroundings(scene, pick, rng)
    return Caption(pick(JOINTS).join(parts + around), facts | told)


def describe_shapes(scene: shapes.Scene, rng: np.random.Generator) -> str | None:
    """Caption flat shapes with emoji in place of colour and shape; None if there are none."""
    first = scene.objects[0]
    found = SHAPES.get(first.shape, {}).get(first.colour)
    if not found or len(scene.objects) > 1 or first.size or first.position:
        return None
    pick = picker(rng)
    if len(scene.background) == 1 and scene.background[0] in SQUARES:
        square = SQUARES[scene.background[0]]
        return written(found, pick) + pick((" ", "", " on ")) + square
    return shapes.on_ground(written(found, pick), scene.background, scene.axis, "", pick)
