"""The words that a small model was trained on, kept as `vocabulary.json` in its folder.

The bundled model knows a few hundred words and ignores all others, so that "a dragon" is an empty
scene; the released models have no such file.
"""

import json
import re
from collections.abc import Iterable, Set

from sana_cli.errors import BrokenModel
from sana_cli.instruction import normalise_prompt
from sana_cli.weights.layout import Parts

FILE = "vocabulary.json"
MAX_SHOWN = 8  # words
SELECTOR = "\ufe0f"  # follows an emoji or not, with the same meaning

_HAN = r"\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_LETTER = rf"[^\W_{_HAN}]"
# With a selector or a skin tone, and several that a joiner makes one; flags are pairs of letters.
_EMOJI = r"[\u231a-\u23ff\u2600-\u27bf\u2b05-\u2b55\U0001f000-\U0001faff]"
_EMOJI += r"\ufe0f?[\U0001f3fb-\U0001f3ff]?"
_WORD = re.compile(
    rf"[{_HAN}]+|{_LETTER}+(?:[-'’]{_LETTER}+)*"
    rf"|[\U0001f1e6-\U0001f1ff]{{2}}|{_EMOJI}(?:\u200d{_EMOJI})*"
)


def words(text: str) -> list[str]:
    """Return the words, numbers and emoji of a text, as a model reads them.

    Chinese has no spaces between words: characters that stand together are returned together.
    """
    return [word.replace(SELECTOR, "") for word in _WORD.findall(normalise_prompt(text))]


def is_chinese(word: str) -> bool:
    """Whether one of `words` is of Chinese characters."""
    return re.match(f"[{_HAN}]", word) is not None


def unknown_parts(word: str, known: Set[str]) -> list[str]:
    """Return what is unknown of one of `words`.

    Chinese is divided into known words so that as few characters as possible remain.
    """
    if word in known:
        return []
    if not is_chinese(word):
        return [word]
    longest = max(map(len, known), default=0)
    # For each number of characters from the left: how many of them remain, and where the last
    # word begins; the last character alone remains if that is None.
    best: list[tuple[int, int | None]] = [(0, None)]
    for end in range(1, len(word) + 1):
        starts = range(max(0, end - longest), end)
        options = [(best[i][0], i) for i in starts if word[i:end] in known]
        left_over = (best[end - 1][0] + 1, None)
        best.append(min([*options, left_over], key=lambda option: option[0]))
    parts, end = [""], len(word)
    while end:
        start = best[end][1]
        if start is None:
            start = end - 1
            parts[0] = word[start] + parts[0]
        elif parts[0]:
            parts.insert(0, "")
        end = start
    return [part for part in parts if part]


def vocabulary(parts: Parts) -> frozenset[str] | None:
    """Return the words that a model was trained on; None if it has no such file.

    BrokenModel if the file is not a list of words.
    """
    transformer = parts.get("transformer")
    if transformer is None or transformer.folder.name != "transformer":  # that of a single file
        return None
    file = transformer.folder.parent / FILE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenModel(f"{file} cannot be read: {error}") from None
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        raise BrokenModel(f"{file} is not a list of words")
    return frozenset(found)


def unknown_words(texts: Iterable[str], known: Set[str] | None) -> list[str]:
    """Return the distinct words of some texts that are not `known`; none if that is None."""
    if known is None:
        return []
    asked = dict.fromkeys(word for text in texts for word in words(text))
    unknown = (piece for word in asked for piece in unknown_parts(word, known))
    return list(dict.fromkeys(unknown))


def unknown_words_warning(model: str, unknown: list[str]) -> str:
    """Return the warning for words that a model does not know."""
    shown = ", ".join(f'"{word}"' for word in unknown[:MAX_SHOWN])
    more = f" and {len(unknown) - MAX_SHOWN} more" if len(unknown) > MAX_SHOWN else ""
    return f"{model} was not trained on {shown}{more}, and ignores such words"
