"""Noto's things: scenes on the grid, captions in three languages, prompts."""

from collections import Counter

import numpy as np
import pytest

from sana_cli.weights.vocabulary import SELECTOR, is_chinese, unknown_parts, words
from training import captions, chinese, emoji, emoji_captions
from training.emoji_captions import LANGUAGES, candidate, withheld
from training.noto import rendering, things
from training.npm import PackageUnavailable
from training.settings import THINGS
from training.thing_prompts import CATEGORIES, thing_prompts
from training.vocabulary import vocabulary
from training.world import QUESTIONS

BY_NAME = {one.name: one for one in things()}


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(1)
    return [emoji.training_scene(rng) for _ in range(3000)]


@pytest.fixture(scope="module")
def prompts():
    return thing_prompts()


@pytest.fixture(scope="module")
def known():
    return set(vocabulary(THINGS.world, captions=2000))


def languages_of(text: str, one: emoji.Thing) -> set[str]:
    """The languages in which a text names a thing."""
    emoji_there = one.emoji.replace(SELECTOR, "") in text
    names = [name.lower() for pair in one.english for name in pair]
    found = {"emoji"} if emoji_there else set()
    found |= {"Chinese"} if any(name in text for name in one.chinese) else set()
    return found | ({"English"} if any(name in text for name in names) else set())


def test_every_thing_stands_out_somewhere_and_drawings_stay_inside(scenes):
    assert {one.name for scene in scenes for one in scene.things} == set(BY_NAME)
    for scene in scenes:
        wide = emoji.SIZES[scene.size]
        assert all(0 <= at <= 16 - wide for spot in scene.spots for at in spot)
        assert len(set(scene.spots)) == len(scene.spots) == scene.count + len(scene.things) - 1


def test_sizes_and_positions_follow_from_a_caption(scenes):
    """Pictures with the same facts, of things of the same natural places, are arranged alike."""
    rng = np.random.default_rng(2)
    arranged = {}
    for scene in scenes:
        told = emoji_captions.caption(scene, rng, 0.0, withhold=True).facts
        telling = ("count", "place", "relation", "size")
        key = [(k, v) for k, v in told.items() if k.startswith(telling)]
        named = [told[k] for k in ("kind 1", "kind 2") if k in told]
        rows = [{"any": "ground"}.get(place := BY_NAME[n].place, place) for n in named]
        order = [scene.things.index(BY_NAME[name]) for name in named]
        spots = [scene.spots[i] for i in order] if len(named) == 2 else list(scene.spots)
        if len(named) == 2 and told.get("relation") == "beside":
            assert spots == list(scene.spots)
        place = "plain" if "ground" in told else str(rows)
        found = scene.size, spots
        assert arranged.setdefault((place, *key), found) == found, (place, key)
    assert len(arranged) < 200


def test_a_word_that_is_withheld_is_in_no_caption_and_is_read_all_the_same(scenes):
    rng = np.random.default_rng(3)
    shares = Counter(withheld(one) for one in things())
    assert all(0.05 < shares[language] / len(things()) < 0.16 for language in LANGUAGES)
    told = Counter()
    for scene in scenes[:800]:
        for language in LANGUAGES:
            text = candidate(scene, language, rng, withhold=True).text
            full = candidate(scene, language, rng).text
            for one in scene.things if len(scene.things) == 1 else ():
                assert (
                    withheld(one) != language
                    or language not in languages_of(text, one)
                    or (language == "English" and not text.isascii())
                ), (text, one)
                told[withheld(one) in languages_of(full, one)] += 1
    assert told[True] > 20


def test_captions_are_in_three_languages_and_mixed(scenes):
    rng = np.random.default_rng(4)
    found = Counter()
    for scene in scenes[:1000]:
        text = emoji_captions.caption(scene, rng, 0.0, withhold=False).text
        parts = words(text)
        found[any(map(is_chinese, parts)), any(word.isascii() for word in parts)] += 1
        found["with emoji"] += any(not (word.isalnum() or "-" in word) for word in parts)
    assert min(found[True, False], found[False, True], found[False, False]) > 50
    assert found["with emoji"] > 150


def test_facts_are_true_and_the_encoder_learns_them(scenes):
    rng = np.random.default_rng(5)
    for scene in scenes[:500]:
        told = emoji_captions.caption(scene, rng, 0.0, withhold=False).facts
        truth = emoji_captions.all_facts(scene)
        assert {told[k] for k in told if "kind" in k} == {one.name for one in scene.things}
        for name, fact in told.items():
            assert fact in QUESTIONS[name]
            if name in ("size", "place 1", "land", "ground", "second ground", "axis"):
                assert truth[name] == fact


def test_all_words_of_captions_are_in_the_vocabulary(known):
    rng = np.random.default_rng(6)
    world = THINGS.world
    for _ in range(1000):
        text = world.describe(world.sample(rng), rng, nonsense=0).text
        assert not [part for word in words(text) for part in unknown_parts(word, known)], text


def test_nonsense_keeps_all_that_a_caption_states():
    rng = np.random.default_rng(8)

    def follows(parts, text) -> bool:
        """Whether the parts occur in a text, in their order."""
        place = 0
        for part in parts:
            place = text.find(part, place) + len(part)
            if place < len(part):
                return False
        return True

    for _ in range(300):
        sample = THINGS.world.sample(rng)
        text = THINGS.world.describe(sample, rng, nonsense=0).text
        stated = [word for word in text.split() if word not in captions.FILLERS]
        assert follows(stated, captions.with_nonsense(text, rng)), text
        assert follows(chinese.JOINTS.sub("", text), chinese.with_nonsense(text, rng)), text


def test_articles_follow_the_sound():
    told = [captions.article(word) for word in ("owl", "unicorn", "hourglass", "hut")]
    assert told == ["an owl", "a unicorn", "an hourglass", "a hut"]


def test_prompts_are_200_a_language_held_out_and_in_other_words(prompts, scenes):
    found = Counter((one.language, one.category) for one in prompts)
    assert found == {(name, c): n for name in LANGUAGES for c, n in CATEGORIES.items()}
    assert len({one.text for one in prompts}) == 600
    assert all(one.scene.held_out for one in prompts)
    rng = np.random.default_rng(7)
    trained = {emoji_captions.caption(one, rng, 0.0, False).text for one in scenes}
    assert not trained & {one.text for one in prompts}
    for one in prompts:
        truth = emoji_captions.all_facts(one.scene)
        assert all(truth[name] == fact for name, fact in one.facts.items())


@pytest.fixture(scope="module")
def drawn(scenes):
    pytest.importorskip("resvg_py", reason='what draws them: pip install -e ".[train]"')
    try:
        return [(one, emoji.draw(one, 256)) for one in scenes[:12]]
    except PackageUnavailable as error:
        pytest.skip(str(error))


def test_a_drawing_has_the_same_pixels_wherever_it_is(drawn):
    for scene, image in drawn:
        pixels = emoji.SIZES[scene.size] * 16
        for i, (left, top) in enumerate(scene.spots):
            sprite = rendering(scene.things[i % len(scene.things)], pixels)
            there = image[16 * top : 16 * top + pixels, 16 * left : 16 * left + pixels]
            solid = sprite[..., 3] == 255
            assert np.array_equal(there[solid], sprite[..., :3][solid])


def test_a_window_is_a_part_of_the_image(drawn):
    for scene, image in drawn:
        window = emoji.draw(scene, 256, (64, 96, 96))
        assert np.array_equal(window, image[64:160, 96:192])
