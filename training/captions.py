"""Captions of scenes, with the facts that they state, and the sampling of one among several.

The paper (§4) captions every image several times, scores each caption, and picks one with
probability softmax(score / temperature). Its score is the CLIP score; here it is the share of the
image's facts that the caption states, which needs no CLIP model.

Captions may omit colours, sky and land, but determine all positions. An object without a stated
position is in the middle, or one of two is above the other; of two objects side by side the left
one is named first; a plural without a number means three.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from training.scenes import FLYING, SAILING, Group, Scene, named_colours

CANDIDATES = 5
TEMPERATURE = 0.25
NONSENSE = 0.25
Pick = Callable[..., str]

NOUNS = {
    "house": (("house", "houses"), ("house", "houses"), ("cottage", "cottages")),
    "tree": (("tree", "trees"),),
    "pine": (("pine", "pines"), ("pine tree", "pine trees"), ("fir", "firs")),
    "cactus": (("cactus", "cacti"), ("cactus", "cactuses")),
    "boat": (("boat", "boats"), ("sailboat", "sailboats"), ("sailing boat", "sailing boats")),
    "bridge": (("bridge", "bridges"), ("arched bridge", "arched bridges")),
    "balloon": (("balloon", "balloons"), ("hot-air balloon", "hot-air balloons")),
    "cloud": (("cloud", "clouds"),),
    "bird": (("bird", "birds"),),
}
NUMBERS = {2: ("two", "two", "2", "a pair of"), 3: ("three", "three", "3")}
WHEN = {
    "dawn": ("at dawn", "at dawn", "at sunrise", "in the early morning", "under a dawn sky"),
    "noon": ("at noon", "at noon", "by day", "on a sunny day", "under a blue sky"),
    "sunset": ("at sunset", "at sunset", "at dusk", "in the evening", "under a sunset sky"),
    "starry night": ("on a starry night", "under the stars", "under a starry sky"),
    "moonlit night": ("by moonlight", "under the moon", "on a moonlit night", "under a full moon"),
    "night": ("at night", "by night"),
}
LAND = {
    "mountains": ("mountains", "the mountains", "a mountain range"),
    "snowy mountains": ("snowy mountains", "snow-capped mountains", "mountains with snow"),
    "hills": ("hills", "rolling hills", "the hills"),
    "dunes": ("dunes", "sand dunes", "the desert"),
    "sea": ("the sea", "the ocean", "the water"),
    "city": ("a city", "a city skyline", "the city"),
}
RELATION = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACE = {
    "left": ("on the left", "on the left side", "at the left"),
    "middle": ("in the middle", "in the centre", "in the center"),
    "right": ("on the right", "on the right side", "at the right"),
}
OPENINGS = (
    "a picture of ",
    "a drawing of ",
    "an illustration of ",
    "a flat illustration of ",
    "an image of ",
    "a view of ",
    "a scene with ",
    "a postcard of ",
    "this is ",
    "draw ",
    "paint ",
    "give me ",
    "i want ",
    "imagine ",
    "look at ",
    "we have ",
    "the picture shows ",
)

# Words that state nothing. "On" and "over" are not among them: they can be relations.
FILLERS = {
    "the",
    "and",
    "with",
    "in",
    "front",
    "near",
    "before",
    "against",
    "background",
    "far",
    "away",
}


@dataclass(frozen=True)
class Caption:
    text: str
    facts: dict[str, str]  # that it states; objects are numbered in the order of the text


def all_facts(scene: Scene) -> dict[str, str]:
    """Return every fact about a scene that a caption could state."""
    facts = {"sky": scene.sky, "land": scene.land}
    for i, group in enumerate(scene.groups, 1):
        facts |= _facts_of(group, i)
        if not named_colours(group.kind):
            del facts[f"colour {i}"]
        if group.place:
            facts[f"place {i}"] = group.place
    return facts | ({"relation": scene.relation} if scene.relation else {})


def score(caption: Caption, scene: Scene) -> float:
    """Return the share of the facts that a caption states; vague ones ("at night") count half."""
    named = sum(0.5 if v in ("night", "many") else 1.0 for v in caption.facts.values())
    return named / len(all_facts(scene))


def caption(scene: Scene, rng: np.random.Generator, nonsense: float = NONSENSE) -> Caption:
    """Sample one of several captions by their scores (paper §4, CLIP-score-based sampler).

    A share `nonsense` of them has random letters at one end or amid the words.
    """
    found = [candidate(scene, rng, nonsense) for _ in range(CANDIDATES)]
    weights = np.exp(np.array([score(one, scene) for one in found]) / TEMPERATURE)
    return found[int(rng.choice(CANDIDATES, p=weights / weights.sum()))]


def picker(rng: np.random.Generator) -> Pick:
    """Return a function that picks one of several words at random."""
    return lambda options: str(options[int(rng.integers(len(options)))])


def candidate(scene: Scene, rng: np.random.Generator, nonsense: float = NONSENSE) -> Caption:
    """Write a caption of random length, order and wording; all that it states is true."""
    pick = picker(rng)
    facts: dict[str, str] = {}
    groups, relation = list(scene.groups), scene.relation
    keeps = rng.random(4) < (0.62, 0.7, 0.85, 0.8)
    land, when, colours, together = (bool(keep) for keep in keeps)
    sideways = relation in ("left of", "right of")
    if sideways and not scene.one_row:
        together = True
    swapped = rng.random() < 0.4 if together or not sideways else relation == "right of"
    if len(groups) == 2 and swapped:
        groups.reverse()
        relation = relation and OPPOSITE[relation]
    if not groups:
        land = True
    names = []
    for i, group in enumerate(groups, 1):
        text, stated = _name(group, i, pick, rng, colours)
        aside = group.place not in (None, "middle")
        if len(groups) == 1 and group.place and (aside or rng.random() < 0.3):
            text, stated[f"place {i}"] = f"{text} {pick(PLACE[group.place])}", group.place
        names.append(text)
        facts |= stated
    where, time = "", ""
    if land:
        where, facts["land"] = pick(LAND[scene.land]), scene.land
    if when:
        vague = scene.light == "night" and rng.random() < 0.3
        facts["sky"] = "night" if vague else scene.sky
        time = pick(WHEN[facts["sky"]])
    if relation and together:
        facts["relation"] = relation
        what = f"{names[0]} {pick(RELATION[relation])} {names[1]}"
    else:
        what = pick((" and ", " and ", ", ", " with ")).join(names)
    text = sentence(what, where, time, lambda: setting(where, groups, scene, pick), pick, rng)
    return Caption(with_nonsense(text, rng) if rng.random() < nonsense else text, facts)


def _facts_of(group: Group, index: int) -> dict[str, str]:
    return {
        f"kind {index}": group.kind,
        f"count {index}": str(group.count),
        f"colour {index}": group.colour,
    }


def _name(
    group: Group, index: int, pick: Pick, rng: np.random.Generator, colours: bool
) -> tuple[str, dict[str, str]]:
    facts = _facts_of(group, index)
    one, many = NOUNS[group.kind][int(rng.integers(len(NOUNS[group.kind])))]
    noun = one if group.count == 1 else many
    if colours and named_colours(group.kind):
        noun = f"{group.colour} {noun}"
    else:
        del facts[f"colour {index}"]
    if group.count == 1:
        return (f"one {noun}" if rng.random() < 0.06 else article(noun)), facts
    if group.count == 3 and rng.random() < 0.12:
        return noun, facts | {f"count {index}": "many"}
    return f"{pick(NUMBERS[group.count])} {noun}", facts


def article(words: str) -> str:
    vowel = words[0] in "aeiou" and not words.startswith("uni")  # as in "a unicorn"
    return f"{'an' if vowel or words.startswith('hour') else 'a'} {words}"


def setting(where: str, groups: list[Group], scene: Scene, pick: Pick) -> str:
    """Place the objects named first in the land: "over the sea", "in front of hills"."""
    kind = groups[0].kind
    if kind in SAILING:
        return f"{pick(('on', 'on', 'in'))} {where}"
    if kind in FLYING:
        return f"{pick(('over', 'above', 'over'))} {where}"
    if scene.land == "sea":
        return f"{pick(('by', 'beside', 'in front of'))} {where}"
    return f"{pick(('in front of', 'before', 'in', 'near'))} {where}"


def sentence(
    what: str,
    where: str,
    when: str,
    setting: Callable[[], str],
    pick: Pick,
    rng: np.random.Generator,
) -> str:
    """Arrange the parts of a caption, of which each but one may be empty.

    `setting` returns the land and how the first objects are placed in it: "over the sea".
    """
    opening = pick(OPENINGS) if rng.random() < 0.3 else ""
    if not what:
        return f"{opening}{where} {when}".strip()
    around = setting() if where else ""
    if rng.random() < 0.12:  # a list of tags
        parts = [what.replace(" and ", ", "), where, when.split(" ", 1)[-1]]
        order = rng.permutation(3)
        return ", ".join(parts[i] for i in order if parts[i])
    orders = [
        f"{opening}{what} {around} {when}",
        f"{opening}{what} {around} {when}",
        f"{opening}{what} {when} {around}",
        f"{opening}{what}, {around}, {when}",
        f"{when}, {what} {around}",
    ]
    if where:
        orders += [
            f"{opening}{where} {when} with {what}",
            f"{where} with {what}, {when}",
            f"{opening}{what}; {when}; {where}",
            f"{opening}{where} {when}: {what}",
            f"{opening}{what} {when}, {where} far away",
        ]
    return _tidy(pick(orders))


def _tidy(text: str) -> str:
    words = " ".join(text.split())
    for mark in (",", ";", ":"):
        words = words.replace(f" {mark}", mark)
    for doubled in (",,", ";;", ",:"):
        words = words.replace(doubled, doubled[-1])
    return words.strip(" ,;:")


def with_nonsense(text: str, rng: np.random.Generator) -> str:
    """Add random letters, at one end or amid the text, where they also replace `FILLERS`.

    This teaches the encoder to ignore unknown words and to read what follows them.
    """
    letters = np.array(list("aabcdeeeefghiijklmnnooprrssttuuvwxyz"))

    def word() -> str:
        return "".join(rng.choice(letters, rng.integers(2, 9)))

    if rng.random() < 0.5:
        noise = [word() for _ in range(rng.integers(1, 4))]
        return " ".join([*noise, text] if rng.random() < 0.6 else [text, *noise])
    words = [word() if w in FILLERS and rng.random() < 0.5 else w for w in text.split()]
    words.insert(int(rng.integers(len(words) + 1)), word())
    return " ".join(words)
