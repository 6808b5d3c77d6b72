"""Check from the pixels alone, fact by fact, whether an image of Noto's things matches its caption.

`thing_detector` finds the things; `checker` and `shape_checker` recognise what is around them, of
which the pixels of the things are left out.
"""

import numpy as np

from training import checker, shape_checker
from training.thing_detector import (
    FINE,
    Sighting,
    View,
    covered,
    find,
    hidden_copies,
    strangers,
)

TOUCHING = 0.45  # largest distance of centres, as a share of the side, of a thing on another


def check(facts: dict[str, str], pixels: np.ndarray) -> dict[str, bool]:
    """Return for every fact of a caption (`Caption.facts`) whether uint8 RGB `pixels` show it.

    The image is square and its side a multiple of 128. A thing that is drawn twice, one partly
    behind the other, counts as two; copies of different sizes are a wrong count. "nothing else" is
    false where another thing is drawn or, on a plain ground, anything else.
    """
    view = View(pixels)
    kinds = [facts[name] for name in ("kind 1", "kind 2") if name in facts]
    found = find(view, kinds)
    seen = found + hidden_copies(view, found)
    taken = covered(seen)
    verdict, groups = {}, []
    for i, kind in enumerate(kinds, 1):
        groups.append([one for one in seen if one.thing == kind])
        verdict[f"kind {i}"] = bool(groups[-1])
        one_size = len({one.size for one in groups[-1]}) == 1
        verdict[f"count {i}"] = one_size and len(groups[-1]) == int(facts[f"count {i}"])
    whole = all(groups)
    if "size" in facts:
        verdict["size"] = whole and all(one.size == facts["size"] for one in groups[0])
    if "place 1" in facts:
        verdict["place 1"] = whole and _is_at(facts["place 1"], groups[0][0], "ground" in facts)
    if "relation" in facts:
        verdict["relation"] = whole and _in_relation(facts["relation"], *groups)
    nothing_else = not strangers(view, seen)
    if "ground" in facts:
        background = tuple(facts[name] for name in ("ground", "second ground") if name in facts)
        axis = int(facts.get("axis") == "beside")
        names = shape_checker.nearest_colours(pixels)
        scale = len(pixels) // FINE
        large = taken.repeat(scale, 0).repeat(scale, 1)
        verdict["ground"] = shape_checker.ground_is(background, axis, names, pixels, large)
        nothing_else &= shape_checker.nothing_else(background, axis, names, large)
    elif "sky" in facts or "land" in facts:
        verdict |= checker.check_surroundings(facts, checker.look(pixels, taken))
    return verdict | {"nothing else": nothing_else}


def _is_at(place: str, one: Sighting, plain: bool) -> bool:
    """Return whether a thing is at a place; in a scene, its height follows from the scene."""
    if plain:
        return shape_checker.position_at(one.x, one.y) == place
    return checker.place_of(one) == place


def _in_relation(relation: str, first: list[Sighting], second: list[Sighting]) -> bool:
    if relation == "beside":
        return any(checker.in_relation(side, first, second) for side in ("left of", "right of"))
    if relation == "on":
        touching = second[0].y - first[0].y < TOUCHING
        return touching and checker.in_relation("above", first, second)
    return checker.in_relation(relation, first, second)
