"""The words that a small model was trained on, kept as `vocabulary.json` in its folder.

The bundled model knows a few hundred words and ignores all others, so that "a dragon" is an empty
scene; the released models have no such file.
"""

import json
import re
from collections.abc import Iterable

from sana_cli.instruction import normalise_prompt
from sana_cli.weights.layout import Parts

FILE = "vocabulary.json"
MAX_SHOWN = 8  # words


def words(text: str) -> list[str]:
    """Return the words and numbers of a text, as a model reads them."""
    return re.findall(r"[^\W_]+(?:[-'’][^\W_]+)*", normalise_prompt(text))


def unknown_words(texts: Iterable[str], parts: Parts) -> list[str]:
    """Return the distinct words of some texts that a model was not trained on; none if it has no
    vocabulary.
    """
    transformer = parts.get("transformer")
    file = transformer.folder.parent / FILE if transformer else None
    if file is None or not file.is_file():
        return []
    known = set(json.loads(file.read_text(encoding="utf-8")))
    return [word for word in dict.fromkeys(w for t in texts for w in words(t)) if word not in known]


def unknown_words_warning(model: str, unknown: list[str]) -> str:
    """Return the warning for words that a model does not know."""
    shown = ", ".join(f'"{word}"' for word in unknown[:MAX_SHOWN])
    more = f" and {len(unknown) - MAX_SHOWN} more" if len(unknown) > MAX_SHOWN else ""
    return f"{model} was not trained on {shown}{more}, and ignores such words"
